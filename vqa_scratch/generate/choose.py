"""Chooses the next token, the most likely one or a random one, after the processors.

Shapes: B rows, L rows still decoded, P prompt tokens, V vocabulary.
"""

import torch
from torch import Tensor

from vqa_scratch.generate.loop import Choose
from vqa_scratch.generate.processors import Processed
from vqa_scratch.generation_options import GenerationOptions


def most_likely(scores: Tensor, live: Tensor, made: int) -> tuple[Tensor, Tensor]:
    """The token with the highest score."""
    return scores.max(-1).indices, scores  # as argmax, in half the time on a CPU


def pick(scores: Tensor, chance: Tensor) -> Tensor:
    """Inverse transform sampling: scores (L, V) and a number in [0, 1) a row, chance (L,), -> tokens (L,).

    The token where the cumulative probability first exceeds the chance; never one of probability 0.
    """
    probabilities = scores.softmax(-1)
    running = probabilities.cumsum(-1)
    token = torch.searchsorted(running, chance[:, None] * running[:, -1:], right=True)
    # A parallel cumulative sum may decrease by a rounding error, and the search may then miss a step.
    token = torch.where(probabilities.gather(1, token) > 0, token, probabilities.argmax(-1, keepdim=True))
    return token.squeeze(1)


def chooser(
    options: GenerationOptions, prompt_ids: Tensor, prompt_mask: Tensor | None, generator: torch.Generator | None
) -> Choose:
    """Greedy or sampling, by the options; log-probabilities are those after the processors.

    The random numbers of all rows are drawn first, so that a row does not depend on when others end.
    """
    if options == GenerationOptions(options.max_new_tokens, options.eos_id):  # the rest is as if not given
        return most_likely
    rows = torch.arange(len(prompt_ids), device=prompt_ids.device)
    processed = Processed(options, prompt_ids, prompt_mask, rows)
    known, chance = rows, None  # `known` are the rows in `processed`
    if options.do_sample:
        chance = torch.rand(len(rows), options.max_new_tokens, generator=generator, device=rows.device)

    def choose(scores: Tensor, live: Tensor, made: int) -> tuple[Tensor, Tensor]:
        nonlocal known
        if len(live) != len(known):
            processed.keep(torch.searchsorted(known, live))
            known = live
        scores = processed(scores.float(), made)
        token = scores.argmax(-1) if chance is None else pick(scores, chance[live, made])
        processed.add(token)
        return token, scores

    return choose
