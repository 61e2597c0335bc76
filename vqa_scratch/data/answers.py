"""The answers that a classifier chooses from, and the score of each for a question.

The list: the majority answers of at least nine questions, normalised by the official rules and without commas, which
gives 3,129 on the train and val splits of VQA v2 (Teney et al. 2018, "Tips and Tricks for Visual Question Answering",
CVPR; the public code of hengyuan-hu/bottom-up-attention-vqa). The targets: 0, .3, .6, .9 or 1 by how many of the ten
annotators gave an answer. Answers and labels are compared by the same normalisation, so that "Yes", "two" and "the dog"
teach "yes", "2" and "dog" (that code compares the annotators' own spelling).

Shapes: B questions, L answers in the list.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Self

import numpy as np

from vqa_scratch.data.batches import Ragged
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.metrics import normalize_answer, soft_targets


@dataclass(frozen=True)
class Answer:
    """A system's answer. `probability` is the product over its tokens, EOS included, or that of the classifier.

    Raises UserError if that is no number.
    """

    text: str
    probability: float
    tokens: int = 0  # EOS included; 0 of an answer chosen from a list
    ended: bool = True  # by EOS, not by the limit on tokens

    def __post_init__(self) -> None:
        if not math.isfinite(self.probability):
            raise UserError(
                f"the model gives its answer the probability {self.probability}: its weights are damaged, or too large "
                "for --precision fp16"
            )


Answers = dict[int | str, Answer]  # by question id


@cache
def plain(answer: str) -> str:
    """An answer as the list has it: by the official normalisation, and without commas."""
    return normalize_answer(answer).replace(",", "")


@dataclass(frozen=True)
class AnswerList:
    """The answers in the order of a classifier's logits."""

    labels: tuple[str, ...]

    @classmethod
    def from_samples(cls, samples: Iterable[VQASample], least: int = 9) -> Self:
        """Every answer that the majority gives to at least `least` questions, sorted. UserError if there is none."""
        counts = Counter(plain(sample.answer) for sample in samples)
        del counts[""]  # "the", normalised
        labels = tuple(sorted(answer for answer, count in counts.items() if count >= least))
        if not labels:
            often = counts.most_common(1)[0][1] if counts else 0
            raise UserError(
                f"no answer is the majority's to {least} questions, the most frequent one is to {often}: give more "
                "questions or a lower --min-answer-count"
            )
        return cls(labels)

    @cached_property
    def index(self) -> dict[str, int]:
        """{normalised label: its place}, the first of labels that are the same."""
        return {plain(label): i for i, label in reversed(list(enumerate(self.labels)))}

    def known(self, sample: VQASample) -> dict[int, float]:
        """{index of a label: its score} for the annotators' answers that are in the list; {} without annotators."""
        if not sample.answers:
            return {}
        scores = soft_targets([plain(answer) for answer in sample.answers])
        return {self.index[a]: score for a, score in scores.items() if a in self.index}

    def answerable(self, samples: Sequence[VQASample]) -> list[VQASample]:
        """The samples with an annotator's answer that is in the list.

        Raises UserError if there is none, or if a sample has no annotators' answers.
        """
        for sample in samples:
            if not sample.answers:
                raise UserError(f"question {sample.question_id} has no annotators' answers to learn from")
        kept = [sample for sample in samples if self.known(sample)]
        if not kept:
            raise UserError(
                f"none of the {len(samples):,} questions has an answer among the {len(self.labels):,} of the "
                f"classifier, which begin with {', '.join(map(repr, self.labels[:3]))}"
            )
        return kept


class SoftTargets:
    """The scores of many samples, kept sparse: a question has a handful of thousands of answers."""

    def __init__(self, samples: Sequence[VQASample], answers: AnswerList) -> None:
        known = [answers.known(sample) for sample in samples]
        self.width = len(answers.labels)
        self.ids = Ragged([list(row) for row in known])
        self.scores = np.fromiter((score for row in known for score in row.values()), dtype=np.float32)

    def mean(self) -> np.ndarray:
        """(L,) float32: the mean score of each label over all samples."""
        total = np.bincount(self.ids.flat, weights=self.scores, minlength=self.width)
        return (total / len(self.ids.lengths)).astype(np.float32)

    def dense(self, rows: np.ndarray) -> np.ndarray:
        """(B, L) float32 of the chosen rows."""
        targets = np.zeros((len(rows), self.width), dtype=np.float32)
        places, inside = self.ids.places(rows)
        targets[inside.nonzero()[0], self.ids.flat[places]] = self.scores[places]
        return targets
