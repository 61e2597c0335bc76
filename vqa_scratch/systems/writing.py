"""Answers that a decoder writes, or ranks, mostly for the systems whose model is encoder, connector and decoder."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vqa_scratch.data.answers import Answer
from vqa_scratch.data.batches import Questions
from vqa_scratch.data.text import Tokenizer
from vqa_scratch.data.tokenizers import Tokenizers
from vqa_scratch.errors import UserError
from vqa_scratch.generate import Generated, GenerationOptions, generate, rank
from vqa_scratch.generation_options import end_ids
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.nn.connecting import Conditioning
from vqa_scratch.systems.assembly import grid_of
from vqa_scratch.systems.splits import SplitSystem

Writing = SplitSystem[Any, VQAModel, Any]  # one whose model is encoder, connector and decoder


def check_room(system: Writing, prompt: int, new_tokens: int) -> None:
    """Raise UserError if the decoder has too few positions for `new_tokens` after a prompt of `prompt` tokens and the
    connector's prefix before it."""
    connector, positions = system.model.connector, system.model.decoder.max_positions
    prefix = connector.prefix_length(grid_of(system.model.image, system.processor), connector.sizes)
    if positions is not None and prefix + prompt + new_tokens - 1 > positions:
        raise UserError(
            f"max_new_tokens {new_tokens} is too much: the decoder has {positions} positions, which leaves "
            f"{positions - prefix - prompt + 1} behind a prompt of {prompt}"
            + (f" and the connector's prefix of {prefix}" if prefix else "")
        )


def own_options(tokenizers: Tokenizers) -> dict[str, Any]:
    """The fields of `GenerationOptions` that a run knows: how long an answer may be, and what ends it."""
    return {"max_new_tokens": tokenizers.max_answer_tokens, "eos_id": tokenizers.end_id}


def answers_of(made: Generated, tokenizer: Tokenizer, options: GenerationOptions) -> list[Answer]:
    """What was written in each row, with its probability."""
    rows, ends = zip(made.ids.tolist(), made.lengths.tolist(), made.likely().tolist(), strict=True), options.eos_id
    return [Answer(tokenizer.decode(ids[:n]).strip(), p, n, ended=ids[n - 1] in end_ids(ends)) for ids, n, p in rows]


def write(
    system: Writing, questions: Questions, rows: np.ndarray, given: Conditioning, decoding: Mapping[str, Any] | None
) -> list[list[Answer]]:
    """What the decoder writes for each row of a batch, for which it is `given` what the connector made.

    `decoding` holds fields of `GenerationOptions` other than the token limit and the end token; without it decoding is
    greedy. Raises UserError on options that contradict each other, and on more tokens than the decoder has positions.
    """
    tokenizers = system.tokenizers
    options = GenerationOptions(**own_options(tokenizers) | dict(decoding or {}))
    check_room(system, int(questions.prompts.lengths.max()), options.max_new_tokens)
    prompt, mask = (part.to(system.precision.device) for part in questions.prompt_batch(rows))
    made = generate(system.model.decoder, prompt, mask, given, options=options)
    return [[answer] for answer in answers_of(made, tokenizers.decoder, options)]


def choose(
    system: Writing, questions: Questions, rows: np.ndarray, given: Conditioning, candidates: Sequence[str], top: int
) -> list[list[Answer]]:
    """The `top` best of the candidates for each row of a batch, by log-probability.

    The probability is that of writing the answer and then ending.
    """
    ids = [system.tokenizers.answer(candidate)[1:] for candidate in candidates]  # without BOS
    prompt, mask = (part.to(system.precision.device) for part in questions.prompt_batch(rows))
    scores = rank(system.model.decoder, prompt, mask, given, ids)
    best = scores.topk(min(top, len(ids)))
    return [
        [Answer(candidates[i], score, len(ids[i])) for i, score in zip(places, likely, strict=True)]
        for places, likely in zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
    ]


def writing_figures(answers: Mapping[int | str, Answer], what: str = "answer") -> dict[str, float]:
    """How often written texts end before the token limit, and how long they are."""
    return {
        "eos_rate": sum(a.ended for a in answers.values()) / len(answers),
        f"mean_{what}_tokens": sum(a.tokens for a in answers.values()) / len(answers),
    }
