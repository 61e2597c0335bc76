"""What a system is: one kind of model, and how it is trained, saved, opened again and asked.

A system is one class in one file, and a line in the table of `vqa_scratch/systems/__init__.py`; no program knows its
name. Its options are in `systems/options.py`. `train.py` goes through a run in this order:

    System.check(options)                            what the options alone can tell
    data = System.read(options)                      what it trains on
    system = System.build(options, data, precision)  or System.open(...) for a run that is resumed
    system.train_on(data)
    system.trial()                                   what number formats are timed on
    system.save(folder)                              everything but the weights
    epoch, share, batch, loss, ids, evaluate         the loop
    seconds_to_finish, finish(folder)                the final figures

A finished run is opened from its own folder alone: tokenizers, answers and preprocessing come from the run, never again
from the data.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, NoReturn, Self, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vqa_scratch.data.answers import Answer, Answers
from vqa_scratch.data.hashes import Hashes, facts, hashes_of
from vqa_scratch.data.scenes import Scene
from vqa_scratch.data.tokenizers import Tokenizers
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.nn.quantized import Format
from vqa_scratch.report.curves import over_samples
from vqa_scratch.systems.assembly import WithoutNumbers
from vqa_scratch.systems.finals import Pace, Pass
from vqa_scratch.systems.run_folder import load_weights, write_run_config
from vqa_scratch.systems.run_options import RunOptions
from vqa_scratch.training.optimizers import Optimizers
from vqa_scratch.training.precision import Precision
from vqa_scratch.training.ranks import ALONE, World

RO = TypeVar("RO", bound=RunOptions)
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class RunData:
    """Samples by split: "train", "val", "test", and "holdout" where there is one. What they are is up to the system."""

    samples: dict[str, list[Any]]
    family: Callable[[Any], str]  # of a sample, by which figures are broken down
    scenes: dict[str, dict[int | str, Scene]] = field(default_factory=dict)  # of splits that were drawn, by image id
    facts: Callable[[list[Any]], Iterable[tuple[Any, ...]]] = facts  # what makes each sample of a split itself

    def hashes(self) -> Hashes:
        """By which a run that is resumed knows its data."""
        return hashes_of({name: self.facts(some) for name, some in self.samples.items()})


class System(ABC, Generic[RO, M]):
    """A model with its tokenizers; while it trains, with its data too."""

    example: ClassVar[str] = "what color is the square?"  # a question to ask; "" if it is asked none
    asked: ClassVar[str] = "question"  # what `subject` takes beside the image: a question, or a text
    unit: ClassVar[str] = "questions"  # what a sample is, in the plural
    writes: ClassVar[bool] = False  # whether it writes its answers token by token
    hears: ClassVar[bool] = False  # whether its samples are recordings, not texts about images
    loss_unit: ClassVar[str] = "nats a token"  # of the training loss, for the curve's axis
    published_as: ClassVar[tuple[str, str]] = ("visual-question-answering", "accuracy")  # task and metric, on the Hub
    pace: Pace  # of its final figures

    def __init__(
        self,
        options: RO,
        model: M,
        tokenizers: Tokenizers,
        precision: Precision,
        folder: Path | None = None,
    ) -> None:
        self.options, self.model, self.precision = options, model, precision
        self.tokenizers, self.folder = tokenizers, folder
        self.world: World = ALONE  # train.py sets the ranks of the run
        self.data_hashes: Hashes | None = None  # and those of its data, which config.json keeps

    # ------------------------------------------------------------------------------------- build, save, open

    @classmethod
    @abstractmethod
    def check(cls, options: RO) -> None:
        """Raise UserError for what is wrong with the options of a new run, before any data are read or drawn.

        A model of random weights is built in `WithoutNumbers`, so that its own rules speak.
        """

    @classmethod
    @abstractmethod
    def read(cls, options: RO) -> RunData:
        """The data of a run. Raises UserError if it cannot be read."""

    @classmethod
    @abstractmethod
    def build(cls, options: RO, data: RunData, precision: Precision) -> Self:
        """A new model, on the CPU, with tokenizers learned from the data or read from checkpoints."""

    @classmethod
    @abstractmethod
    def open(cls, folder: Path, sizes: dict[str, Any], options: RO, precision: Precision) -> Self:
        """What `save` left in a folder, with random weights; `sizes` are the "model" of config.json."""

    @classmethod
    def load(
        cls, folder: Path, sizes: dict[str, Any], options: RO, precision: Precision, kind: Format | None = None
    ) -> Self:
        """A finished run with its best weights, in the format `kind`, in eval mode on the device; see `systems.load`.

        Raises UserError if there are no weights yet, or if they do not fit.
        """
        with WithoutNumbers():  # the weights take their place
            system = cls.open(folder, sizes, options, precision)
        load_weights(system.model, folder, precision, kind)
        system.model.to(precision.device).eval()
        return system

    def save(self, folder: Path) -> None:
        """Everything but the weights, into the run folder."""
        write_run_config(folder, self.options, self.sizes, self.data_hashes)
        for name, tokenizer in self.tokenizers.by_name.items():
            tokenizer.save(folder / f"{name}_tokenizer")

    @property
    @abstractmethod
    def sizes(self) -> dict[str, Any]:
        """What `open` needs to build the model again."""

    # ------------------------------------------------------------------------------------------------- training

    @abstractmethod
    def train_on(self, data: RunData) -> None:
        """Prepare to train on what `read` returned."""

    def about(self) -> list[str]:
        """Lines for the user before training begins: which parameters train, what was cut or left out."""
        return []

    def trial(self) -> Callable[[Precision], None]:
        """A function that goes forward and backward through an eighth of a step, or 16 samples, in a format.

        Called after `train_on`, to time the formats; weights, gradients and random numbers stay as they are.
        """
        batch = self.batch(max(self.epoch(0)[:3], key=lambda key: len(key.rows)))  # one may be a leftover of a few
        parts = self.options.accumulate
        parts *= max(1, min(8, batch.counts[0] // (16 * parts)))  # few fit into caches, where every format is fast
        part = next(batch.parts(parts)).to(self.precision.device)

        def forward_and_backward(precision: Precision) -> None:
            with torch.random.fork_rng(devices=()):
                with precision.autocast():
                    loss, _ = self.loss(part)
                loss.backward()
            self.model.zero_grad(set_to_none=True)

        return forward_and_backward

    def precompute(self) -> None:  # noqa: B027
        """Write the files of --cache that need the model's weights; the main rank of a machine does so first."""

    def trained_by(self, optimizers: Optimizers) -> None:  # noqa: B027
        """Hook to the optimizers of the run what is to happen after each of their steps."""

    @abstractmethod
    def epoch(self, number: int) -> list[Any]:
        """What `batch` takes for each step of an epoch, with its `rows`; a function of `number` alone."""

    @abstractmethod
    def share(self, key: Any, world: World) -> tuple[Any, bool]:
        """(this rank's part of a step, as a key, True); if it has none, (some small key, False)."""

    @abstractmethod
    def batch(self, key: Any) -> Any:
        """The batch of a key, on the CPU; it has `to(device)`, `pin()`, `parts(number)`, `counts` and `silent()`."""

    @abstractmethod
    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """(sum of the loss over what `counts` counts, how many of them are right); runs inside autocast."""

    @abstractmethod
    def ids(self, rows: list[int]) -> list[int | str]:
        """The ids of training samples, for the report on a batch whose loss is not finite."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Figures on the validation split, on all ranks; `accuracy` picks the best checkpoint."""

    @abstractmethod
    def scored(self, figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The panels besides the loss: `lines` are {label: a value for each of the `figures` of `evaluate`}."""

    def panels(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The panels of curves.png (see `report/curves.py`) from the rows of metrics.jsonl so far: the loss, and the
        figures of the evaluations, over the samples seen."""
        return over_samples(rows, self.scored, self.unit, self.loss_unit)

    @abstractmethod
    def passes(self) -> list[Pass]:
        """The passes of `finish` in order, after those of one more evaluation, whose label is ""."""

    @abstractmethod
    def try_out(self, one: Pass) -> None:
        """Do what a pass does on a few samples, by which `pace` knows how long it takes."""

    def seconds_to_finish(self, at_most: float) -> float:
        """How long another evaluation and `finish`, itself `at_most` so long, will take at the speed that was measured.

        A kind of pass that has not been measured yet is tried on a few samples first. Called on all ranks.
        """
        passes = self.passes()
        for one in passes:
            if one.kind not in self.pace.seconds:
                self.try_out(one)
        self.pace.left = [one for one in passes if one.label]
        evaluation = [one for one in passes if not one.label]
        return self.pace.needed(evaluation) + min(at_most, self.pace.needed(self.pace.left))

    @abstractmethod
    def finish(self, folder: Path) -> dict[str, Any]:
        """The final figures for summary.json, `accuracy` among them; writes samples.html and other pictures.

        They are done by the time `pace.ends`, if it is set: then of fewer samples, and "cut_short" says of how many.
        """

    @abstractmethod
    def lines(self, summary: dict[str, Any]) -> list[str]:
        """The figures of `finish` that the terminal shows, one a line."""

    def what_next(self, folder: Path) -> list[str]:
        """Lines after those: what to do with the finished run in `folder`."""
        return []

    # ------------------------------------------------------------------------------------------ what it can be asked

    def lacks(self, what: str) -> NoReturn:
        """Raise UserError: this system cannot do what it was asked for."""
        raise UserError(f"{self.folder or self.options.out} is a run of preset {self.options.preset}, which {what}")

    def ask(
        self, image: str | Path, question: str | None, top: int | None = None, decoding: dict[str, Any] | None = None
    ) -> tuple[list[Answer], list[str]]:
        """(answers, best first; notes for the user) about one image file, given as a path.

        One answer if `top` is None, else `top` of them from the system's list. `decoding` holds fields of
        `GenerationOptions`, for a system that `writes`. Raises UserError for an image that cannot be read, for a
        question that is missing or not wanted, and for a `top` that is not possible.
        """
        self.lacks("answers nothing")

    def ask_aloud(
        self, image: str | Path, recording: str | Path, decoding: dict[str, Any] | None = None
    ) -> list[Answer]:
        """The answer to a question that is asked in a sound file. Raises UserError for one that cannot be heard."""
        self.lacks("hears no questions: give --voice-model, what writes them down")

    def answer(
        self, samples: Sequence[VQASample], limit: int | None = None, *, ranked: bool = False, **shown: Any
    ) -> Answers:
        """Answers by question id to about the first `limit` samples, in whole images; to all if `limit` is None.

        `ranked` chooses from the run's own list of answers instead of writing, and gives {} if there is none. `shown`
        as in `Split.batches`: `shuffled` gives every question another image, `progress` labels a progress bar.
        """
        self.lacks("answers no questions")

    def figures(self, answers: Answers) -> dict[str, float]:
        """Figures of a set of answers besides their accuracy, for evaluation.json."""
        return {}

    def recognise(self, data: Path | None, split: str, limit: int | None) -> dict[str, Any]:
        """Figures of what it hears in the first `limit` recordings of a split; without `data` in drawn ones."""
        self.lacks("hears nothing")

    def transcriber(self) -> Any:
        """What `transcribe` listens with: a `vqa_scratch.transcription.Transcriber`."""
        self.lacks("hears nothing")

    def describe(self, data: Path, split: str, limit: int | None) -> dict[str, Any]:
        """Figures of the captions of a split, or of its first `limit` images, with `baselines`."""
        self.lacks("describes no images")

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """(I, P), on the CPU: images as vectors of length 1, close to those of the texts that fit them."""
        self.lacks("has no space that images and texts share")

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(B, P), on the CPU: texts as vectors of length 1. Raises UserError for an empty text."""
        self.lacks("has no space that images and texts share")

    def classify(self, image: Image.Image, labels: Sequence[str], templates: Sequence[str]) -> list[float]:
        """The probability of each label for an image, without having been trained on them.

        A label is put in place of the {} of every template. Raises UserError for labels that are empty or repeat, and
        for a template without {}.
        """
        self.lacks("has no space that images and texts share")

    def texts_and_images(self) -> list[VQASample]:
        """What is sought by default: the captions of the run's own test split, one an image, and their images.

        Raises UserError if the data are no longer where they were.
        """
        self.lacks("has no space that images and texts share")

    def subject(self, image: Image.Image, question: str | None) -> Any:
        """What `study` looks at: the model on one input, as a `vqa_scratch.study.opened.Opened`.

        The question is what `asked` says. Raises UserError if it is missing or not wanted.
        """
        self.lacks("has nothing to study")

    def policy(self, options: Any, dtype: torch.dtype) -> Any:
        """What `rlhf.py --preset vqa` tunes: a `vqa_scratch.rl.tasks.Task`, whose reference model is in `dtype`."""
        self.lacks("cannot be tuned by feedback: it does not write its answers")

    def export(self, folder: Path) -> list[str]:
        """Write the system in the layout of `transformers`; returns a line on each part that does not fit it."""
        self.lacks("cannot be exported")

    # ---------------------------------------------------------------------------------------------------- shared

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model in eval mode, without gradients; afterwards in the mode it was in."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(was_training)


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
