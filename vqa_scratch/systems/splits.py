"""The splits of a data set, and what every system shares that trains on texts about images."""

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from vqa_scratch.data.augment import Augment, depends_on_side
from vqa_scratch.data.batches import ImageGroups, prefetch
from vqa_scratch.data.images import Images
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.report.curves import moving_average
from vqa_scratch.systems.base import RO, M, RunData, System
from vqa_scratch.systems.finals import Pace, Pass
from vqa_scratch.systems.run_options import RunOptions
from vqa_scratch.systems.scoring import other_images
from vqa_scratch.training.ranks import World

Q = TypeVar("Q", bound=ImageGroups)
TIMED = 64  # samples by which a kind of pass is timed that has not run yet


@dataclass(frozen=True)
class Split(Generic[Q]):
    """The samples of a split, grouped by image, with their images."""

    questions: Q
    images: Images

    def batches(
        self,
        device: Any,
        chosen: Sequence[np.ndarray],
        *,
        shuffled: bool = False,
        progress: str | None = None,
        until: float | None = None,
    ) -> Iterator[tuple[np.ndarray, Any]]:
        """(rows, their batch on the device), prepared ahead of time, for the rows of each of `chosen`.

        `shuffled` shows every question another image; `progress` is the label of a progress bar, None for no bar. After
        the first batch it stops when another one would not be done `until` a time of `time.perf_counter`.
        """
        swap = other_images(len(self.images.paths)) if shuffled else None
        ready = ((rows, self.questions.batch(rows, self.images, image_map=swap)) for rows in chosen)
        bar = tqdm(prefetch(ready), progress, len(chosen), unit="batch", disable=progress is None, leave=False)
        began = time.perf_counter()
        for rows, batch in bar:
            yield rows, batch.to(device)
            now = time.perf_counter()
            if until is not None and now + (now - began) > until:
                break
            began = now


class Key(NamedTuple):
    """A batch or a rank's share of it: its rows, the seed of its augmentation, how many of its images come before."""

    rows: np.ndarray
    seed: tuple[int, ...]
    before: int = 0


def augment_of(options: RunOptions) -> Augment | None:
    """The augmentation that the options ask for, if any."""
    strengths = (options.flip, options.rotate, options.brightness, options.contrast)
    return Augment(*strengths) if any(strengths) else None


class SplitSystem(System[RO, M], Generic[RO, M, Q]):
    """A system whose samples are texts about images. While it trains, `splits` holds its `data`, by name."""

    loss_unit = "nats a token"  # of the training loss, for the curve's axis
    data: RunData
    splits: dict[str, Split[Q]]

    @abstractmethod
    def grouped(self, samples: Sequence[VQASample]) -> Q:
        """Samples as ids, grouped by image."""

    def split(self, samples: Sequence[VQASample]) -> Split[Q]:
        """Samples with their images."""
        questions = self.grouped(samples)
        return Split(questions, Images(questions.image_paths, self.processor, upright=questions.upright))

    @abstractmethod
    def scored(self, figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The panels besides the loss: `lines` are {label: a value for each of the `figures` of `evaluate`}."""

    def make_splits(self, samples: dict[str, list[VQASample]]) -> None:
        """Set `splits`, with resized images in a file if the options ask for it, and what changes training images."""
        self.splits, self.pace = {name: self.split(some) for name, some in samples.items()}, Pace()
        self.augment = augment_of(self.options)
        if self.options.image_cache:
            for split in self.splits.values():
                split.images.cache_in(self.options.cache)

    @cached_property
    def names_side(self) -> np.ndarray:
        """Whether each training text names a side, so that its image may not be mirrored."""
        texts = self.splits["train"].questions.samples
        return np.array([depends_on_side(f"{s.question} {s.answer}") for s in texts])

    def share(self, key: Key, world: World) -> tuple[Key, bool]:
        """This rank's images of a batch; if there are more ranks than images, one image and False."""
        images = self.splits["train"].questions.by_image(key.rows)
        mine = world.share(range(len(images)))
        rows = np.concatenate([images[i] for i in mine or range(1)])
        return Key(rows, key.seed, mine[0] if mine else 0), bool(mine)

    def batch(self, key: Key) -> Any:
        """The batch of a key, with its images changed as the options ask."""
        train = self.splits["train"]
        batch = train.questions.batch(key.rows, train.images)
        if self.augment is not None:
            number = len(batch.images)
            sides = np.bincount(batch.image_index.numpy(), self.names_side[key.rows], number)
            chance = np.random.default_rng(key.seed).random((key.before + number, 4))[key.before :]
            batch.images = self.augment(batch.images, torch.from_numpy(sides == 0), torch.from_numpy(chance).float())
        return batch

    def ids(self, rows: list[int]) -> list[int | str]:
        return [self.splits["train"].questions.samples[row].question_id for row in rows]

    @abstractmethod
    def passes(self) -> list[Pass]:
        """The passes of `finish` in order, after those of one more evaluation, whose label is ""."""

    @abstractmethod
    def try_out(self, one: Pass) -> None:
        """Do what a pass does on `TIMED` samples, by which `pace` knows how long it takes."""

    def seconds_to_finish(self, at_most: float) -> float:
        passes = self.passes()
        for one in passes:
            if one.kind not in self.pace.seconds:
                self.try_out(one)
        self.pace.left = [one for one in passes if one.label]
        evaluation = [one for one in passes if not one.label]
        return self.pace.needed(evaluation) + min(at_most, self.pace.needed(self.pace.left))

    def panels(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The loss, and the figures of the evaluations, over the samples seen."""
        steps, evaluations = [row for row in rows if "loss" in row], [row for row in rows if "val" in row]
        figures, seen = [row["val"] for row in evaluations], [row["samples"] / 1000 for row in evaluations]
        trained = moving_average([row["loss"] for row in steps], 5)
        losses = {"training": ([row["samples"] / 1000 for row in steps], trained)}
        if any("loss" in row for row in figures):
            losses["validation"] = (seen, [row["loss"] for row in figures])
        panels = [{"title": "loss", "ylabel": self.loss_unit, "lines": losses, "log": True}]
        for panel in self.scored(figures):
            lines = {label: (seen, values) for label, values in panel["lines"].items()}
            panels.append({**panel, "lines": lines, "ylim": (0, 1.02)})
        return [{**panel, "xlabel": f"thousand {self.unit} seen"} for panel in panels]
