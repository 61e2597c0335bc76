"""The splits of a data set, and what every system shares that trains on texts about images."""

import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from vqa_scratch.data.augment import Augment, depends_on_side
from vqa_scratch.data.batches import ImageGroups, prefetch
from vqa_scratch.data.images import ImageProcessor, Images
from vqa_scratch.data.tokenizers import Tokenizers
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.systems.base import M, RunData, System
from vqa_scratch.systems.finals import Pace
from vqa_scratch.systems.run_options import ImageOptions
from vqa_scratch.systems.scoring import other_images
from vqa_scratch.training.progress import Redrawn
from vqa_scratch.training.ranks import World

IO = TypeVar("IO", bound=ImageOptions)
Q = TypeVar("Q", bound=ImageGroups)
TIMED = 64  # samples by which a kind of pass is timed that has not run yet
# A sample to build a model for, where only the options count.
ANY_SAMPLE = VQASample(0, Path("any.png"), 0, System.example, "", "", ("red",), "red")


def in_time(
    ready: Iterable[tuple[np.ndarray, Any]],
    number: int,
    device: Any,
    *,
    progress: str | None = None,
    until: float | None = None,
) -> Iterator[tuple[np.ndarray, Any]]:
    """The `number` pairs of rows and their batch, with a batch on the device, prepared ahead of time.

    `progress` is the label of a progress bar, None for no bar. After the first batch it stops when another one would
    not be done `until` a time of `time.perf_counter`.
    """
    bar = tqdm(prefetch(ready), progress, number, unit="batch", disable=progress is None, leave=False)
    began = time.perf_counter()
    with nullcontext() if progress is None else Redrawn(bar.refresh):  # a batch may take seconds
        for rows, batch in bar:
            yield rows, batch.to(device)
            now = time.perf_counter()
            if until is not None and now + (now - began) > until:
                break
            began = now


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
        """(rows, their batch on the device) for the rows of each of `chosen`; `shuffled` shows every question another
        image, `progress` and `until` as in `in_time`."""
        swap = other_images(len(self.images.paths)) if shuffled else None
        ready = ((rows, self.questions.batch(rows, self.images, image_map=swap)) for rows in chosen)
        return in_time(ready, len(chosen), device, progress=progress, until=until)


class Key(NamedTuple):
    """A batch or a rank's share of it: its rows, the seed of its augmentation, how many of its images and how many
    batches come before."""

    rows: np.ndarray
    seed: tuple[int, ...]
    before: int = 0
    step: int = 0


def augment_of(options: ImageOptions) -> Augment | None:
    """The augmentation that the options ask for, if any."""
    strengths = (options.flip, options.rotate, options.brightness, options.contrast)
    return Augment(*strengths) if any(strengths) else None


class SplitSystem(System[IO, M], Generic[IO, M, Q]):
    """A system whose samples are texts about images. While it trains, `splits` holds its `data`, by name."""

    data: RunData
    splits: dict[str, Split[Q]]

    def __init__(
        self, options: IO, model: M, tokenizers: Tokenizers, processor: ImageProcessor, *more: Any, **named: Any
    ) -> None:
        super().__init__(options, model, tokenizers, *more, **named)
        self.processor = processor

    def save(self, folder: Path) -> None:
        """With the preprocessing of its images."""
        super().save(folder)
        self.processor.save_pretrained(folder)

    @abstractmethod
    def grouped(self, samples: Sequence[VQASample]) -> Q:
        """Samples as ids, grouped by image."""

    def split(self, samples: Sequence[VQASample]) -> Split[Q]:
        """Samples with their images."""
        questions = self.grouped(samples)
        return Split(questions, Images(questions.image_paths, self.processor, upright=questions.upright))

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
        return key._replace(rows=rows, before=mine[0] if mine else 0), bool(mine)

    def augmented(self, augment: Augment, batch: Any, key: Key) -> Any:
        """The batch of a key with its images changed as the options ask."""
        number = len(batch.images)
        sides = np.bincount(batch.image_index.numpy(), self.names_side[key.rows], number)
        chance = np.random.default_rng(key.seed).random((key.before + number, 4))[key.before :]
        batch.images = augment(batch.images, torch.from_numpy(sides == 0), torch.from_numpy(chance).float())
        return batch

    def ids(self, rows: list[int]) -> list[int | str]:
        return [self.splits["train"].questions.samples[row].question_id for row in rows]
