"""The splits of a data set, and what every system shares that is trained and scored on texts about images."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from vqa_scratch.data.answers import Answer
from vqa_scratch.data.batches import ImageGroups, prefetch
from vqa_scratch.data.images import Images
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.systems.base import System
from vqa_scratch.systems.scoring import other_images

AT_ONCE = 256  # samples in a batch that is only answered


@dataclass(frozen=True)
class Split:
    """The samples of a split, grouped by image, with their images."""

    questions: ImageGroups
    images: Images

    def batches(
        self, system: System, chosen: Sequence[np.ndarray], *, shuffled: bool = False, progress: str | None = None
    ) -> Iterator[tuple[np.ndarray, Any]]:
        """(rows, their batch on the device), prepared ahead of time, for the rows of each of `chosen`.

        `shuffled` shows every question another image; `progress` is the label of a progress bar, None for no bar.
        """
        swap = other_images(len(self.images.paths)) if shuffled else None
        ready = ((rows, self.questions.batch(rows, self.images, image_map=swap)) for rows in chosen)
        bar = tqdm(prefetch(ready), progress, len(chosen), unit="batch", disable=progress is None, leave=False)
        for rows, batch in bar:
            yield rows, batch.to(system.precision.device)


class SplitSystem(System):
    """A system whose samples are texts about images. While it trains, `splits` holds its data, by name."""

    splits: dict[str, Split]

    @abstractmethod
    def split(self, samples: Sequence[VQASample]) -> Split:
        """Samples with their ids and images."""

    @abstractmethod
    def answers(
        self,
        split: Split,
        chosen: Sequence[np.ndarray],
        *,
        ranked: bool = False,
        top: int = 1,
        decoding: dict[str, Any] | None = None,
        **shown: Any,
    ) -> dict[int, list[Answer]]:
        """{question_id: the `top` answers, best first} to the rows in `chosen`.

        `ranked` and `decoding` as in `System.answer` and `System.ask`, `shown` as in `Split.batches`.
        """

    def make_splits(self, samples: dict[str, list[VQASample]]) -> None:
        """Set `splits`, with the resized images in a file if the options ask for one."""
        self.splits = {name: self.split(some) for name, some in samples.items()}
        if self.options.image_cache:
            for split in self.splits.values():
                split.images.cache_in(self.options.cache)

    def ids(self, rows: list[int]) -> list[int]:
        return [self.splits["train"].questions.samples[row].question_id for row in rows]

    def answer_split(self, name: str, limit: int | None, at_once: int, **how: Any) -> dict[int, Answer]:
        """The best answer by question id, for a split or about its first `limit` samples; `how` as in `answers`.

        The ranks take turns at the batches of about `at_once` samples, and all of them get all answers.
        """
        split = self.splits[name]
        batches = split.questions.in_order(limit or len(split.questions.samples), at_once)
        found = self.world.gather(self.answers(split, batches[self.world.rank :: self.world.size], **how))
        return {number: best for some in found for number, (best, *_) in some.items()}

    def answer_samples(self, samples: Sequence[VQASample], limit: int | None = None, **how: Any) -> dict[int, Answer]:
        """The same for any samples, on this process alone."""
        split = self.split(samples)
        found = self.answers(split, split.questions.in_order(limit or len(samples), AT_ONCE), **how)
        return {number: best for number, (best, *_) in found.items()}
