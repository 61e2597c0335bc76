"""Exact attention weights without a stored matrix, and the proof that they are the weights that ran.

A fused kernel never stores its weights P (B, H, Tq, Tk), but the log-sum-exp L of each row determines them:
P_ij = exp(scale * q_i . k_j + mask_ij - L_i). Here L comes from one pass over blocks of keys with a running maximum
(Milakov and Gimelshein 2018, 1805.02867; the recurrence of FlashAttention, Dao et al. 2022, 2205.14135), so it needs
no more storage than q and k. The certificate compares the result with what the kernel returned.

Shapes: B batch, H heads, Tq queries, Tk keys, d head size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vqa_scratch.nn.attention import attention_scores, masked_softmax

KEY_BLOCK = 64


def row_lse(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B, H, Tq): log sum_j exp(scale * q_i . k_j + mask_ij), keys block by block; -inf for a row with nothing to see.

    mask is additive and broadcasts to (B, H, Tq, Tk).
    """
    q, k = q.float(), k.float()
    top = q.new_full(q.shape[:-1], -math.inf)  # running maximum of the row
    total = q.new_zeros(q.shape[:-1])  # sum of exp(score - top) so far
    for start in range(0, k.shape[-2], KEY_BLOCK):
        block = slice(start, start + KEY_BLOCK)
        scores = attention_scores(q, k[..., block, :], bias=None if mask is None else mask[..., block], scale=scale)
        new_top = torch.maximum(top, scores.amax(-1))
        finite = new_top.masked_fill(new_top == -math.inf, 0.0)  # exp(-inf - 0) = 0 where exp(-inf + inf) is NaN
        total = total * (top - finite).exp() + (scores - finite[..., None]).exp().sum(-1)
        top = new_top
    return total.log() + top


def rebuilt_pattern(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, lse: Tensor | None = None) -> Tensor:
    """(B, H, Tq, Tk): the weights, from q, k, the additive mask and the row's log-sum-exp. Zeros for an empty row."""
    lse = row_lse(q, k, mask, scale) if lse is None else lse
    scores = attention_scores(q.float(), k.float(), bias=mask, scale=scale)
    return (scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()


@dataclass(frozen=True)
class Certificate:
    """How far the weights shown are from the weights that ran, largest absolute difference over all rows and heads.

    With dropout active the kernel drops weights that a rebuilt pattern shows, and `output` says so.
    """

    mass: float = 0.0  # |sum_j P_ij - 1|, over rows that see something
    output: float = 0.0  # |P V - O|, O what the attention that ran returned
    softmax: float = 0.0  # |P - softmax|, against the explicit path's softmax
    size: float = 0.0  # largest |O|, to compare `output` with, since fp32 rounds in proportion
    attentions: int = 0  # how many modules were checked
    rows: int = 0  # how many rows of weights, over batch, heads, calls

    @property
    def worst(self) -> float:
        """The largest of the three differences."""
        return max(self.mass, self.output, self.softmax)

    def __str__(self) -> str:
        return (
            f"|sum P - 1| <= {self.mass:.1e}, |P V - O| <= {self.output:.1e} (O up to {self.size:.1f}), "
            f"|P - softmax| <= {self.softmax:.1e} over {self.rows} rows of {self.attentions} attentions"
        )


def certify(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, out: Tensor) -> Certificate:
    """The certificate of one call of one attention that read q, k, v and returned out (B, H, Tq, d)."""
    pattern = rebuilt_pattern(q, k, mask, scale)
    sums = pattern.sum(-1)
    scores = attention_scores(q.float(), k.float(), bias=mask, scale=scale)
    seen = (scores > -math.inf).any(-1)
    mass = (sums - 1).abs()[seen]
    return Certificate(
        mass=float(mass.max()) if mass.numel() else 0.0,
        output=float((pattern @ v.float() - out.float()).abs().max()),
        softmax=float((pattern - masked_softmax(scores)).abs().max()),
        size=float(out.abs().max()),
        attentions=1,
        rows=sums.numel(),
    )


def combine(certificates: list[Certificate], attentions: int) -> Certificate:
    """The worst of each difference over all calls."""
    names = ("mass", "output", "softmax", "size")
    worst = {name: max((getattr(c, name) for c in certificates), default=0.0) for name in names}
    return Certificate(**worst, attentions=attentions, rows=sum(c.rows for c in certificates))
