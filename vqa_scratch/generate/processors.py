"""Score processors: small functions that change a decoder's scores before a token is chosen, in a fixed order.

The order is that of `transformers`: repetition penalty, n-grams, end token, then, for sampling, temperature, top-k and
top-p. A barred token has the score -inf. Padding is ignored.

Shapes: R rows, T tokens so far (prompt and new), V vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vqa_scratch.generation_options import GenerationOptions

Processor = Callable[[Tensor, Tensor, Tensor, int], Tensor]


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


def bar_end(scores: Tensor, eos_id: int) -> Tensor:
    """-inf for the end token."""
    scores = scores.clone()
    scores[:, eos_id] = -math.inf
    return scores


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """-inf for all tokens less likely than the k-th (Fan et al. 2018, 1805.04833)."""
    return scores.masked_fill(scores < scores.topk(k).values[:, -1:], -math.inf)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """-inf outside the fewest tokens that together have at least probability p (Holtzman et al. 2020, 1904.09751)."""
    ordered, order = scores.sort(-1)  # from the least likely on
    outside = ordered.softmax(-1).cumsum(-1) <= 1 - p
    outside[:, -1] = False
    return scores.masked_fill(outside.scatter(1, order, outside), -math.inf)


def processors(options: GenerationOptions) -> list[Processor]:
    """The functions (scores, ids, real, new tokens so far) -> scores for these options, in order."""
    chain: list[Processor] = []
    if options.repetition_penalty != 1.0:
        penalty = options.repetition_penalty
        chain.append(lambda scores, ids, real, made: penalize_repetition(scores, ids, real, penalty))
    if options.no_repeat_ngram_size > 0:
        size = options.no_repeat_ngram_size
        chain.append(lambda scores, ids, real, made: bar_repeated_ngrams(scores, ids, real, size))
    if options.min_new_tokens > 0:
        least, eos_id = options.min_new_tokens, options.eos_id
        chain.append(lambda scores, ids, real, made: bar_end(scores, eos_id) if made < least else scores)
    if options.temperature is not None:
        temperature = options.temperature
        chain.append(lambda scores, ids, real, made: scores / temperature)
    for limit, keep in ((options.top_k, keep_top_k), (options.top_p, keep_top_p)):
        if limit is not None:
            chain.append(lambda scores, ids, real, made, keep=keep, limit=limit: keep(scores, limit))
    return chain
