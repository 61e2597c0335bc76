"""The options of `train.py` that every system has, and those of systems with images. A field is a flag: `val_split`
is `--val-split`."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from vqa_scratch.errors import UserError
from vqa_scratch.options import Options, option, threads_option
from vqa_scratch.systems.presets import NEEDS_DATA

RUN, DATA, MODEL, TRAINING = "Run", "Data", "Model", "Training"
LIMITS, LOGGING, AUGMENTATION = "Batches and lengths", "Evaluation, logs and checkpoints", "Augmentation"
PRESET_HELP = "What to train, and with which defaults."
STEM = partial(
    option, "conv", "How pixels become patch tokens: convolutions or one linear map.", MODEL, ("conv", "linear")
)


@dataclass(frozen=True)
class RunOptions(Options):
    """The options of every system. A subclass repeats `preset`, with its own presets as choices."""

    limits_test: ClassVar[tuple[str, ...]] = ()  # those that cut the test split, which a resumed run may

    preset: str = option("", PRESET_HELP, RUN)
    out: Path = option(Path("runs/run"), "Folder of the run.", RUN, may_change=True)
    resume: bool = option(False, "Go on from the last checkpoint of --out.", RUN, may_change=True)
    minutes: float | None = option(
        None,
        "Wall-clock budget, final figures included; 10 without --steps. With --resume, +M: M more for a finished run.",
        RUN,
        above=0,
        more=True,
        excludes="steps",
    )
    steps: int | None = option(
        None,
        "Number of optimizer steps, instead of --minutes. With --resume, +N: N more for a finished run.",
        RUN,
        minimum=1,
        more=True,
    )
    device: str = option("auto", "Where to compute.", RUN, ("auto", "cpu", "cuda", "mps"), may_change=True)
    precision: str = option(
        "auto",
        "Precision of matrix products; auto picks bf16 if steps are clearly faster in it on the device, else fp32.",
        RUN,
        ("auto", "fp32", "bf16", "fp16"),
    )
    threads: int | None = threads_option(RUN)
    compile: bool = option(False, "Run the model through torch.compile.", RUN)
    gradient_checkpointing: bool = option(
        False, "Compute each block again in the backward pass: less memory, the same gradients.", RUN, may_change=True
    )
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

    seeds: int | None = option(
        None,
        "Whole runs, with this many seeds from --seed on, each in a folder below --out.",
        RUN,
        minimum=2,
        may_change=True,
    )

    data: Path | None = option(
        None,
        "Table or folder with the data (docs/own-data.md); without it, what the program draws.",
        DATA,
        may_change=True,
    )
    cache: Path = option(
        Path("cache"), "Folder for built-in data sets, parsed questions and decoded images.", DATA, may_change=True
    )
    train_split: str = option("train", "Split to train on.", DATA)
    val_split: str = option("val", "Split that picks the best checkpoint.", DATA)
    test_split: str = option("test", "Split of the final figures; 'val' reports on the val split.", DATA)

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

    log_to: str | None = option(
        None, "Log to this too, besides metrics.jsonl.", LOGGING, ("tensorboard", "wandb"), may_change=True
    )
    profile: int | None = option(
        None,
        "Profile this many steps after the first three, into trace.json.",
        LOGGING,
        minimum=1,
        maximum=50,
        may_change=True,
    )
    log_every: int = option(20, "Steps between two lines of metrics.jsonl.", LOGGING, minimum=1)
    eval_every: int = option(200, "Steps between two evaluations.", LOGGING, minimum=1)
    save_every: int = option(200, "Steps between two checkpoints.", LOGGING, minimum=1)
    samples: int = option(48, "Samples shown in samples.html.", LOGGING, minimum=0)

    @property
    def splits(self) -> list[str]:
        """The splits that the run reads from the data."""
        return [self.train_split, self.val_split, self.test_split]

    def __post_init__(self) -> None:
        if self.minutes is None and self.steps is None:
            object.__setattr__(self, "minutes", 10.0)
        super().__post_init__()
        if self.parallel == "fsdp" and self.compile:
            raise UserError("--parallel fsdp does not go with --compile; leave one out")
        if self.gradient_checkpointing and self.compile:
            raise UserError("--gradient-checkpointing does not go with --compile; leave one out")
        if self.preset in NEEDS_DATA and self.data is None and not self.resume:
            raise UserError(f"--preset {self.preset} needs --data, the folder with {NEEDS_DATA[self.preset]}")


@dataclass(frozen=True)
class ImageOptions(RunOptions):
    """The options of systems whose samples are texts about images."""

    limits_test = ("test_images",)

    val_split: str = option(
        "val", "Split that picks the best checkpoint; 'auto' holds out images of the train split.", DATA
    )
    val_fraction: float = option(
        0.05, "Share of the train images to hold out.", DATA, above=0, below=1, only={"val_split": "auto"}
    )
    test_images: int | None = option(
        None, "At most this many images of the test split in the final figures.", DATA, minimum=1, may_change=True
    )
    image_cache: bool = option(True, "Keep resized images as bytes in a memory-mapped file.", DATA)

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

    @property
    def splits(self) -> list[str]:
        return [split for split in super().splits if split != "auto"]
