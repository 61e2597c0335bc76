"""The options of the captioner."""

from dataclasses import dataclass
from pathlib import Path

from vqa_scratch.config.shared import RunConfig
from vqa_scratch.errors import UserError
from vqa_scratch.options import option


@dataclass(frozen=True)
class CaptionTrainConfig(RunConfig):
    """The captioner, which answers questions too: a ResNet whose map of features a GPT-2 reads."""

    preset: str = option("caption", "Which system to train.", ("caption", "coco"))
    out: Path = option(Path("runs/caption"), "Folder of the run.")
    max_images: int | None = option(None, "At most so many images to train on.")

    # ------------------------------------------------------------------------------------------------ model
    init: str = option("random", "Towers from checkpoints, or random ones.", ("random", "pretrained"))
    image_model: Path | None = option(None, "File with torchvision's ResNet weights, .safetensors or .pth.")
    decoder_model: str = option("", "GPT-2 checkpoint: folder or Hub id.")
    freeze: str = option(
        "nothing",
        "Part whose weights stay; a decoder's cross-attention always trains.",
        ("nothing", "image_encoder", "decoder", "all"),
    )
    width: int = option(128, "Width of the decoder (embedded towers).")
    heads: int = option(4, "Attention heads (embedded towers).")
    decoder_layers: int = option(4, "Layers of the decoder (embedded towers).")
    image_width: int = option(64, "Channels of the first of the two stages (embedded towers).")
    image_blocks: int = option(1, "Residual blocks of each stage (embedded towers).")
    vocabulary: int = option(512, "Tokens at most of the decoder's own vocabulary (--init random).")
    max_caption_tokens: int = option(64, "Longer captions are cut to this many tokens, end token included.")
    max_question_tokens: int = option(32, "Longer questions are cut to this many tokens.")

    # --------------------------------------------------------------------------------------------- training
    captions_per_step: int = option(256, "Captions in one optimizer step.")
    captions_per_image: int = option(5, "At most so many captions of an image in a batch; it is encoded once.")
    question_share: float = option(0.0, "Share of the steps that train on the questions of the same data folder.")
    questions_per_step: int = option(512, "Questions in a step that trains on them.")
    questions_per_image: int = option(8, "At most so many questions of an image in a batch.")
    eval_captions: int = option(250, "Images of the val split described at each evaluation while training.")
    eval_questions: int = option(1_000, "Questions of the val split answered at each evaluation while training.")
    flip: float = option(0.5, "Chance that a training image is mirrored, where no text of it says left or right.")
    rotate: float = option(5.0, "Training images are turned by up to so many degrees; above 5, places go wrong.")
    brightness: float = option(0.1, "Largest relative change of a training image's brightness.")
    contrast: float = option(0.1, "Largest relative change of a training image's contrast.")

    positive = (
        *RunConfig.positive,
        *"width heads decoder_layers image_width image_blocks max_caption_tokens max_question_tokens".split(),
        *"captions_per_step captions_per_image questions_per_step questions_per_image".split(),
        *"eval_captions eval_questions".split(),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("flip", self.flip), ("brightness", self.brightness), ("contrast", self.contrast)):
            if not 0 <= value <= 1:
                raise UserError(f"--{name} must be from 0 to 1, not {value}")
        if not 0 <= self.rotate <= 180:
            raise UserError(f"--rotate must be from 0 to 180 degrees, not {self.rotate}")
        if not 0 <= self.question_share < 1:
            raise UserError(f"--question-share must be from 0 up to but not including 1, not {self.question_share}")
        if self.preset == "coco" and self.data is None and not self.resume:
            raise UserError("--preset coco needs --data, the folder with the captions files and images")
        if self.init == "pretrained" and not (self.image_model and self.decoder_model) and not self.resume:
            raise UserError("--init pretrained needs --image-model, a file of ResNet weights, and --decoder-model")
        if self.init == "random" and self.image_model:
            raise UserError("--image-model goes with --init pretrained; --init random reads no weights")

    def unread(self) -> dict[str, str]:
        sizes, unread = "width heads decoder_layers image_width image_blocks".split(), {}
        if self.init == "pretrained":
            unread = dict.fromkeys([*sizes, "vocabulary"], "--init pretrained, whose towers have sizes of their own")
        if self.init == "random":
            unread["decoder_model"] = "--init random, which reads no weights"
        if self.preset == "coco":
            unread |= dict.fromkeys(sizes, "--preset coco, whose towers have sizes of their own")
        return unread
