"""Score processors: small functions that change a decoder's scores before a token is chosen, in a fixed order.

The order is that of `transformers`: repetition penalty, n-grams, barred tokens, timestamps, then, for sampling,
temperature, top-k and top-p. A barred token has the score -inf. Padding is ignored.

Shapes: R rows, T tokens so far (prompt and new), V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vqa_scratch.generate.timestamps import Timestamps
from vqa_scratch.generation_options import GenerationOptions, end_ids


def _marked(tokens: Tensor, where: Tensor, scores: Tensor) -> Tensor:
    """(R, V) True at the tokens (R, N) where `where` (R, N) is True."""
    size = scores.shape[-1]
    spare = torch.where(where, tokens, size)  # the others go to a column that is cut off
    return torch.zeros(len(scores), size + 1, dtype=torch.bool, device=scores.device).scatter_(1, spare, True)[:, :size]


def penalize_repetition(scores: Tensor, ids: Tensor, real: Tensor, penalty: float) -> Tensor:
    """Divide the scores (R, V) of the tokens in ids (R, T) by the penalty if positive, else multiply them by it.

    Keskar et al. 2019 (1909.05858), section 4.1, extended to negative scores. real (R, T) is False at padding.
    """
    lowered = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(_marked(ids, real, scores), lowered, scores)


def repeating(ids: Tensor, real: Tensor | None, ends: Tensor, size: int) -> Tensor:
    """(R, T) True at each token of ids (R, T) that must not come next: it would repeat `size` tokens in a row.

    The next token is at place `ends[r]`; the repeated tokens are all before it and real. real (R, T) is False at
    padding, which is on the left; None: no padding.
    """
    place, first = torch.arange(ids.shape[1], device=ids.device), size - 1
    match = (place >= first) & (place < ends[:, None])  # here `size` tokens end
    for back in range(1, size):  # its token `back` before the last equals the one `back` before the end
        match &= ids.roll(back, dims=1) == ids.gather(1, (ends - back).clamp(min=0)[:, None])
    return match if real is None else match & real.roll(first, dims=1)  # all are real if the first of them is


def bar_repeated_ngrams(scores: Tensor, ids: Tensor, real: Tensor, size: int) -> Tensor:
    """-inf for every token that would repeat a sequence of `size` tokens of ids (R, T)."""
    ends = torch.full((len(ids),), ids.shape[1], device=ids.device)
    return scores.masked_fill(_marked(ids, repeating(ids, real, ends, size), scores), -math.inf)


def bar(scores: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """-inf for these tokens of scores (..., V)."""
    return scores.index_fill(-1, torch.tensor(tokens, dtype=torch.long, device=scores.device), -math.inf)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """-inf for all tokens less likely than the k-th (Fan et al. 2018, 1805.04833)."""
    return scores.masked_fill(scores < scores.topk(k).values[:, -1:], -math.inf)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """-inf outside the fewest tokens that together have at least probability p (Holtzman et al. 2020, 1904.09751)."""
    ordered, order = scores.sort(-1)  # from the least likely on
    outside = ordered.softmax(-1).cumsum(-1) <= 1 - p
    outside[:, -1] = False
    return scores.masked_fill(outside.scatter(1, order, outside), -math.inf)


class Processed:
    """The processors of the options, with the tokens so far if a processor needs them."""

    def __init__(
        self, options: GenerationOptions, prompt_ids: Tensor, prompt_mask: Tensor | None, rows: Tensor
    ) -> None:
        """rows (B,): row b starts with prompt `rows[b]`."""
        self.options = options
        self.so_far: tuple[Tensor, Tensor] | None = None  # (R, T) ids, and False at padding, if a processor needs them
        if options.repetition_penalty != 1.0 or options.no_repeat_ngram_size > 0:
            real = torch.ones_like(prompt_ids) if prompt_mask is None else prompt_mask
            self.so_far = prompt_ids[rows], real.bool()[rows]
        self.timestamps = Timestamps.of(options, len(rows), rows.device)

    def __call__(self, scores: Tensor, made: int) -> Tensor:
        """Process the scores of all rows (B, V) after `made` new tokens."""
        options = self.options
        if self.so_far is not None and options.repetition_penalty != 1.0:
            scores = penalize_repetition(scores, *self.so_far, options.repetition_penalty)
        if self.so_far is not None and options.no_repeat_ngram_size > 0:
            scores = bar_repeated_ngrams(scores, *self.so_far, options.no_repeat_ngram_size)
        barred = options.suppress_tokens + (options.begin_suppress_tokens if made == 0 else ())
        if made < options.min_new_tokens:
            barred += end_ids(options.eos_id)
        if barred:
            scores = bar(scores, barred)
        if self.timestamps is not None:
            scores = self.timestamps(scores, made)
        if options.temperature is not None:
            scores = scores / options.temperature
        if options.top_k is not None:
            scores = keep_top_k(scores, options.top_k)
        if options.top_p is not None:
            scores = keep_top_p(scores, options.top_p)
        return scores

    def keep(self, rows: Tensor) -> None:
        """Row r becomes what row `rows[r]` was."""
        if self.so_far is not None:
            ids, real = self.so_far
            self.so_far = ids[rows], real[rows]
        if self.timestamps is not None:
            self.timestamps.keep(rows)

    def add(self, tokens: Tensor) -> None:
        """Append the chosen tokens (B,)."""
        if self.so_far is not None:
            ids, real = self.so_far
            self.so_far = torch.cat([ids, tokens[:, None]], 1), F.pad(real, (0, 1), value=True)
        if self.timestamps is not None:
            self.timestamps.add(tokens)
