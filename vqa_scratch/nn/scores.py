"""Attention in the open: the scores, the weights, and the one mask that says the same to a fused operator.

Vaswani et al. 2017, equation 1: softmax(q k^T / sqrt(d) + bias). A query that may attend to nothing has no weights.

Shapes: B rows, H heads, Tq queries, Tk keys, d head size.
"""

import math

import torch
from torch import Tensor

from vqa_scratch.nn import masks


def attention_scores(
    q: Tensor,
    k: Tensor,
    *,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """(B, H, Tq, Tk): scale * q k^T + bias, -inf where a query may not look. Arguments as in `attention`."""
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    keep = masks.allowed(key_mask, causal, q.shape[-2], k.shape[-2], q.device)
    return scores if keep is None else scores.masked_fill(~keep, -math.inf)


def masked_softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis in which -inf gets no weight and a row of nothing but -inf is all zeros."""
    blocked = scores == -math.inf
    # The most negative number instead of -inf keeps the gradient of an empty row finite.
    return scores.masked_fill(blocked, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(blocked, 0.0)


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The scores (-inf where masked) and the weights, both (B, H, Tq, Tk). Arguments as in `attention`."""
    scores = attention_scores(q, k, key_mask=key_mask, bias=bias, causal=causal, scale=scale)
    # With no mask but the causal one, every query sees its own key at least: no row to guard.
    never_empty = key_mask is None and bias is None and (not causal or q.shape[-2] <= k.shape[-2])
    return scores, scores.softmax(-1) if never_empty else masked_softmax(scores)


def attention_mask(
    q: Tensor, k: Tensor, *, key_mask: Tensor | None = None, bias: Tensor | None = None, causal: bool = False
) -> Tensor | None:
    """The one mask the fused operator takes: bool, or additive when there is a bias; broadcastable to the scores."""
    keep = masks.allowed(key_mask, causal, q.shape[-2], k.shape[-2], q.device)
    if bias is None:
        return keep
    bias = bias.to(q.dtype)
    return bias if keep is None else bias.masked_fill(~keep, -math.inf)
