"""Answers to the questions about the images of a split: within the time, in turns of the ranks, scored."""

import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple

import numpy as np

from vqa_scratch.data.answers import Answer, Answers
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.systems.base import M
from vqa_scratch.systems.finals import Pass, what_next
from vqa_scratch.systems.scoring import Report, score
from vqa_scratch.systems.splits import IO, TIMED, Q, Split, SplitSystem

AT_ONCE = 256  # samples in a batch that is only answered


class How(NamedTuple):
    """How to answer: by ranking the run's own list, how many answers, fields of `GenerationOptions`."""

    ranked: bool = False
    top: int = 1
    decoding: dict[str, Any] | None = None


class AnsweringSystem(SplitSystem[IO, M, Q], Generic[IO, M, Q]):
    """A system that says something about an image: the answer to a question, or a caption."""

    @abstractmethod
    def respond(self, questions: Q, rows: np.ndarray, batch: Any, how: How) -> list[list[Answer]]:
        """For each of the rows, whose `batch` is on the device: the `how.top` answers, best first.

        Runs inside autocast, without gradients.
        """

    @abstractmethod
    def checked(self, question: str | None) -> str:
        """The question, checked; "" asks for a caption. Raises UserError for one that is missing or not wanted."""

    @property
    def ranked_questions(self) -> int:
        """How many are ranked for the figures; 0: there is no list of answers to rank."""
        return 0

    @abstractmethod
    def at_once(self, name: str) -> int:
        """About how many samples of a split are answered together while training."""

    def what_next(self, folder: Path) -> list[str]:
        return what_next(folder, self.splits["test"].questions.samples[0])

    # --------------------------------------------------------------------------------------------------- answers

    def answers(
        self, split: Split[Q], chosen: Sequence[np.ndarray], how: How, **shown: Any
    ) -> dict[int | str, list[Answer]]:
        """{question_id: answers, best first} to the rows in `chosen`; `shown` as in `Split.batches`."""
        result: dict[int | str, list[Answer]] = {}
        with self.evaluating():
            for rows, batch in split.batches(self.precision.device, chosen, **shown):
                with self.precision.autocast():
                    found = self.respond(split.questions, rows, batch, how)
                ids = [split.questions.samples[row].question_id for row in rows]
                result |= zip(ids, found, strict=True)
        return result

    def answer_split(
        self, name: str, limit: int | None = None, *, ranked: bool = False, progress: str | None = None, **shown: Any
    ) -> Answers:
        """The best answer by question id, for a split or about its first `limit` samples; the rest as in `answer`.

        The ranks take turns at the batches, and all of them get all answers. With a label of `progress` it is one of
        the final `passes`, and answers as many samples as its time allows, of any part of the split.
        """
        split = self.splits[name]
        limit = limit or len(split.questions.samples)
        one = Pass(progress or "", name, limit, ranked)
        began, until = time.perf_counter(), self.pace.begin(progress) if progress else None
        batches = split.questions.in_order(limit, self.pace.fitting(one, until, self.at_once(name)))
        one = one._replace(samples=sum(map(len, batches)))
        if until is not None:  # they are sorted by size, and the first ones should be a fair sample
            batches = [batches[i] for i in np.random.default_rng(0).permutation(len(batches))]
        mine = batches[self.world.rank :: self.world.size]
        found = self.world.gather(self.answers(split, mine, How(ranked), progress=progress, until=until, **shown))
        best = {number: best for some in found for number, (best, *_) in some.items()}
        self.pace.end(one, began, len(best))
        return best

    def try_out(self, one: Pass) -> None:
        self.answer_split(one.split, TIMED, ranked=one.ranked)

    def report(self, name: str, limit: int | None = None, **how: Any) -> Report:
        """Score the answers of `answer_split`, the same on all ranks."""
        return score(self.splits[name].questions.samples, self.answer_split(name, limit, **how), self.data.family)

    def answer(
        self, samples: Sequence[VQASample], limit: int | None = None, *, ranked: bool = False, **shown: Any
    ) -> Answers:
        """As `answer_split`, for any samples, on this process alone."""
        split, most = self.split(samples), limit or len(samples)
        if ranked and not (most := min(most, self.ranked_questions)):
            return {}
        found = self.answers(split, split.questions.in_order(most, AT_ONCE), How(ranked), **shown)
        return {number: best for number, (best, *_) in found.items()}

    def ask(
        self, image: str | Path, question: str | None, top: int | None = None, decoding: dict[str, Any] | None = None
    ) -> tuple[list[Answer], list[str]]:
        question = self.checked(question)
        how = How(decoding=decoding) if top is None else How(ranked=True, top=top)
        split = self.split([VQASample(0, Path(image), 0, question, "", "", (), "")])
        return self.answers(split, [np.array([0])], how)[0], self.tokenizers.notes_on(question)
