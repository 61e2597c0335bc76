"""Log-probability and entropy of chosen tokens, with the gradients of both.

With p = softmax(x) and H its entropy: d log p_c / dx = onehot_c - p, dH / dx = -p (log p + H). p is not stored: the
logits and their log-sum-exp give it.

Shapes: N rows, V vocabulary.
"""

from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqa_scratch.kernels import choice
from vqa_scratch.kernels.cross_entropy import check_ids

LEAST = -1e30  # in place of -inf: exp(LEAST) = 0 and 0 * LEAST = 0
CACHED = 2**18  # numbers in a block: they stay in the cache between torch's passes


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


def chosen_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability of `ids`, entropy), both (N,) fp32 and in nats. logits (N, V), ids (N,); -inf has probability 0.

    Reads the logits once, and once more for the gradient of both. Raises ValueError on ids that do not fit.
    """
    if logits.ndim != 2 or ids.shape != logits.shape[:1]:
        raise ValueError(f"logits (N, V) and ids (N,) do not fit: {tuple(logits.shape)}, {tuple(ids.shape)}")
    check_ids(ids, logits.shape[1])
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    rows: ModuleType | SimpleNamespace = TORCH
    if choice.triton_runs("chosen_logprobs", logits):
        from vqa_scratch.kernels import rows
    return ChosenLogprobs.apply(logits, ids, rows)
