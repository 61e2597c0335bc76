"""Answering many questions, scoring them officially, and the three blind baselines they must beat.

Shapes: I images, B questions, A answer tokens.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vqa_scratch.data.batches import Encoder, Images, Questions, prefetch
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.generate import Decoder, GenerationOptions, generate, rank
from vqa_scratch.metrics import accuracy_by
from vqa_scratch.models.reader import Reader
from vqa_scratch.nn.memory import Memory
from vqa_scratch.training.precision import Precision

AT_ONCE = 256  # samples in a batch that is only answered


@dataclass(frozen=True)
class Answer:
    """`probability` is the product of the probabilities of its tokens, EOS included; of an answer that was chosen from
    a list, what the classifier gives it."""

    text: str
    probability: float
    tokens: int = 0  # EOS included; 0 of an answer chosen from a list
    ended: bool = True  # by EOS, not by the limit on tokens


Asked = Callable[[np.ndarray, Tensor, Tensor, list[Memory]], None]  # rows, prompt (B, P), its mask, memory


@torch.no_grad()
def _ask(
    model: Reader,
    questions: Questions,
    images: Images,
    precision: Precision,
    batches: Sequence[np.ndarray],
    image_map: np.ndarray | None,
    progress: str | None,
    work: Asked,
) -> None:
    """Call `work` for each of the batches, with all that the decoder reads; arguments as in `answer_questions`."""
    was_training = model.training
    model.eval()

    def ready() -> Any:
        for rows in batches:
            yield rows, questions.batch(rows, images, image_map=image_map), questions.prompt_batch(rows)

    try:
        for rows, batch, (prompt, prompt_mask) in tqdm(
            prefetch(ready()), progress, len(batches), unit="batch", disable=progress is None, leave=False
        ):
            batch = batch.to(precision.device)
            with precision.autocast():
                memory = model.memory(images.inputs(batch.pixels), **batch.reading)
                work(rows, prompt.to(precision.device), prompt_mask.to(precision.device), memory)
    finally:
        model.train(was_training)


def check_room(decoder: Decoder, prompt: int, new_tokens: int) -> None:
    """Raise UserError if a prompt of so many tokens leaves fewer positions than so many new ones take."""
    positions = decoder.max_positions
    if positions is not None and prompt + new_tokens - 1 > positions:
        raise UserError(
            f"max_new_tokens {new_tokens} is too much: the decoder has {positions} positions, which leaves "
            f"{positions - prompt + 1} behind a prompt of {prompt}"
        )


def answer_questions(
    model: Reader,
    questions: Questions,
    images: Images,
    precision: Precision,
    batches: Sequence[np.ndarray],
    *,
    image_map: np.ndarray | None = None,
    progress: str | None = None,
    decoding: Mapping[str, Any] | None = None,
) -> dict[int, Answer]:
    """{question_id: Answer} for the rows in `batches`; each image is encoded once.

    `image_map[i]` says which image is shown instead of image i; `progress` is the label of a bar, if one is wanted;
    `decoding` are fields of `GenerationOptions`, beside the limit and the end token; without it decoding is greedy.
    The model is left in the mode it came in. Raises UserError on options that contradict each other, and on more tokens
    than the decoder has positions.
    """
    encoder, result = questions.encoder, {}
    limits = {"max_new_tokens": encoder.max_answer_tokens, "eos_id": questions.eos_id}
    options = GenerationOptions(**limits | dict(decoding or {}))
    check_room(model.decoder, int(questions.prompts.lengths.max()) + 1, options.max_new_tokens)

    def work(rows: np.ndarray, prompt: Tensor, prompt_mask: Tensor, memory: list[Memory]) -> None:
        made = generate(model.decoder, prompt, prompt_mask, memory, options=options)
        totals = made.log_probs.sum(1).exp().tolist()
        for row, ids, length, probability in zip(rows, made.ids.tolist(), made.lengths.tolist(), totals, strict=True):
            text = encoder.decoder.decode(ids[:length]).strip()
            ended = ids[length - 1] == questions.eos_id
            result[questions.samples[row].question_id] = Answer(text, probability, length, ended)

    _ask(model, questions, images, precision, batches, image_map, progress, work)
    return result


def common_answers(samples: Sequence[VQASample], limit: int | None = None) -> list[str]:
    """The annotators' majority answers, the most frequent first, equally frequent ones in the order of the alphabet."""
    counts = Counter(sample.answer for sample in samples)
    return sorted(counts, key=lambda answer: (-counts[answer], answer))[:limit]


