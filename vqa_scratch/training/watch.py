"""Ends a run early, on a signal or a loss that is not finite, on all ranks at the same step."""

import math
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from vqa_scratch.errors import UserError
from vqa_scratch.storage import write_json
from vqa_scratch.training.ranks import World

STOPS = (signal.SIGINT, signal.SIGTERM)


class GracefulStop:
    """A context in which the first SIGINT or SIGTERM asks to save and stop; a second one ends the program."""

    signal: int | None = None

    def __enter__(self) -> "GracefulStop":
        self._previous = {int(number): signal.signal(number, self._note) for number in STOPS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, self._previous[number])

    def votes(self) -> list[int]:
        """For each of STOPS, whether this process got it; ranks add up their votes."""
        return [int(self.signal == number) for number in STOPS]

    @staticmethod
    def elected(votes: list[float]) -> int | None:
        """The signal that any rank got, from the sum of their votes."""
        return next((int(number) for number, count in zip(STOPS, votes, strict=True) if count), None)


class NotFinite(UserError):
    """The loss or its gradient became NaN or infinite."""


class LossWatch:
    """Collects losses and gradient norms on the device and checks many at once: each check waits for the GPU.

    The values are those of all ranks, so all ranks raise together. `ids` gives the sample ids of a batch's `rows`.
    """

    def __init__(self, folder: Path, world: World, ids: Callable[[list[int]], list[int | str]]) -> None:
        self.folder, self.world, self.ids = folder, world, ids
        self.pending: list[tuple[str, int, Tensor, Tensor]] = []

    def add(self, step: int, rows: Tensor, loss: Tensor, norm: Tensor | None) -> None:
        """The loss of a step and the norm of its gradient (None: not checked)."""
        self.pending.append(("loss", step, rows, loss.detach()))
        if norm is not None:
            self.pending.append(("gradient", step, rows, norm.detach()))

    def look(self) -> None:
        """Raise NotFinite for the first value that is not finite, after writing the ids of its samples to a file."""
        if not self.pending:
            return
        values = torch.stack([value for *_, value in self.pending]).tolist()
        for (what, step, rows, _), value in zip(self.pending, values, strict=True):
            if not math.isfinite(value):
                path = self.folder / "bad_batch.json"
                ids = [i for of_rank in self.world.gather(self.ids(rows.tolist())) for i in of_rank]
                if self.world.main:
                    write_json(path, {"step": step, what: str(value), "ids": ids})
                last = self.folder / "checkpoints" / "last.pt"
                again = "the last good checkpoint is kept; go on from it with --resume and a lower --learning-rate"
                if not last.exists():
                    again = "there was no checkpoint yet; begin again with a lower --learning-rate"
                raise NotFinite(f"the {what} of step {step} is {value}; its samples are listed in {path}; {again}")
        self.pending.clear()
