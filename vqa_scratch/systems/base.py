"""The seam between `train.py` with the commands and the systems they serve.

A system is a way to train and use one kind of model. It says so in one `System` at the end of its module, which
`vqa_scratch/systems/__init__.py` lists; nothing else in the programs knows its name. To add one:

1. In `systems/options.py`, derive its options from `RunOptions` (or `QuestionOptions`), with `preset` naming its
   presets, and give each preset its values in `systems/presets.py`. What is no field there is no flag of the system,
   and giving it is an error.
2. Write its `Job`: what `train.py` trains and reports. `prepare` seeds every generator (`seed_everything`) before it
   makes the model, which it leaves on the CPU; `train.py` moves it.
3. Write its `Trained`: a finished run, opened again.
4. `System(name, Config, prepare, open_trained)`, and one entry in the list.

What happens in a run, in this order: `prepare`, the lines of `about`, `save_parts` (not when resuming), `precompute`,
the loop with `epoch`, `share` (where there are several ranks), `batch`, `size`, `ids`, `loss` and `evaluate`, after
every evaluation `panels` as curves.png; at the end the best weights are loaded and `finish` makes the final figures,
`lines` says the most important of them.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.options import choices_of, flag
from vqa_scratch.systems.options import RunOptions
from vqa_scratch.training.distributed import World
from vqa_scratch.training.evaluation import Answer
from vqa_scratch.training.precision import Precision
from vqa_scratch.training.task import Task


class Job(Task, Protocol):
    """A run in the making: a task for the loop (see `training/task.py`), and what it leaves in the run folder."""

    unit: str  # what a sample is, in the plural: "questions", "texts"
    world: World  # the ranks of the run, set by train.py; `evaluate` and `finish` are called on all of them

    def about(self) -> list[str]:
        """Lines for the user before training begins: what trains, what was cut or left out."""

    def save_parts(self, folder: Path) -> None:
        """Everything but the weights that `System.open` needs; config.json through `run.write_run_config`."""

    def precompute(self) -> None:
        """Into files of --cache, what takes the model with its weights in place; the main rank of a machine first."""

    def panels(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The panels of curves.png (see `training/progress.py`) from the rows of metrics.jsonl so far."""

    def finish(self, folder: Path) -> dict[str, Any]:
        """The final figures for summary.json, `accuracy` among them; writes samples.html and other pictures."""

    def lines(self, summary: dict[str, Any]) -> list[str]:
        """The figures of `finish` that the terminal shows, one a line."""


class Trained(Protocol):
    """A finished run, opened again: the best weights in eval mode on `precision.device`."""

    folder: Path
    config: RunOptions
    model: nn.Module
    precision: Precision
    decodes: bool  # whether it writes its answers, so that `ask` takes `decoding`

    def ask(self, image: Path, question: str | None, top: int | None) -> tuple[list[Answer], list[str]]:
        """(answers, the best first; notes for the user) about one image file.

        One answer for `top` None; `top` of them where the system scores a list of answers. A system that `decodes`
        takes `decoding` as well, fields of `GenerationOptions` by name. Raises UserError for an
        image that cannot be read, for a question missing or not wanted, and for a `top` it cannot give.
        """

    def answer(
        self, samples: Sequence[VQASample], limit: int | None, *, shuffled: bool = False, progress: str | None = None
    ) -> dict[int, Answer]:
        """Answers by question id to about the first `limit` samples, in whole images; to all if `limit` is None.

        `shuffled` shows every question another image; `progress` is the label of a bar, if one is wanted. Raises
        UserError if the system answers no questions.
        """

    def figures(self, answers: dict[int, Answer]) -> dict[str, float]:
        """What else can be said of a set of answers beside their accuracy; keys of evaluation.json."""

    def export(self, folder: Path) -> list[str]:
        """Write the system for use elsewhere; returns a line on each thing that the layout had no place for."""


@runtime_checkable
class Describes(Trained, Protocol):
    """A finished run that can describe images too."""

    def describe(self, data: Path, split: str, limit: int | None) -> dict[str, Any]:
        """Figures of the captions of a split, or of about its first `limit` images, `baselines` among them."""


@runtime_checkable
class Ranks(Protocol):
    """A finished run that can also choose an answer from a list of its own. Its `ask` takes a `top`."""

    def ranking(
        self, samples: Sequence[VQASample], limit: int | None, *, progress: str | None = None
    ) -> dict[int, Answer]:
        """The chosen answers by question id, to about the first `limit` samples or to as many as it affords."""


@dataclass(frozen=True)
class System:
    """One way to answer questions about images or to describe them.

    `open(folder, values, config, precision)` gets the content of the run's config.json and its options.
    """

    name: str
    config: type[RunOptions]
    prepare: Callable[[Any, Precision], Job]
    open: Callable[[Path, dict[str, Any], Any, Precision], Trained]

    @property
    def presets(self) -> tuple[str, ...]:
        """The presets that name this system, the default one first."""
        return choices_of(self.config, "preset")


def check_positions(config: RunOptions, names: Sequence[str], limit: int, tower: str) -> None:
    """Raise UserError if a text may have more tokens, the sum of these options, than a released tower has positions."""
    if sum(getattr(config, name) for name in names) > limit:
        flags = " and ".join(f"{flag(name)} {getattr(config, name)}" for name in names)
        verb = "is" if len(names) == 1 else "are"
        raise UserError(f"{flags} {verb} more than the {limit} positions of {tower}")


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, whose states a checkpoint keeps."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
