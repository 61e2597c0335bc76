"""What every system takes, and what those take that answer questions."""

import math
from dataclasses import dataclass, fields
from pathlib import Path

from vqa_scratch.errors import UserError
from vqa_scratch.options import option


@dataclass(frozen=True)
class RunConfig:
    """What every system takes. A subclass repeats `preset` with its own default and its own presets as choices."""

    preset: str = option("", "Which system to train.")
    out: Path = option(Path("runs/run"), "Folder of the run.")
    resume: bool = option(False, "Go on from the last checkpoint of --out.")
    minutes: float | None = option(
        None, "Wall-clock budget of the run, up to 45 seconds of it for the final figures; 10 without --steps."
    )
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
    test_images: int | None = option(None, "At most so many images of the test split in the final figures.")
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
        "accumulate log_every eval_every save_every learning_rate matrix_learning_rate max_grad_norm".split()
    )
    not_negative = tuple("seed weight_decay warmup_steps samples".split())

    def unread(self) -> dict[str, str]:
        """Options that nothing reads as the others stand, and with what: to give one on a command line is an error."""
        return {}

    def __post_init__(self) -> None:
        if self.minutes is not None and self.steps is not None:
            raise UserError("give --minutes or --steps, not both")
        if self.minutes is None and self.steps is None:
            object.__setattr__(self, "minutes", 10.0)
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{item.name.replace('_', '-')} must be a finite number, not {value}")
        for name in self.not_negative:
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} must not be negative, not {getattr(self, name)}")
        for name in self.positive:
            if getattr(self, name) <= 0:
                raise UserError(f"--{name.replace('_', '-')} must be positive, not {getattr(self, name)}")
        if self.parallel == "fsdp" and self.compile:
            raise UserError("--parallel fsdp does not go with --compile; leave one out")
        if self.minutes is not None and self.minutes <= 0:
            raise UserError(f"--minutes must be positive, not {self.minutes}")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"--steps must be 1 or more, not {self.steps}")
        if self.seed >= 2**32:
            raise UserError(f"--seed must be below 2^32, not {self.seed}")
        if not 0 <= self.decay_from < 1:
            raise UserError(f"--decay-from must be from 0 up to but not including 1, not {self.decay_from}")
        if self.test_images is not None and self.test_images < 1:
            raise UserError(f"--test-images must be 1 or more, not {self.test_images}")
        if not 0 < self.val_fraction < 1:
            raise UserError(f"--val-fraction must be above 0 and below 1, not {self.val_fraction}")


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

    positive = (
        *RunConfig.positive,
        *"questions_per_step questions_per_image max_question_tokens eval_questions".split(),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.questions_per_step % self.accumulate:
            raise UserError(
                f"--questions-per-step {self.questions_per_step} does not divide into --accumulate {self.accumulate}"
            )
