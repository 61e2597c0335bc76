"""Scoring answers officially, and the blind baselines that a system must beat."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vqa_scratch.data.answers import Answers
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.metrics import accuracy_by, rule


def common_answers(samples: Sequence[VQASample], limit: int | None = None) -> list[str]:
    """The annotators' majority answers, the most frequent first, ties in alphabetical order."""
    counts = Counter(sample.answer for sample in samples)
    return sorted(counts, key=lambda answer: (-counts[answer], answer))[:limit]


def other_images(count: int) -> np.ndarray:
    """A permutation of `count` images that leaves none in its place (unless there is only one)."""
    return np.roll(np.arange(count), count // 2 if count > 1 else 0)


class TypePrior:
    """Answers with the most common training answer of the question's type; of all types if the type is new."""

    def __init__(self, samples: Sequence[VQASample]) -> None:
        by_type: dict[str, Counter[str]] = defaultdict(Counter)
        for sample in samples:
            by_type[sample.question_type][sample.answer] += 1
        self.best = {kind: counts.most_common(1)[0][0] for kind, counts in by_type.items()}
        self.fallback = sum(by_type.values(), Counter()).most_common(1)[0][0]

    def __call__(self, sample: VQASample) -> str:
        return self.best.get(sample.question_type, self.fallback)


class QuestionOnly:
    """Answers from the question's words alone: the most common training answer of its longest known beginning.

    A beginning is known if at least `support` training questions start with it. On template questions no blind model
    can do better; on free questions it is a strong baseline.
    """

    def __init__(self, samples: Sequence[VQASample], support: int = 5) -> None:
        self.support = support
        self.beginnings: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        for sample in samples:
            words = self._words(sample.question)
            for length in range(len(words) + 1):
                self.beginnings[words[:length]][sample.answer] += 1

    @staticmethod
    def _words(question: str) -> tuple[str, ...]:
        return (*question.lower().replace("?", " ").split(), "?")

    def __call__(self, sample: VQASample) -> str:
        words = self._words(sample.question)
        for length in range(len(words), -1, -1):
            counts = self.beginnings.get(words[:length])
            if counts is not None and (counts.total() >= self.support or length == 0):
                return counts.most_common(1)[0][0]
        raise AssertionError("the empty beginning is always known")


@dataclass(frozen=True)
class Report:
    """Accuracy of one split by the rule for its number of answers, and the answers behind it."""

    accuracy: float
    lenient: float  # both sides always normalised
    by_family: dict[str, float]
    answers: Answers


def score(
    samples: Sequence[VQASample], answers: Answers, family: str | Callable[[VQASample], str] = "answer_type"
) -> Report:
    """Official accuracy, overall and by family, over the samples that have an answer."""
    scored = [s for s in samples if s.question_id in answers]
    texts = {i: a.text for i, a in answers.items()}
    result = accuracy_by(scored, texts, family)
    by_family = {name: group.accuracy for name, group in sorted(result.groups.items())}
    lenient = accuracy_by(scored, texts, lenient=True).overall.accuracy
    return Report(result.overall.accuracy, lenient, by_family, answers)


def rules_of(samples: Sequence[VQASample]) -> str:
    """The rules by which the samples are scored; it depends on how many answers a question has."""
    return "; ".join(sorted({rule(len(sample.answers)) for sample in samples}))


def blind(samples: Sequence[VQASample], predictor: Callable[[VQASample], str]) -> float:
    """Official accuracy of a predictor that sees only the question."""
    return accuracy_by(samples, {s.question_id: predictor(s) for s in samples}).overall.accuracy


def blind_baselines(samples: Sequence[VQASample], train: Sequence[VQASample]) -> dict[str, float]:
    """Official accuracy of the two predictors that see only the question, learned from `train`."""
    return {"prior": blind(samples, TypePrior(train)), "question_only": blind(samples, QuestionOnly(train))}
