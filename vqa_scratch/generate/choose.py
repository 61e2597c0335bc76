"""How the next token is chosen: the most likely one, or one drawn at random, after the processors.

Shapes: B rows, L rows still decoded, P prompt tokens, V vocabulary.
"""

import torch
from torch import Tensor

from vqa_scratch.generate.loop import Choose
from vqa_scratch.generate.processors import processors
from vqa_scratch.generation_options import GenerationOptions


class Processed:
    """The processors that the options ask for, with the tokens so far where a processor looks at them."""

    def __init__(
        self, options: GenerationOptions, prompt_ids: Tensor, prompt_mask: Tensor | None, rows: Tensor
    ) -> None:
        """rows (B,): row b starts with prompt `rows[b]`."""
        self.chain = processors(options)
        self.looks_back = options.repetition_penalty != 1.0 or options.no_repeat_ngram_size > 0
        self.ids, self.real = prompt_ids, prompt_mask
        if self.looks_back:
            real = torch.ones_like(prompt_ids) if prompt_mask is None else prompt_mask
            self.ids, self.real = prompt_ids[rows], real.bool()[rows]

    def __call__(self, scores: Tensor, made: int) -> Tensor:
        """Scores of all rows (B, V) after `made` new tokens, processed."""
        for process in self.chain:
            scores = process(scores, self.ids, self.real, made)
        return scores

    def keep(self, rows: Tensor) -> None:
        """Row r goes on from what row `rows[r]` was."""
        if self.looks_back:
            self.ids, self.real = self.ids[rows], self.real[rows]

    def add(self, tokens: Tensor) -> None:
        """The tokens (B,) that were chosen."""
        if self.looks_back:
            self.ids = torch.cat([self.ids, tokens[:, None]], 1)
            self.real = torch.cat([self.real, torch.ones_like(self.real[:, :1])], 1)


def most_likely(scores: Tensor, live: Tensor, made: int) -> tuple[Tensor, Tensor]:
    """The token with the highest score."""
    return scores.max(-1).indices, scores  # the first of equals, as argmax, in half of its time on a CPU


def pick(scores: Tensor, chance: Tensor) -> Tensor:
    """Inverse transform sampling: scores (L, V) and a number in [0, 1) a row, chance (L,), -> tokens (L,).

    A token is picked where the running sum of probabilities first exceeds its chance, so never one of probability 0.
    """
    probabilities = scores.softmax(-1)
    running = probabilities.cumsum(-1)
    token = torch.searchsorted(running, chance[:, None] * running[:, -1:], right=True)
    # A parallel running sum may fall by a rounding error, and then the search may end beside a step.
    token = torch.where(probabilities.gather(1, token) > 0, token, probabilities.argmax(-1, keepdim=True))
    return token.squeeze(1)


def chooser(
    options: GenerationOptions, prompt_ids: Tensor, prompt_mask: Tensor | None, generator: torch.Generator | None
) -> Choose:
    """Greedy or sampling, as the options say; log-probabilities are of the distribution after the processors.

    The random numbers of all rows are drawn beforehand, so that what a row says does not depend on when others end.
    """
    rows = torch.arange(len(prompt_ids), device=prompt_ids.device)
    processed = Processed(options, prompt_ids, prompt_mask, rows)
    if not processed.chain and not options.do_sample:
        return most_likely
    known = rows  # the rows that `processed` holds
    chance = None
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
