"""Attention as plain matrix products with the backward pass written out: for training on a CPU.

torch's fused operator has no fast backward pass on a CPU where the bias is learned (T5's), nor in bf16. Left to
autograd, softmax(q k^T + bias) v keeps several (B, H, Tq, Tk) tensors and walks over each of them many times. Here a
few rows at a time go through all steps, the weights alone are kept, and the gradient of a bias that rows share is
summed as it arises. The equations are those of Vaswani et al. 2017; backward as in Dao et al. 2022 (2205.14135).

Shapes: B rows, H heads, T (Tq, Tk) tokens, d head size, R rows at a time.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

# Numbers. A product of several rows first copies keys that do not lie one row's behind the other's. In fp32 that costs
# more than a call for each row, in bf16 less.
SCORES_AT_ONCE = 2**16
SCORES_AT_ONCE_BF16 = 2**20


def products_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """What each query reads, (B, H, Tq, d), in the number format of q.

    q (B, H, Tq, d); k, v (B, H, Tk, d); keep (bool, True = may attend) and bias (-inf allowed) broadcast to
    (B, H, Tq, Tk); scale defaults to d**-0.5. A query that may attend to nothing reads zeros.
    """
    bias, keep = (None if x is None else x[(None,) * (4 - x.ndim)] for x in (bias, keep))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(q, k, v, bias, keep, scale, dropout)


def _groups(rows: int, scores_a_row: int, dtype: torch.dtype) -> list[slice]:
    size = max(1, (SCORES_AT_ONCE_BF16 if dtype == torch.bfloat16 else SCORES_AT_ONCE) // scores_a_row)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _of(x: Tensor, some: slice) -> Tensor:
    """What the rows in `some` see of a bias or mask: all of it where it has one row for everyone."""
    return x if x.shape[0] == 1 else x[some]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        keep: Tensor | None,
        scale: float,
        dropout: float,
    ) -> Tensor:
        # In memory (B, Tq, H, d), so that joining the heads afterwards is a view.
        z = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        weights_of, read_of = [], []
        ctx.groups = _groups(len(q), q.shape[1] * q.shape[2] * k.shape[2], q.dtype)
        added = None if bias is None else bias.to(q.dtype)
        for some in ctx.groups:
            scores = q[some] @ k[some].transpose(-1, -2)  # (R, H, Tq, Tk)
            if scale != 1.0:
                scores *= scale
            if added is not None:
                scores += _of(added, some)
            if keep is not None:
                scores.masked_fill_(~_of(keep, some), -math.inf)
            weights = torch.softmax(scores, -1, dtype=scores.dtype)
            if bool(weights[..., 0].isnan().any()):  # a query that may attend to nothing, or NaN in the input
                weights.masked_fill_(scores.amax(-1, keepdim=True) == -math.inf, 0.0)
            read = F.dropout(weights, dropout) if dropout else weights
            z[some] = read @ v[some]
            weights_of.append(weights)
            read_of.append(read)
        ctx.save_for_backward(q, k, v, bias, *weights_of, *(read_of if dropout else ()))
        ctx.scale, ctx.dropout = scale, dropout
        return z

    @staticmethod
    def backward(ctx: FunctionCtx, dz: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, *saved = ctx.saved_tensors
        weights_of, read_of = saved[: len(ctx.groups)], saved[-len(ctx.groups) :]
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        dbias = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None
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
        return dq, dk, dv, dbias, None, None, None


def _add_to(total: Tensor, parts: Tensor) -> None:
    """Add (R, H, Tq, Tk) into `total`, summed over the axes that it broadcasts."""
    if total.shape == parts.shape:
        total += parts.to(total.dtype)
    elif total.shape == (1, *parts.shape[1:]):
        for part in parts:  # faster than one sum over a leading axis, and in the precision of the total
            total[0] += part.to(total.dtype)
    else:
        total += parts.to(total.dtype).sum_to_size(total.shape)
