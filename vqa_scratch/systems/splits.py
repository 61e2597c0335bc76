"""The splits of a data set, and what every system shares that is trained and scored on texts about images."""

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from vqa_scratch.data.answers import Answer, Answers
from vqa_scratch.data.augment import Augment, depends_on_side
from vqa_scratch.data.batches import ImageGroups, prefetch
from vqa_scratch.data.images import Images
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.report.curves import moving_average
from vqa_scratch.systems.base import RO, M, RunData, System
from vqa_scratch.systems.finals import Pace, Pass, what_next
from vqa_scratch.systems.run_options import RunOptions
from vqa_scratch.systems.scoring import Report, other_images, score
from vqa_scratch.training.ranks import World

AT_ONCE = 256  # samples in a batch that is only answered
Q = TypeVar("Q", bound=ImageGroups)
TIMED = 64  # samples by which a kind of pass is timed that has not run yet


class How(NamedTuple):
    """How to answer: by ranking the run's own list, how many answers, fields of `GenerationOptions`."""

    ranked: bool = False
    top: int = 1
    decoding: dict[str, Any] | None = None


@dataclass(frozen=True)
class Split(Generic[Q]):
    """The samples of a split, grouped by image, with their images."""

    questions: Q
    images: Images

    def batches(
        self, device: Any, chosen: Sequence[np.ndarray], *, shuffled: bool = False, progress: str | None = None
    ) -> Iterator[tuple[np.ndarray, Any]]:
        """(rows, their batch on the device), prepared ahead of time, for the rows of each of `chosen`.

        `shuffled` shows every question another image; `progress` is the label of a progress bar, None for no bar.
        """
        swap = other_images(len(self.images.paths)) if shuffled else None
        ready = ((rows, self.questions.batch(rows, self.images, image_map=swap)) for rows in chosen)
        bar = tqdm(prefetch(ready), progress, len(chosen), unit="batch", disable=progress is None, leave=False)
        for rows, batch in bar:
            yield rows, batch.to(device)


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
    def split(self, samples: Sequence[VQASample]) -> Split[Q]:
        """Samples with their ids and images."""

    @abstractmethod
    def respond(self, questions: Q, rows: np.ndarray, batch: Any, how: How) -> list[list[Answer]]:
        """For each of the rows, whose `batch` is on the device: the `how.top` answers, best first.

        Runs inside autocast, without gradients.
        """

    @abstractmethod
    def checked(self, question: str | None) -> str:
        """The question, checked; "" asks for a caption. Raises UserError for one that is missing or not wanted."""

    @abstractmethod
    def at_once(self, name: str) -> int:
        """About how many samples of a split are answered together while training."""

    @abstractmethod
    def passes(self) -> list[Pass]:
        """The passes of `finish` in order, after those of one more evaluation, whose label is ""."""

    @abstractmethod
    def scored(self, figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The panels besides the loss: `lines` are {label: a value for each of the `figures` of `evaluate`}."""

    def make_splits(self, samples: dict[str, list[VQASample]]) -> None:
        """Set `splits`, with resized images in a file if the options ask for it, and what changes training images."""
        self.splits, self.pace = {name: self.split(some) for name, some in samples.items()}, Pace()
        self.augment = augment_of(self.options)
        self.names_side = np.array([depends_on_side(f"{s.question} {s.answer}") for s in samples["train"]])
        if self.options.image_cache:
            for split in self.splits.values():
                split.images.cache_in(self.options.cache)

    def share(self, key: Key, world: World) -> tuple[Key, bool]:
        """This rank's images of a batch; if there are more ranks than images, one image and False."""
        images = self.splits["train"].questions.by_image(key.rows)
        mine = world.share(range(len(images)))
        rows = np.concatenate([images[i] for i in mine or range(1)])
        return Key(rows, key.seed, mine[0] if mine else 0), bool(mine)

    def augmented(self, augment: Augment, batch: Any, key: Key) -> Any:
        """The batch of a key with its images changed as the options ask."""
        number = len(batch.images)
        sides = np.bincount(batch.image_index.numpy(), self.names_side[key.rows], number)
        chance = np.random.default_rng(key.seed).random((key.before + number, 4))[key.before :]
        batch.images = augment(batch.images, torch.from_numpy(sides == 0), torch.from_numpy(chance).float())
        return batch

    def ids(self, rows: list[int]) -> list[int | str]:
        return [self.splits["train"].questions.samples[row].question_id for row in rows]

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

    def what_next(self, folder: Path) -> list[str]:
        return what_next(folder, self.splits["test"].questions.samples[0])

    # --------------------------------------------------------------------------------------------------- answers

    def answers(
        self,
        split: Split[Q],
        chosen: Sequence[np.ndarray],
        *,
        shuffled: bool = False,
        progress: str | None = None,
        until: float | None = None,
        **how: Any,
    ) -> dict[int | str, list[Answer]]:
        """{question_id: answers, best first} to the rows in `chosen`; `how` are fields of `How`.

        After the first batch it stops when another one would not be done `until` a time of `time.perf_counter`.
        """
        result: dict[int | str, list[Answer]] = {}
        began = time.perf_counter()
        with self.evaluating():
            for rows, batch in split.batches(self.precision.device, chosen, shuffled=shuffled, progress=progress):
                with self.precision.autocast():
                    found = self.respond(split.questions, rows, batch, How(**how))
                ids = [split.questions.samples[row].question_id for row in rows]
                result |= zip(ids, found, strict=True)
                now = time.perf_counter()
                if until is not None and now + (now - began) > until:
                    break
                began = now
        return result

    def answer_split(self, name: str, limit: int | None = None, *, progress: str | None = None, **how: Any) -> Answers:
        """The best answer by question id, for a split or about its first `limit` samples; `how` as in `answers`.

        The ranks take turns at the batches, and all of them get all answers. With a label of `progress` it is one of
        the final `passes`, and answers as many samples as its time allows, of any part of the split.
        """
        split = self.splits[name]
        limit = limit or len(split.questions.samples)
        one = Pass(progress or "", name, limit, how.get("ranked", False))
        began, until = time.perf_counter(), self.pace.begin(progress) if progress else None
        batches = split.questions.in_order(limit, self.pace.fitting(one, until, self.at_once(name)))
        one = one._replace(samples=sum(map(len, batches)))
        if until is not None:  # they are sorted by size, and the first ones should be a fair sample
            batches = [batches[i] for i in np.random.default_rng(0).permutation(len(batches))]
        mine = batches[self.world.rank :: self.world.size]
        found = self.world.gather(self.answers(split, mine, progress=progress, until=until, **how))
        best = {number: best for some in found for number, (best, *_) in some.items()}
        self.pace.end(one, began, len(best))
        return best

    def seconds_to_finish(self, at_most: float) -> float:
        passes = self.passes()
        for one in passes:
            if one.kind not in self.pace.seconds:
                self.answer_split(one.split, TIMED, ranked=one.ranked)
        self.pace.left = [one for one in passes if one.label]
        evaluation = [one for one in passes if not one.label]
        return self.pace.needed(evaluation) + min(at_most, self.pace.needed(self.pace.left))

    def report(self, name: str, limit: int | None = None, **how: Any) -> Report:
        """Score the answers of `answer_split`, the same on all ranks."""
        return score(self.splits[name].questions.samples, self.answer_split(name, limit, **how), self.data.family)

    def answer(
        self, samples: Sequence[VQASample], limit: int | None = None, *, ranked: bool = False, **shown: Any
    ) -> Answers:
        """As `answer_split`, for any samples, on this process alone."""
        split = self.split(samples)
        found = self.answers(split, split.questions.in_order(limit or len(samples), AT_ONCE), ranked=ranked, **shown)
        return {number: best for number, (best, *_) in found.items()}

    def ask(
        self, image: str | Path, question: str | None, top: int | None = None, decoding: dict[str, Any] | None = None
    ) -> tuple[list[Answer], list[str]]:
        question = self.checked(question)
        how: dict[str, Any] = {"decoding": decoding} if top is None else {"ranked": True, "top": top}
        split = self.split([VQASample(0, Path(image), 0, question, "", "", (), "")])
        return self.answers(split, [np.array([0])], **how)[0], self.tokenizers.notes_on(question)
