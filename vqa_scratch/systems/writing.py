"""Answers that a decoder writes, or that it ranks: for every system whose model is encoder, connector, decoder.

Shapes: B rows, P prompt tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from vqa_scratch.connectors.base import Conditioning
from vqa_scratch.data.answers import Answer
from vqa_scratch.data.batches import Batch, ImageGroups, Questions, prefetch
from vqa_scratch.data.images import Images
from vqa_scratch.errors import UserError
from vqa_scratch.generate import Decoder, GenerationOptions, generate, rank
from vqa_scratch.systems.base import System


@dataclass(frozen=True)
class Split:
    """The samples of a split, grouped by image, with their images."""

    questions: ImageGroups
    images: Images

    def batches(
        self, system: System, chosen: Sequence[np.ndarray], image_map: np.ndarray | None, progress: str | None
    ) -> Iterator[tuple[np.ndarray, Any]]:
        """(rows, their batch on the device), made ahead of time, for the rows of each of `chosen`.

        `image_map[i]` says which image is shown instead of image i; `progress` is the label of a bar, if one is wanted.
        """
        ready = ((rows, self.questions.batch(rows, self.images, image_map=image_map)) for rows in chosen)
        bar = tqdm(prefetch(ready), progress, len(chosen), unit="batch", disable=progress is None, leave=False)
        for rows, batch in bar:
            yield rows, batch.to(system.precision.device)


Condition = Callable[[Batch], Conditioning]  # what the decoder is given for a batch


def check_room(decoder: Decoder, prompt: int, new_tokens: int) -> None:
    """Raise UserError if a prompt of so many tokens leaves fewer positions than so many new ones take."""
    positions = decoder.max_positions
    if positions is not None and prompt + new_tokens - 1 > positions:
        raise UserError(
            f"max_new_tokens {new_tokens} is too much: the decoder has {positions} positions, which leaves "
            f"{positions - prompt + 1} behind a prompt of {prompt}"
        )


def _prompts(questions: Questions, rows: np.ndarray, system: System) -> tuple[Tensor, Tensor]:
    return tuple(part.to(system.precision.device) for part in questions.prompt_batch(rows))


def write(
    system: System,
    condition: Condition,
    split: Split,
    chosen: Sequence[np.ndarray],
    *,
    image_map: np.ndarray | None = None,
    progress: str | None = None,
    decoding: Mapping[str, Any] | None = None,
) -> dict[int, Answer]:
    """{question_id: what the decoder writes} for the rows in `chosen`; each image is encoded once.

    `decoding` are fields of `GenerationOptions`, beside the limit and the end token; without it decoding is greedy.
    Other arguments as in `Split.batches`. Raises UserError on options that contradict each other, and on more tokens
    than the decoder has positions.
    """
    tokenizers, decoder, result = system.tokenizers, system.model.decoder, {}
    limits = {"max_new_tokens": tokenizers.max_answer_tokens, "eos_id": tokenizers.end_id}
    options = GenerationOptions(**limits | dict(decoding or {}))
    check_room(decoder, int(split.questions.prompts.lengths.max()) + 1, options.max_new_tokens)
    with system.evaluating():
        for rows, batch in split.batches(system, chosen, image_map, progress):
            prompt, mask = _prompts(split.questions, rows, system)
            with system.precision.autocast():
                given = condition(batch)
                made = generate(decoder, prompt, mask, given.memory, prefix=given.prefix, options=options)
            totals = made.log_probs.sum(1).exp().tolist()
            for row, ids, length, likely in zip(rows, made.ids.tolist(), made.lengths.tolist(), totals, strict=True):
                text = tokenizers.decoder.decode(ids[:length]).strip()
                ended = ids[length - 1] == tokenizers.end_id
                result[split.questions.samples[row].question_id] = Answer(text, likely, length, ended)
    return result


def choose(
    system: System,
    condition: Condition,
    split: Split,
    chosen: Sequence[np.ndarray],
    candidates: Sequence[str],
    *,
    top: int = 1,
    image_map: np.ndarray | None = None,
    progress: str | None = None,
) -> dict[int, list[Answer]]:
    """{question_id: the `top` best of the candidates, by log-probability} for the rows in `chosen`.

    The probability is that of writing the answer and then ending. Other arguments as in `write`.
    """
    ids, result = [system.tokenizers.answer(candidate)[1:] for candidate in candidates], {}  # without BOS
    with system.evaluating():
        for rows, batch in split.batches(system, chosen, image_map, progress):
            prompt, mask = _prompts(split.questions, rows, system)
            with system.precision.autocast():
                given = condition(batch)
                scores = rank(system.model.decoder, prompt, mask, given.memory, ids, prefix=given.prefix)
            best = scores.topk(min(top, len(ids)))
            for row, places, likely in zip(rows, best.indices.tolist(), best.values.exp().tolist(), strict=True):
                result[split.questions.samples[row].question_id] = [
                    Answer(candidates[i], score, len(ids[i]), True) for i, score in zip(places, likely, strict=True)
                ]
    return result


def writing_figures(answers: Mapping[int, Answer], what: str = "answer") -> dict[str, float]:
    """How written texts end, and how long they are."""
    return {
        "eos_rate": sum(a.ended for a in answers.values()) / len(answers),
        f"mean_{what}_tokens": sum(a.tokens for a in answers.values()) / len(answers),
    }
