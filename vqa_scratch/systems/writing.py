"""Answers that a decoder writes, or ranks, for the systems whose model is encoder, connector and decoder.

Shapes: B rows, P prompt tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from vqa_scratch.data.answers import Answer
from vqa_scratch.data.batches import Questions
from vqa_scratch.errors import UserError
from vqa_scratch.generate import GenerationOptions, generate, rank
from vqa_scratch.systems.base import System
from vqa_scratch.systems.splits import Split


def check_room(system: System, prompt: int, new_tokens: int) -> None:
    """Raise UserError if the decoder has too few positions for `new_tokens` after a prompt of `prompt` tokens and the
    connector's prefix before it."""
    connector, positions = system.model.connector, system.model.decoder.max_positions
    grid = system.model.image.places(*system.processor.output_size).grid
    prefix = connector.prefix_length(grid, connector.sizes)
    if positions is not None and prefix + prompt + new_tokens - 1 > positions:
        raise UserError(
            f"max_new_tokens {new_tokens} is too much: the decoder has {positions} positions, which leaves "
            f"{positions - prefix - prompt + 1} behind a prompt of {prompt}"
            + (f" and the connector's prefix of {prefix}" if prefix else "")
        )


def _prompts(questions: Questions, rows: np.ndarray, system: System) -> tuple[Tensor, Tensor]:
    return tuple(part.to(system.precision.device) for part in questions.prompt_batch(rows))


def write(
    system: System,
    split: Split,
    chosen: Sequence[np.ndarray],
    *,
    decoding: Mapping[str, Any] | None = None,
    **shown: Any,
) -> dict[int, list[Answer]]:
    """{question_id: [what the decoder writes]} for the rows in `chosen`; each image is encoded once.

    `decoding` holds fields of `GenerationOptions` other than the token limit and the end token; without it decoding is
    greedy. `shown` as in `Split.batches`. Raises UserError on options that contradict each other, and on more tokens
    than the decoder has positions.
    """
    tokenizers, decoder, result = system.tokenizers, system.model.decoder, {}
    limits = {"max_new_tokens": tokenizers.max_answer_tokens, "eos_id": tokenizers.end_id}
    options = GenerationOptions(**limits | dict(decoding or {}))
    check_room(system, int(split.questions.prompts.lengths.max()), options.max_new_tokens)
    with system.evaluating():
        for rows, batch in split.batches(system, chosen, **shown):
            prompt, mask = _prompts(split.questions, rows, system)
            with system.precision.autocast():
                given = system.condition(batch)
                made = generate(decoder, prompt, mask, given.memory, prefix=given.prefix, options=options)
            totals = made.log_probs.sum(1).exp().tolist()
            for row, ids, length, likely in zip(rows, made.ids.tolist(), made.lengths.tolist(), totals, strict=True):
                text = tokenizers.decoder.decode(ids[:length]).strip()
                ended = ids[length - 1] == tokenizers.end_id
                result[split.questions.samples[row].question_id] = [Answer(text, likely, length, ended)]
    return result


def choose(
    system: System,
    split: Split,
    chosen: Sequence[np.ndarray],
    candidates: Sequence[str],
    *,
    top: int = 1,
    **shown: Any,
) -> dict[int, list[Answer]]:
    """{question_id: the `top` best of the candidates, by log-probability} for the rows in `chosen`.

    The probability is that of writing the answer and then ending. `shown` as in `Split.batches`.
    """
    ids, result = [system.tokenizers.answer(candidate)[1:] for candidate in candidates], {}  # without BOS
    with system.evaluating():
        for rows, batch in split.batches(system, chosen, **shown):
            prompt, mask = _prompts(split.questions, rows, system)
            with system.precision.autocast():
                given = system.condition(batch)
                scores = rank(system.model.decoder, prompt, mask, given.memory, ids, prefix=given.prefix)
            best = scores.topk(min(top, len(ids)))
            for row, places, likely in zip(rows, best.indices.tolist(), best.values.exp().tolist(), strict=True):
                result[split.questions.samples[row].question_id] = [
                    Answer(candidates[i], score, len(ids[i]), True) for i, score in zip(places, likely, strict=True)
                ]
    return result


def writing_figures(answers: Mapping[int, Answer], what: str = "answer") -> dict[str, float]:
    """How often written texts end before the token limit, and how long they are."""
    return {
        "eos_rate": sum(a.ended for a in answers.values()) / len(answers),
        f"mean_{what}_tokens": sum(a.tokens for a in answers.values()) / len(answers),
    }
