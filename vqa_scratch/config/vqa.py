"""The options of the first system."""

from dataclasses import dataclass
from pathlib import Path

from vqa_scratch.config.shared import QuestionConfig
from vqa_scratch.errors import UserError
from vqa_scratch.options import option

FREEZE = ("nothing", "encoders", "text_encoder", "image_encoder", "decoder", "all")


@dataclass(frozen=True)
class TrainConfig(QuestionConfig):
    """The system of three towers whose decoder writes the answer."""

    preset: str = option("shapes", "Which system to train.", ("shapes", "book"))
    out: Path = option(Path("runs/vqa"), "Folder of the run.")

    # ------------------------------------------------------------------------------------------------ model
    init: str = option("random", "Towers from checkpoints, or random ones.", ("random", "pretrained"))
    image_model: str = option("", "ViT checkpoint: folder or Hub id (--init pretrained).")
    text_model: str = option("", "BERT, DistilBERT or RoBERTa checkpoint (--init pretrained).")
    decoder_model: str = option("", "GPT-2 checkpoint (--init pretrained).")
    fusion: str = option(
        "tokens",
        "What the decoder reads: every patch and question token, or one mean of both sides.",
        ("tokens", "mean"),
    )
    question_prompt: bool = option(False, "Give the question to the decoder as a prompt too, before the answer.")
    freeze: str = option("nothing", "Part whose weights stay; a decoder's cross-attention always trains.", FREEZE)
    feature_cache: bool = option(False, "Compute what frozen encoders make of their inputs once, into --cache.")
    width: int = option(128, "Width of all three towers (embedded towers).")
    heads: int = option(4, "Attention heads (embedded towers).")
    image_layers: int = option(3, "Layers of the image tower (embedded towers).")
    text_layers: int = option(1, "Layers of the text tower (embedded towers).")
    decoder_layers: int = option(4, "Layers of the decoder (embedded towers).")
    patch_size: int = option(8, "Pixels a side of a patch (embedded towers).")
    stem: str = option(
        "conv", "How pixels become patch tokens (embedded towers): convolutions, or one linear map.", ("conv", "linear")
    )
    max_answer_tokens: int = option(8, "Longer answers are cut to this many tokens, end token included.")

    positive = (
        *QuestionConfig.positive,
        *"width heads patch_size image_layers text_layers decoder_layers max_answer_tokens".split(),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feature_cache and self.parallel == "fsdp":
            raise UserError("--parallel fsdp does not go with --feature-cache; leave one out")
        if self.feature_cache and not self.resume and self.freeze in ("nothing", "decoder"):
            raise UserError(
                f"--feature-cache keeps the output of frozen encoders, and --freeze {self.freeze} freezes none; "
                "give --freeze encoders, image_encoder, text_encoder or all"
            )
        if self.preset == "book" and self.data is None and not self.resume:
            raise UserError("--preset book needs --data, the folder with the VQA v2 files")

    def unread(self) -> dict[str, str]:
        models, random = "image_model text_model decoder_model".split(), self.init == "random"
        if self.preset == "shapes":
            return dict.fromkeys(
                models if random else ["init", *models], "--preset shapes, whose towers begin at random"
            )
        sizes = "width heads image_layers text_layers decoder_layers patch_size stem".split()
        unread = dict.fromkeys(sizes, f"--preset {self.preset}, whose towers have sizes of their own")
        return unread | (dict.fromkeys(models, "--init random, which reads no weights") if random else {})
