"""Log-probability and entropy of chosen tokens, from logits or from the states before the head, with gradients of both.

With p = softmax(x) and H its entropy: d log p_c / dx = onehot_c - p, dH / dx = -p (log p + H). Neither is stored: p
follows from the logits and their log-sum-exp, and from states the logits are computed again, a chunk at a time.

Shapes: N rows, D width, V vocabulary.
"""

from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqa_scratch.kernels import choice
from vqa_scratch.kernels.chunks import Head, WeightGradient, check, check_ids, product_dtype

LEAST = -1e30  # in place of -inf: exp(LEAST) = 0 and 0 * LEAST = 0
CACHED = 2**18  # numbers that torch works on at a time, so that they stay in the cache between its passes


def _blocks(logits: Tensor):
    size = max(1, CACHED // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    return (slice(start, start + size) for start in range(0, len(logits), size))


def torch_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probability of ids, entropy, log-sum-exp), each (N,)."""
    kind = torch.promote_types(logits.dtype, torch.float32)
    chosen = logits.gather(-1, ids[:, None]).squeeze(-1).to(kind)
    entropy, lse = torch.empty_like(chosen), torch.empty_like(chosen)
    for part in _blocks(logits):
        x = logits[part].to(kind)
        top = x.amax(-1, keepdim=True)
        x = (x - top).clamp_(min=LEAST)
        p = x.exp()
        total = p.sum(-1)
        log_total = total.log()
        entropy[part] = log_total - p.mul_(x).sum(-1) / total
        lse[part] = log_total + top.squeeze(-1)
    return chosen - lse, entropy, lse


def torch_gradient(
    logits: Tensor, ids: Tensor, lse: Tensor, entropy: Tensor, dlogprobs: Tensor, dentropy: Tensor, out: Tensor
) -> None:
    """`out` (N, V), which may be the logits, becomes their gradient."""
    for part in _blocks(logits):
        log_p = (logits[part].to(lse.dtype) - lse[part, None]).clamp_(min=LEAST)
        p = log_p.exp()
        slope = log_p.add_(entropy[part, None]).mul_(dentropy[part, None]).add_(dlogprobs[part, None])
        gradient = slope.mul_(p).neg_().scatter_add_(1, ids[part, None], dlogprobs[part, None])
        out[part] = gradient.to(out.dtype)


TORCH = SimpleNamespace(logprobs=torch_logprobs, logprobs_gradient=torch_gradient)


def _rows(name: str, tensor: Tensor) -> ModuleType | SimpleNamespace:
    """Who does the rows: the kernels, or the two functions above."""
    if choice.triton_runs(name, tensor):
        from vqa_scratch.kernels import rows

        return rows
    return TORCH


def _filled(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient.to(like.dtype).contiguous()


class ChosenLogprobs(torch.autograd.Function):
    """(logits, ids, rows) -> (log-probabilities, entropies)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, rows: Any) -> tuple[Tensor, Tensor]:
        logprobs, entropy, lse = rows.logprobs(logits, ids)
        ctx.save_for_backward(logits, ids, lse, entropy)
        ctx.rows = rows
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogprobs: Tensor | None, dentropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, ids, lse, entropy = ctx.saved_tensors
        out = torch.empty_like(logits)
        given = (_filled(dlogprobs, lse), _filled(dentropy, lse))
        ctx.rows.logprobs_gradient(logits, ids, lse, entropy, *given, out)
        return out, None, None


class LinearLogprobs(torch.autograd.Function):
    """(hidden, weight, ids, rows, dtype) -> (log-probabilities, entropies)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, rows: Any, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        figures = hidden.new_empty(3, len(ids), dtype=torch.promote_types(dtype, torch.float32))
        with torch.autocast(hidden.device.type, enabled=False):
            for part, logits in Head(hidden.to(dtype), weight.to(dtype)).chunks():
                figures[:, part] = torch.stack(rows.logprobs(logits, ids[part]))
        logprobs, entropy, lse = figures.clone().unbind()
        ctx.save_for_backward(hidden, weight, ids, lse, entropy)
        ctx.rows, ctx.dtype = rows, dtype
        ctx.set_materialize_grads(False)
        return figures[0], figures[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogprobs: Tensor | None, dentropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, ids, lse, entropy = ctx.saved_tensors
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        given = (_filled(dlogprobs, lse), _filled(dentropy, lse))
        with torch.autocast(hidden.device.type, enabled=False):
            head = Head(hidden.to(ctx.dtype), weight.to(ctx.dtype))
            gradient = torch.empty_like(head.x) if of_hidden else None
            of_w = WeightGradient(-(-len(ids) // head.rows))
            for part, logits in head.chunks():
                known = (x[part] for x in (ids, lse, entropy, *given))
                ctx.rows.logprobs_gradient(logits, *known, logits)
                if of_hidden:
                    torch.mm(logits, head.w, out=gradient[part])
                if of_weight:
                    of_w.add(logits, head.x[part])
        if of_weight:
            of_w = torch.zeros_like(weight) if of_w.total is None else of_w.total.to(weight.dtype)
        return gradient.to(hidden.dtype) if of_hidden else None, of_w if of_weight else None, None, None, None


def chosen_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability of `ids`, entropy), both (N,) fp32 and in nats. logits (N, V), ids (N,); -inf has probability 0.

    Reads the logits once, and once more for their gradient; both outputs have one. Raises ValueError on ids that do not
    fit.
    """
    if logits.ndim != 2 or ids.shape != logits.shape[:1]:
        raise ValueError(f"logits (N, V) and ids (N,) do not fit: {tuple(logits.shape)}, {tuple(ids.shape)}")
    check_ids(ids, logits.shape[1])
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    return ChosenLogprobs.apply(logits, ids, _rows("chosen_logprobs", logits))


def linear_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same from states: hidden (N, D), weight (V, D), logits = hidden weight^T, which never exist all at once.

    The logits are computed again for the gradients. Products are in the dtype of the inputs, or autocast's. Raises
    ValueError on shapes, dtypes or ids that do not fit.
    """
    check(hidden, weight, ids)
    rows = _rows("linear_logprobs", hidden)
    return LinearLogprobs.apply(hidden, weight, ids, rows, product_dtype(hidden, weight))
