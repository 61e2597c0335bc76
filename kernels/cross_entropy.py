"""Linear map and cross-entropy in one: a chunk of logits at a time, whose gradient takes its place before the next.

The loss is a sum of rows, so its gradient is known but for one factor when the logits are: both gradients are made in
the forward pass (Hsu et al. 2024, 2410.10989, "Liger") and the backward pass only multiplies them.

Shapes: N rows, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqa_scratch.kernels import choice
from vqa_scratch.kernels.chunks import Head, WeightGradient, check, product_dtype

Rows = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def torch_rows(logits: Tensor, labels: Tensor, grad: bool) -> tuple[Tensor, Tensor]:
    """(loss, right), both (N,); with `grad` the logits (N, V) become the gradient of each row's loss."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top, best = x.max(-1)
    chosen = x.gather(-1, labels[:, None]).squeeze(-1)
    if not grad:
        return x.logsumexp(-1) - chosen, best == labels
    p = torch.softmax(x, -1, out=x)
    # The largest weight is at least 1/V, so its logarithm gives the log-sum-exp without another pass or buffer.
    loss = top - p.gather(-1, best[:, None]).squeeze(-1).log() - chosen
    p[torch.arange(len(p), device=p.device), labels] -= 1
    if p is not logits:
        logits.copy_(p)
    return loss, best == labels


class LinearCrossEntropy(torch.autograd.Function):
    """(hidden, weight, labels, rows, dtype) -> (loss, right): `rows` does a chunk, products are in `dtype`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, rows: Rows, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        asked = (labels >= 0).nonzero().squeeze(1)
        everything = len(asked) == len(labels)
        wanted = labels if everything else labels[asked]
        with torch.autocast(hidden.device.type, enabled=False):
            head = Head((hidden if everything else hidden[asked]).to(dtype), weight.to(dtype))
            gradient = torch.empty_like(head.x) if of_hidden else None
            of_w = WeightGradient(-(-len(asked) // head.rows))
            losses, rights = [], []
            for part, logits in head.chunks():
                loss, right = rows(logits, wanted[part], of_hidden or of_weight)
                losses.append(loss.sum())
                rights.append(right.sum())
                if of_hidden:
                    torch.mm(logits, head.w, out=gradient[part])
                if of_weight:
                    of_w.add(logits, head.x[part])
        total = torch.stack(losses).sum() if losses else hidden.new_zeros((), dtype=torch.float32)
        right = torch.stack(rights).sum() if rights else labels.new_zeros(())
        ctx.mark_non_differentiable(right)
        if of_hidden:
            gradient = gradient.to(hidden.dtype)
            if not everything:
                gradient = torch.zeros_like(hidden).index_copy_(0, asked, gradient)
        if of_weight:
            of_w = torch.zeros_like(weight) if of_w.total is None else of_w.total.to(weight.dtype)
        ctx.gradients = (gradient, of_w if of_weight else None)
        return total, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of linear_cross_entropy are handed out once; compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if g is None else g.mul_(dloss) for g in gradients), None, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of the cross-entropy in nats, how many labels are the argmax), both scalars, over rows with label >= 0.

    hidden (N, D), weight (V, D), labels (N,). Rows with a negative label meet no product, and no more than a chunk of
    logits exists at a time: where the weight is large, half as many numbers as it has. Products are in the dtype of the
    inputs, or of autocast; sums in fp32. The gradients can be asked for once. Raises ValueError on shapes, dtypes or
    labels that do not fit.
    """
    check(hidden, weight, labels)
    rows = torch_rows
    if choice.triton_runs("linear_cross_entropy", hidden):
        from vqa_scratch.kernels.rows import cross_entropy_ as rows
    return LinearCrossEntropy.apply(hidden, weight, labels, rows, product_dtype(hidden, weight))