def rank_answers(
    model: Reader,
    questions: Questions,
    images: Images,
    precision: Precision,
    batches: Sequence[np.ndarray],
    candidates: Sequence[str],
    *,
    top: int = 1,
    image_map: np.ndarray | None = None,
    progress: str | None = None,
) -> dict[int, list[Answer]]:
    """{question_id: the `top` best of the candidates, by log-probability} for the rows in `batches`.

    The probability is that of writing the answer and then ending. Other arguments as in `answer_questions`.
    Raises ValueError without candidates.
    """
    encoder, result = questions.encoder, {}
    ids = [encoder.answer(candidate)[1:] for candidate in candidates]  # without the token that starts an answer

    def work(rows: np.ndarray, prompt: Tensor, prompt_mask: Tensor, memory: list[Memory]) -> None:
        best = rank(model.decoder, prompt, prompt_mask, memory, ids).topk(min(top, len(ids)))
        for row, places, scores in zip(rows, best.indices.tolist(), best.values.exp().tolist(), strict=True):
            result[questions.samples[row].question_id] = [
                Answer(candidates[i], score, len(ids[i]), True) for i, score in zip(places, scores, strict=True)
            ]

    _ask(model, questions, images, precision, batches, image_map, progress, work)
    return result


def answer_samples(
    model: Reader,
    samples: Sequence[VQASample],
    encoder: Encoder,
    processor: ImageProcessor,
    precision: Precision,
    *,
    limit: int | None = None,
    shuffled: bool = False,
    progress: str | None = None,
    decoding: Mapping[str, Any] | None = None,
) -> dict[int, Answer]:
    """`answer_questions` for about the first `limit` samples, in whole images; for all if `limit` is None.

    `shuffled` shows every question another image.
    """
    questions = Questions(samples, encoder)
    images = Images(questions.image_paths, processor)
    batches = questions.in_order(limit or len(samples), AT_ONCE)
    swap = other_images(len(images.paths)) if shuffled else None
    options = {"image_map": swap, "progress": progress, "decoding": decoding}
    return answer_questions(model, questions, images, precision, batches, **options)


def other_images(count: int) -> np.ndarray:
    """A permutation of `count` images that leaves none in its place (with one image there is no other)."""
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

    A beginning is known if at least `support` training questions start with it. On template questions this is as good
    as a blind model can be; on free ones it is a strong one.
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
    """Official accuracy of one split, and the answers behind it."""

    accuracy: float
    by_family: dict[str, float]
    counts: dict[str, int]
    answers: dict[int, Answer]


def score(samples: Sequence[VQASample], answers: dict[int, Answer], family: Callable[[VQASample], str]) -> Report:
    """Official accuracy, overall and by family, over the samples that have an answer."""
    scored = [s for s in samples if s.question_id in answers]
    result = accuracy_by(scored, {i: a.text for i, a in answers.items()}, family)
    groups = dict(sorted(result.groups.items()))
    return Report(
        result.overall.accuracy,
        {name: group.accuracy for name, group in groups.items()},
        {name: group.count for name, group in groups.items()},
        answers,
    )


def blind(samples: Sequence[VQASample], predictor: Callable[[VQASample], str]) -> float:
    """Official accuracy of a predictor that sees the sample's question only."""
    return accuracy_by(samples, {s.question_id: predictor(s) for s in samples}).overall.accuracy
