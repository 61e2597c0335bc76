"""Every option of `train.py`. A field is a flag: `val_split` is `--val-split`.

`RunOptions` holds the options of every system, `QuestionOptions` those of systems that answer questions; the class of a
system adds its own. So a flag that a system does not use is an error. Nothing here imports torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vqa_scratch.command_line import first_rank_speaks, parse, with_more
from vqa_scratch.connectors import CONNECTORS
from vqa_scratch.errors import UserError
from vqa_scratch.options import Options, choices_of, option
from vqa_scratch.systems.presets import NEEDS_DATA, PRESETS

RUN, DATA, MODEL, TRAINING = "Run", "Data", "Model", "Training"
LIMITS, LOGGING, AUGMENTATION = "Batches and lengths", "Evaluation, logs and checkpoints", "Augmentation"
STEMS = ("conv", "linear")
PRESET_HELP = "What to train, and with which defaults."


@dataclass(frozen=True)
class RunOptions(Options):
    """The options of every system. A subclass repeats `preset`, with its own presets as choices."""

    preset: str = option("", PRESET_HELP, RUN)
    out: Path = option(Path("runs/run"), "Folder of the run.", RUN, may_change=True)
    resume: bool = option(False, "Go on from the last checkpoint of --out.", RUN, may_change=True)
    minutes: float | None = option(
        None, "Wall-clock budget of the run, final figures included; 10 without --steps.", RUN, above=0
    )
    steps: int | None = option(
        None, "Number of optimizer steps, instead of --minutes; +N with --resume: --more-steps N.", RUN, minimum=1
    )
    more_steps: int | None = option(
        None,
        "Steps beyond the last checkpoint; the learning rate follows the new total. --minutes takes no +M.",
        RUN,
        minimum=1,
        only={"resume": True},
        may_change=True,
    )
    device: str = option("auto", "Where to compute.", RUN, ("auto", "cpu", "cuda", "mps"), may_change=True)
    precision: str = option(
        "auto",
        "Precision of matrix products; auto picks bf16 if it is measurably faster on the device, else fp32.",
        RUN,
        ("auto", "fp32", "bf16", "fp16"),
    )
    compile: bool = option(False, "Run the model through torch.compile.", RUN)
    parallel: str = option(
        "ddp",
        "Under torchrun: the whole model on every rank (ddp), or a part of every tensor (fsdp).",
        RUN,
        ("ddp", "fsdp"),
        may_change=True,
    )
    seed: int = option(
        0, "Seed of the initial weights, the order of the data and the built-in data set.", RUN, minimum=0, below=2**32
    )

    data: Path | None = option(
        None,
        "Table or folder with the data (docs/own-data.md); without it, drawn scenes.",
        DATA,
        may_change=True,
    )
    cache: Path = option(Path("cache"), "Folder for the built-in data set and decoded images.", DATA, may_change=True)
    train_split: str = option("train", "Split to train on.", DATA)
    val_split: str = option(
        "val", "Split that picks the best checkpoint; 'auto' holds out images of the train split.", DATA
    )
    test_split: str = option("test", "Split of the final figures; 'val' reports on the val split.", DATA)
    test_images: int | None = option(
        None, "At most this many images of the test split in the final figures.", DATA, minimum=1, may_change=True
    )
    val_fraction: float = option(
        0.05, "Share of the train images to hold out.", DATA, above=0, below=1, only={"val_split": "auto"}
    )
    image_cache: bool = option(True, "Keep resized images as bytes in a memory-mapped file.", DATA)

    accumulate: int = option(1, "Gradient accumulation: parts that a step's batch is split into.", TRAINING, minimum=1)
    optimizer: str = option(
        "muon", "Muon for hidden matrices with AdamW for the rest, or AdamW for all.", TRAINING, ("muon", "adamw")
    )
    learning_rate: float = option(2e-3, "Peak learning rate of AdamW.", TRAINING, above=0, may_change=True)
    matrix_learning_rate: float = option(
        0.02, "Peak learning rate of Muon.", TRAINING, above=0, only={"optimizer": "muon"}, may_change=True
    )
    weight_decay: float = option(0.1, "Decoupled weight decay of all matrices.", TRAINING, minimum=0)
    warmup_steps: int = option(50, "Steps over which the learning rate rises.", TRAINING, minimum=0)
    decay_from: float = option(
        0.4, "Share of the run after which the learning rate falls linearly to zero.", TRAINING, minimum=0, below=1
    )
    max_grad_norm: float = option(
        1.0, "Clip the gradient to this norm; inf: never.", TRAINING, above=0, maximum=math.inf, may_change=True
    )

    flip: float = option(
        0.0, "Chance to mirror a training image whose texts name no side.", AUGMENTATION, minimum=0, maximum=1
    )
    rotate: float = option(
        0.0,
        "Largest rotation of a training image, in degrees; above 5, texts about places become wrong.",
        AUGMENTATION,
        minimum=0,
        maximum=180,
    )
    brightness: float = option(
        0.0, "Largest relative change of a training image's brightness.", AUGMENTATION, minimum=0, maximum=1
    )
    contrast: float = option(
        0.0, "Largest relative change of a training image's contrast.", AUGMENTATION, minimum=0, maximum=1
    )

    log_to: str | None = option(
        None, "Log to this too, besides metrics.jsonl.", LOGGING, ("tensorboard", "wandb"), may_change=True
    )
    log_every: int = option(20, "Steps between two lines of metrics.jsonl.", LOGGING, minimum=1)
    eval_every: int = option(200, "Steps between two evaluations.", LOGGING, minimum=1)
    save_every: int = option(200, "Steps between two checkpoints.", LOGGING, minimum=1)
    samples: int = option(48, "Samples shown in samples.html.", LOGGING, minimum=0)

    @property
    def splits(self) -> list[str]:
        """The splits that the run reads from the data."""
        return [self.train_split, *([] if self.val_split == "auto" else [self.val_split]), self.test_split]

    def __post_init__(self) -> None:
        if self.minutes is not None and self.steps is not None:
            raise UserError("give --minutes or --steps, not both")
        if self.minutes is None and self.steps is None:
            object.__setattr__(self, "minutes", 10.0)
        super().__post_init__()
        if self.parallel == "fsdp" and self.compile:
            raise UserError("--parallel fsdp does not go with --compile; leave one out")
        if self.preset in NEEDS_DATA and self.data is None and not self.resume:
            raise UserError(f"--preset {self.preset} needs --data, the folder with {NEEDS_DATA[self.preset]}")


@dataclass(frozen=True)
class QuestionOptions(RunOptions):
    """The options of systems that answer questions about images."""

    start_at: int = option(0, "First question of the file to use.", DATA, minimum=0)
    end_at: int | None = option(None, "Question of the file to stop before; without it, use all.", DATA, minimum=0)
    max_images: int | None = option(None, "At most this many images.", DATA, minimum=1)
    max_questions: int | None = option(None, "At most this many questions.", DATA, minimum=1)
    min_agreement: float = option(
        0.0, "Leave out questions on which fewer of the annotators agree; a share.", DATA, minimum=0, maximum=1
    )
    verify_images: bool = option(
        False, "Decode every image first; leave out and count those that cannot be read.", DATA
    )
    max_question_tokens: int = option(
        32, "Longer questions are cut to this many tokens, and counted.", LIMITS, minimum=3
    )
    questions_per_step: int = option(512, "Questions in one optimizer step.", LIMITS, minimum=1)
    questions_per_image: int = option(8, "At most this many questions of an image in a batch.", LIMITS, minimum=1)
    eval_questions: int = option(
        2_000, "Questions of the val split scored at each evaluation while training.", LOGGING, minimum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.questions_per_step % self.accumulate:
            raise UserError(
                f"--questions-per-step {self.questions_per_step} does not divide into --accumulate {self.accumulate}"
            )


NEW = {"start_from": None}
SHAPES, RELEASED = NEW | {"preset": "shapes"}, NEW | {"preset": "book", "init": "pretrained"}


@dataclass(frozen=True)
class VQAOptions(QuestionOptions):
    """Two encoders, a connector, and a decoder that writes the answer."""

    preset: str = option("shapes", PRESET_HELP, RUN, ("shapes", "book"))
    out: Path = option(Path("runs/vqa"), "Folder of the run.", RUN, may_change=True)

    start_from: Path | None = option(
        None, "Finished run whose weights, sizes, connector and tokenizers to start from.", MODEL
    )
    init: str = option("random", "Random weights, or those of checkpoints.", MODEL, ("random", "pretrained"), only=NEW)
    image_model: str | None = option(None, "ViT checkpoint: folder or Hub id.", MODEL, only=RELEASED)
    text_model: str | None = option(None, "BERT, DistilBERT or RoBERTa checkpoint.", MODEL, only=RELEASED)
    decoder_model: str | None = option(
        None, "GPT-2 checkpoint; or an OPT or Llama, with a connector that makes a prefix.", MODEL, only=RELEASED
    )
    connector: str = option(
        "tokens",
        "How the decoder gets image and question: cross-attention to every token (tokens) or to their mean (mean), or "
        "a prefix of projected tokens (prefix) or of learned queries that read the tokens (qformer).",
        MODEL,
        CONNECTORS,
        only=NEW,
        was="fusion",
    )
    queries: int = option(16, "Learned queries of the connector.", MODEL, minimum=1, only={"connector": "qformer"})
    question_prompt: bool = option(False, "Give the question to the decoder too, as a prompt.", MODEL)
    freeze: str = option(
        "nothing",
        "Part whose weights do not train; a decoder's cross-attention always trains.",
        MODEL,
        ("nothing", "encoders", "text_encoder", "image_encoder", "decoder", "all"),
    )
    feature_cache: bool = option(
        False,
        "Compute the states of frozen encoders once, and keep them in --cache.",
        MODEL,
        only={"freeze": ("encoders", "text_encoder", "image_encoder", "all")},
        may_change=True,
    )
    width: int = option(128, "Width of both encoders and the decoder.", MODEL, minimum=1, only=SHAPES)
    heads: int = option(4, "Attention heads.", MODEL, minimum=1, only=SHAPES)
    image_layers: int = option(3, "Layers of the image encoder.", MODEL, minimum=1, only=SHAPES)
    text_layers: int = option(1, "Layers of the text encoder.", MODEL, minimum=1, only=SHAPES)
    decoder_layers: int = option(4, "Layers of the decoder.", MODEL, minimum=1, only=SHAPES)
    patch_size: int = option(8, "Side of a patch, in pixels.", MODEL, minimum=1, only=SHAPES)
    stem: str = option(
        "conv", "How pixels become patch tokens: convolutions or one linear map.", MODEL, STEMS, only=SHAPES
    )
    max_answer_tokens: int = option(
        8, "Longer answers are cut to this many tokens, end token included.", LIMITS, minimum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset == "shapes" and self.init == "pretrained":
            raise UserError("--init pretrained means nothing with --preset shapes: it goes with --preset book")
        if self.feature_cache and self.parallel == "fsdp":
            raise UserError("--parallel fsdp does not go with --feature-cache; leave one out")


OWN_SIZES = {"model": None}


@dataclass(frozen=True)
class ViLTOptions(QuestionOptions):
    """A single stream that chooses its answer from a list: a small one, or a released ViLT."""

    preset: str = option("vilt", PRESET_HELP, RUN, ("vilt", "vilt-b32"))
    out: Path = option(Path("runs/vilt"), "Folder of the run.", RUN, may_change=True)
    min_answer_count: int = option(
        9, "The list has the answers that are the majority answer to at least this many questions.", DATA, minimum=1
    )

    model: str | None = option(
        None, "ViLT checkpoint to start from: folder or Hub id; without it, random weights.", MODEL
    )
    image_size: int = option(64, "Side of the resized images, in pixels.", MODEL, minimum=1, only=OWN_SIZES)
    patch_size: int = option(16, "Side of a patch, in pixels.", MODEL, minimum=1, only=OWN_SIZES)
    width: int = option(128, "Width.", MODEL, minimum=1, only=OWN_SIZES)
    heads: int = option(4, "Attention heads.", MODEL, minimum=1, only=OWN_SIZES)
    layers: int = option(4, "Layers.", MODEL, minimum=1, only=OWN_SIZES)
    stem: str = option(
        "conv", "How pixels become patch tokens: convolutions or one linear map.", MODEL, STEMS, only=OWN_SIZES
    )


SMALL, PRETRAINED = {"preset": "caption", "init": "random"}, {"init": "pretrained"}


@dataclass(frozen=True)
class CaptionOptions(RunOptions):
    """The captioner, which can also answer questions: a ResNet and a GPT-2 that reads its feature map."""

    question_prompt = True  # a question is always the decoder's prompt, for there is no text encoder

    preset: str = option("caption", PRESET_HELP, RUN, ("caption", "coco"))
    out: Path = option(Path("runs/caption"), "Folder of the run.", RUN, may_change=True)
    max_images: int | None = option(None, "At most this many images to train on.", DATA, minimum=1)

    init: str = option("random", "Random weights, or those of checkpoints.", MODEL, ("random", "pretrained"))
    image_model: Path | None = option(
        None, "File with torchvision's ResNet weights, .safetensors or .pth.", MODEL, only=PRETRAINED
    )
    decoder_model: str | None = option(None, "GPT-2 checkpoint: folder or Hub id.", MODEL, only=PRETRAINED)
    freeze: str = option(
        "nothing",
        "Part whose weights do not train; a decoder's cross-attention always trains.",
        MODEL,
        ("nothing", "image_encoder", "decoder", "all"),
    )
    width: int = option(128, "Width of the decoder.", MODEL, minimum=1, only=SMALL)
    heads: int = option(4, "Attention heads.", MODEL, minimum=1, only=SMALL)
    decoder_layers: int = option(4, "Layers of the decoder.", MODEL, minimum=1, only=SMALL)
    image_width: int = option(64, "Channels of the first of the two stages.", MODEL, minimum=1, only=SMALL)
    image_blocks: int = option(1, "Residual blocks of each stage.", MODEL, minimum=1, only=SMALL)
    vocabulary: int = option(
        512, "Largest vocabulary to learn for the decoder, in tokens.", MODEL, minimum=1, only={"init": "random"}
    )

    max_caption_tokens: int = option(
        64, "Longer captions are cut to this many tokens, end token included.", LIMITS, minimum=1
    )
    max_question_tokens: int = option(32, "Longer questions are cut to this many tokens.", LIMITS, minimum=1)
    captions_per_step: int = option(256, "Captions in one optimizer step.", LIMITS, minimum=1)
    captions_per_image: int = option(
        5, "At most this many captions of an image in a batch; the image is encoded once.", LIMITS, minimum=1
    )
    question_share: float = option(
        0.0, "Share of the steps that train on questions, from the same data folder.", TRAINING, minimum=0, below=1
    )
    questions_per_step: int = option(512, "Questions in a step that trains on them.", LIMITS, minimum=1)
    questions_per_image: int = option(8, "At most this many questions of an image in a batch.", LIMITS, minimum=1)
    eval_captions: int = option(
        250, "Images of the val split described at each evaluation while training.", LOGGING, minimum=1
    )
    eval_questions: int = option(
        1_000, "Questions of the val split answered at each evaluation while training.", LOGGING, minimum=1
    )

    @property
    def max_answer_tokens(self) -> int:
        """The limit on captions, under the name that tokenizers use."""
        return self.max_caption_tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init == "pretrained" and not (self.image_model and self.decoder_model) and not self.resume:
            raise UserError("--init pretrained needs --image-model, a file of ResNet weights, and --decoder-model")


CLASSES = (VQAOptions, ViLTOptions, CaptionOptions)
BY_PRESET = {preset: options for options in CLASSES for preset in choices_of(options, "preset")}


def read_command_line(argv: Sequence[str]) -> RunOptions:
    """The options of the system that --preset names, set by its flags.

    `--help` prints the flags and exits. Raises UserError, one line, on an unknown flag or a value that is not allowed.
    """
    with first_rank_speaks():
        return parse(
            CLASSES,
            PRESETS,
            with_more(argv, "--steps"),
            program="train.py",
            about="Train a model that looks at images: to answer questions about them, or to describe them.",
            example="python train.py --preset book --data vqa2/ --out runs/book",
        )
