"""Explicit attention: masks, scores and weights, and a version for training on a CPU with its own backward pass.

Vaswani et al. 2017, equation 1: softmax(q k^T / sqrt(d) + bias) v. Masks are True (or 1) where a query may look. A
query that may look at nothing has weights of zero.

Shapes: B rows, H heads, Tq queries, Tk keys, d head size, R rows at a time.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_mask(queries: int, keys: int, device: torch.device | None = None) -> Tensor:
    """(Tq, Tk) bool, aligned to the end of the keys, as a cache needs: query i sees keys 0 ... Tk - Tq + i."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def allowed(key_mask: Tensor | None, causal: bool, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """Which keys each query may read, broadcastable to (B, H, Tq, Tk); None if nothing is masked."""
    if key_mask is not None:
        if key_mask.ndim != 2 or key_mask.shape[1] != keys:
            raise ValueError(f"key_mask must be (batch, {keys} keys), got {tuple(key_mask.shape)}")
        key_mask = key_mask.bool()[:, None, None, :]  # (B, 1, 1, Tk)
    if not causal or queries == 1:  # a single query is last: it sees every key
        return key_mask
    order = causal_mask(queries, keys, device)
    return order if key_mask is None else key_mask & order  # (B, 1, Tq, Tk)


def hide(scores: Tensor, keep: Tensor | None) -> Tensor:
    """The scores, or a bias on them, with -inf where `keep` says that a query may not look (None: nowhere)."""
    return scores if keep is None else scores.masked_fill(~keep, -math.inf)


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
    return hide(scores, allowed(key_mask, causal, q.shape[-2], k.shape[-2], q.device))


def masked_softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis; -inf gets weight 0, even if the whole row is -inf."""
    blocked = scores == -math.inf
    # The most negative number instead of -inf keeps the gradient of an empty row finite.
    return scores.masked_fill(blocked, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(blocked, 0.0)


def attention_weights(q: Tensor, k: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The scores (-inf where masked) and the weights, both (B, H, Tq, Tk). Arguments as in `attention_scores`."""
    scores = attention_scores(q, k, **options)
    return scores, masked_softmax(scores)


# Scores in one group of rows. A product of several rows first copies keys that are not contiguous. In fp32 that costs
# more than a call for each row, in bf16 less.
SCORES_AT_ONCE = 2**16
SCORES_AT_ONCE_BF16 = 2**20


def _of(x: Tensor, some: slice) -> Tensor:
    """The rows `some` of a bias or mask, which may have a single row for all."""
    return x if x.shape[0] == 1 else x[some]


class Products(torch.autograd.Function):
    """softmax(scale q k^T + bias) v by plain matrix products, with its own backward pass. Result (B, H, Tq, d).

    Autograd would keep several (B, H, Tq, Tk) tensors and read each many times. Here a few rows at a time go through
    all steps, only the weights are kept, and the gradient of a shared bias is summed on the way (backward as in Dao et
    al. 2022, 2205.14135). q (B, H, Tq, d); k, v (B, H, Tk, d); bias (-inf allowed) and keep (bool, True = may look),
    which may be None, broadcast to (B, H, Tq, Tk).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        keep: Tensor | None,
        scale: float,
        dropout: float,
    ) -> Tensor:
        # (B, Tq, H, d) in memory, so that joining the heads afterwards is a view.
        z = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        added, keep = (None if x is None else x[(None,) * (4 - x.ndim)] for x in (bias, keep))
        added = None if added is None else added.to(q.dtype)
        at_once = SCORES_AT_ONCE_BF16 if q.dtype == torch.bfloat16 else SCORES_AT_ONCE
        rows = max(1, at_once // max(1, q.shape[1] * q.shape[2] * k.shape[2]))
        ctx.groups = [slice(start, start + rows) for start in range(0, len(q), rows)]
        weights_of, read_of = [], []
        for some in ctx.groups:
            scores = q[some] @ k[some].transpose(-1, -2)  # (R, H, Tq, Tk)
            if scale != 1.0:
                scores *= scale
            if added is not None:
                scores += _of(added, some)
            if keep is not None:
                scores.masked_fill_(~_of(keep, some), -math.inf)
            weights = torch.softmax(scores, -1)
            masked = added is not None or keep is not None
            if masked and bool(weights[..., 0].isnan().any()):  # an empty row, or NaN in the input
                weights.masked_fill_(scores.amax(-1, keepdim=True) == -math.inf, 0.0)
            read = F.dropout(weights, dropout) if dropout else weights
            z[some] = read @ v[some]
            if any(ctx.needs_input_grad):
                weights_of.append(weights)
                read_of.append(read)
        ctx.save_for_backward(q, k, v, bias, *weights_of, *(read_of if dropout else ()))
        ctx.scale, ctx.dropout = scale, dropout
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, *saved = ctx.saved_tensors
        weights_of, read_of = saved[: len(ctx.groups)], saved[-len(ctx.groups) :]
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        dbias = torch.zeros_like(bias[(None,) * (4 - bias.ndim)]) if ctx.needs_input_grad[3] else None
        for some, weights, read in zip(ctx.groups, weights_of, read_of, strict=True):
            dv[some] = read.transpose(-1, -2) @ dz[some]
            dweights = dz[some] @ v[some].transpose(-1, -2)
            if ctx.dropout:
                dweights *= (read != 0) / (1 - ctx.dropout)
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            if dbias is not None:
                _add_to(_of(dbias, some), dscores)
            if ctx.scale != 1.0:
                dscores *= ctx.scale
            dq[some] = dscores @ k[some]
            dk[some] = dscores.transpose(-1, -2) @ q[some]
        return dq, dk, dv, None if dbias is None else dbias.view(bias.shape), None, None, None


def _add_to(total: Tensor, parts: Tensor) -> None:
    """Add (R, H, Tq, Tk) into `total`, summed over the axes that it broadcasts."""
    if total.shape == (1, *parts.shape[1:]):
        for part in parts:  # faster than one sum over a leading axis, and in the dtype of the total
            total[0] += part.to(total.dtype)
    else:
        total += parts.to(total.dtype).sum_to_size(total.shape)
