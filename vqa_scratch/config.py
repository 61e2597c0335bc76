"""Every option of `train.py`, one sentence each, and the presets. A field is a flag: `data_dir` is `--data-dir`.

`RunConfig` holds what every system takes, `QuestionConfig` what those that answer questions take; a system's own class
adds the rest. So a flag that means nothing for a system is no flag of it, and giving it is an error.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqa_scratch.errors import UserError
from vqa_scratch.options import option

FREEZE = ("nothing", "encoders", "text_encoder", "image_encoder", "decoder", "all")


@dataclass(frozen=True)
class RunConfig:
    """What every system takes. A subclass repeats `preset` with its own default and its own presets as choices."""

    preset: str = option("", "Which system to train.")
    out: Path = option(Path("runs/run"), "Folder of the run.")
    resume: bool = option(False, "Go on from the last checkpoint of --out.")
    minutes: float | None = option(None, "Wall-clock budget of the whole run, final evaluation included.")
    steps: int | None = option(None, "Optimizer steps of the whole run, instead of --minutes.")
    device: str = option("auto", "Where to compute.", ("auto", "cpu", "cuda", "mps"))
    precision: str = option(
        "auto",
        "Arithmetic of matrix products; auto takes bf16 where the device is measurably faster at it, else fp32.",
        ("auto", "fp32", "bf16", "fp16"),
    )
    compile: bool = option(False, "Run the model through torch.compile.")
    parallel: str = option(
        "ddp", "Under torchrun: the whole model on every rank, or a part of every tensor.", ("ddp", "fsdp")
    )
    seed: int = option(0, "Seed of the initial weights, the order of the data and the embedded data set.")

    # ------------------------------------------------------------------------------------------------- data
    data: Path | None = option(None, "Folder with the data files; without it the embedded data set is drawn.")
    cache: Path = option(Path("cache"), "Folder for the embedded data set and decoded images.")
    train_split: str = option("train", "Split to train on.")
    val_split: str = option("val", "Split that picks the best checkpoint; 'auto' holds out images of the train split.")
    test_split: str = option("test", "Split of the final figures; 'val' to report on the val split.")
    val_fraction: float = option(0.05, "Share of the images held out by --val-split auto.")
    image_cache: bool = option(True, "Keep resized images as bytes in a file mapped into memory.")

    # --------------------------------------------------------------------------------------------- training
    accumulate: int = option(1, "Parts in which the samples of a step go through the model.")
    optimizer: str = option(
        "muon", "Muon for hidden matrices with AdamW for the rest, or AdamW for all.", ("muon", "adamw")
    )
    learning_rate: float = option(2e-3, "Peak learning rate of AdamW.")
    matrix_learning_rate: float = option(0.02, "Peak learning rate of Muon.")
    weight_decay: float = option(0.1, "Decoupled weight decay of all matrices.")
    warmup_steps: int = option(50, "Steps over which the learning rate rises.")
    decay_from: float = option(0.4, "Share of the run after which the learning rate falls linearly to zero.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.")

    # ---------------------------------------------------------------------------------------------- looking
    log_every: int = option(20, "Steps between two lines of metrics.jsonl.")
    eval_every: int = option(200, "Steps between two evaluations.")
    save_every: int = option(200, "Steps between two checkpoints.")
    samples: int = option(48, "Samples shown in samples.html.")

    positive = tuple(  # options that must be; no annotation, so no field
        "accumulate log_every eval_every save_every learning_rate max_grad_norm".split()
    )

    def __post_init__(self) -> None:
        if self.minutes is not None and self.steps is not None:
            raise UserError("give --minutes or --steps, not both")
        if self.minutes is None and self.steps is None:
            object.__setattr__(self, "minutes", 10.0)
        for name in self.positive:
            if getattr(self, name) <= 0:
                raise UserError(f"--{name.replace('_', '-')} must be positive, not {getattr(self, name)}")
        if self.parallel == "fsdp" and self.compile:
            raise UserError("--parallel fsdp does not go with --compile; leave one out")
        if self.minutes is not None and self.minutes <= 0:
            raise UserError(f"--minutes must be positive, not {self.minutes}")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"--steps must be 1 or more, not {self.steps}")
        if not 0 <= self.decay_from < 1:
            raise UserError(f"--decay-from must be from 0 up to but not including 1, not {self.decay_from}")


@dataclass(frozen=True)
class QuestionConfig(RunConfig):
    """What the systems take that answer questions about images."""

    start_at: int = option(0, "First question of the file to look at.")
    end_at: int | None = option(None, "Question of the file to stop before.")
    max_images: int | None = option(None, "At most so many images.")
    max_questions: int | None = option(None, "At most so many questions.")
    min_agreement: float = option(0.0, "Leave out questions on which a smaller share of the annotators agree.")
    verify_images: bool = option(False, "Decode every image first, and leave out and count those that cannot be read.")
    max_question_tokens: int = option(32, "Longer questions are cut to this many tokens, and counted.")
    eval_questions: int = option(2_000, "Questions of the val split scored at each evaluation while training.")
    questions_per_step: int = option(512, "Questions in one optimizer step.")
    questions_per_image: int = option(8, "At most so many questions of an image in a batch.")

    positive = (*RunConfig.positive, "questions_per_step", "questions_per_image", "max_question_tokens")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.questions_per_step % self.accumulate:
            raise UserError(
                f"--questions-per-step {self.questions_per_step} does not divide into --accumulate {self.accumulate}"
            )


@dataclass(frozen=True)
class TrainConfig(QuestionConfig):
    """The system of three towers whose decoder writes the answer."""

    preset: str = option("shapes", "Which system to train.", ("shapes", "book"))
    out: Path = option(Path("runs/vqa"), "Folder of the run.")

    # ------------------------------------------------------------------------------------------------ model
    init: str = option("random", "Towers from checkpoints, or random ones.", ("random", "pretrained"))
    image_model: str = option("", "ViT checkpoint: folder or Hub id (--init pretrained) or its sizes (--init random).")
    text_model: str = option("", "BERT, DistilBERT or RoBERTa checkpoint.")
    decoder_model: str = option("", "GPT-2 checkpoint.")
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


@dataclass(frozen=True)
class ViLTTrainConfig(QuestionConfig):
    """The single-stream system that chooses its answer from a list: a small one of its own, or a released ViLT."""

    preset: str = option("vilt", "Which system to train.", ("vilt", "vilt-b32"))
    out: Path = option(Path("runs/vilt"), "Folder of the run.")
    min_answer_count: int = option(9, "An answer is in the list if it is the majority's to so many questions.")

    # ------------------------------------------------------------------------------------------------ model
    model: str = option("", "ViLT checkpoint to start from: folder or Hub id; empty for random weights.")
    image_size: int = option(64, "Pixels a side that images are resized to (random weights).")
    patch_size: int = option(16, "Pixels a side of a patch (random weights).")
    width: int = option(128, "Width (random weights).")
    heads: int = option(4, "Attention heads (random weights).")
    layers: int = option(4, "Layers (random weights).")
    stem: str = option(
        "conv", "How pixels become patch tokens (random weights): convolutions, or one linear map.", ("conv", "linear")
    )

    positive = (*QuestionConfig.positive, *"min_answer_count image_size patch_size width heads layers".split())

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset == "vilt-b32" and self.data is None and not self.resume:
            raise UserError("--preset vilt-b32 needs --data, the folder with the VQA v2 files")
        sizes = "image_size patch_size width heads layers stem".split()
        given = [name for name in sizes if getattr(self, name) != self.__dataclass_fields__[name].default]
        if self.model and given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"{flags} means nothing with --model {self.model}, which has sizes of its own")


PRESETS: dict[str, dict[str, Any]] = {
    "shapes": {"question_prompt": True},
    "book": {
        "init": "pretrained",
        "image_model": "facebook/dino-vitb16",
        "text_model": "distilbert-base-uncased",
        "decoder_model": "gpt2",
        "test_split": "val",
        "val_split": "auto",
        "image_cache": False,
        "questions_per_step": 64,
        "questions_per_image": 5,
        "optimizer": "adamw",
        "learning_rate": 5e-5,
        "weight_decay": 0.01,
        "warmup_steps": 1000,
        "decay_from": 0.1,
        "max_question_tokens": 32,
        "max_answer_tokens": 8,
        "eval_every": 2000,
        "save_every": 2000,
    },
    "vilt": {},
    "vilt-b32": {
        "model": "dandelin/vilt-b32-mlm",
        "test_split": "val",
        "val_split": "auto",
        "image_cache": False,
        "questions_per_step": 256,
        "questions_per_image": 5,
        "accumulate": 8,
        "optimizer": "adamw",
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
        "warmup_steps": 2000,
        "decay_from": 0.1,
        "eval_every": 2000,
        "save_every": 2000,
    },
    "caption": {"weight_decay": 0.0},
    "coco": {
        "init": "pretrained",
        "decoder_model": "gpt2",
        "test_split": "val",
        "val_split": "auto",
        "image_cache": False,
        "captions_per_step": 64,
        "optimizer": "adamw",
        "learning_rate": 5e-5,
        "weight_decay": 0.01,
        "warmup_steps": 1000,
        "decay_from": 0.1,
        "max_caption_tokens": 40,
        "eval_every": 2000,
        "save_every": 2000,
    },
}
