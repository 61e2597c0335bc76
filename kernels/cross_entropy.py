"""Linear layer and cross-entropy in one, a chunk of logits at a time, so that all logits never exist together.

The loss is a sum of rows, so its gradient is known up to one factor once the logits are: the forward pass computes both
gradients (Hsu et al. 2024, 2410.10989, "Liger") and the backward pass only multiplies them.

Shapes: N rows, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqa_scratch.kernels import choice

FEWEST_LOGITS = 2**22  # of a chunk on the CPU: smaller heads gain nothing from chunks
FEWEST_ROWS = 4096  # of a chunk on a GPU: smaller products, and more sums of weight gradients, take too much time
ALIGNED = 64  # on a GPU the rows of logits begin at multiples of this, as fast products require

Rows = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Raises ValueError on an id beyond the vocabulary; on a GPU this would sync, so the kernels return NaN."""
    if ids.device.type == "cpu" and ids.numel() and int(ids.max()) >= vocabulary:
        raise ValueError(f"id {int(ids.max())} is beyond the vocabulary of {vocabulary}")


def torch_rows(logits: Tensor, labels: Tensor, grad: bool) -> tuple[Tensor, Tensor]:
    """(loss, right), both (N,); with `grad` the logits (N, V) become the gradient of each row's loss."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top, best = x.max(-1)
    chosen = x.gather(-1, labels[:, None]).squeeze(-1)
    if not grad:
        return x.logsumexp(-1) - chosen, best == labels
    p = torch.softmax(x, -1, out=x)
    # The largest probability is at least 1/V, so its logarithm gives the log-sum-exp without another pass or buffer.
    loss = top - p.gather(-1, best[:, None]).squeeze(-1).log() - chosen
    p[torch.arange(len(p), device=p.device), labels] -= 1
    if p is not logits:
        logits.copy_(p)
    return loss, best == labels


class Head:
    """x (N, D) times w (V, D)^T by chunks of rows; a large chunk of logits holds half as many numbers as w."""

    def __init__(self, x: Tensor, w: Tensor) -> None:
        self.x, self.w, vocabulary = x, w, len(w)
        on_cpu = x.device.type == "cpu"
        least = FEWEST_LOGITS // vocabulary if on_cpu else FEWEST_ROWS
        self.rows = max(1, min(len(x), max(x.shape[1] // 2, least)))
        columns = vocabulary if on_cpu else -(-vocabulary // ALIGNED) * ALIGNED
        self._buffer = x.new_empty(self.rows, columns)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their logits), in one buffer that the next chunk overwrites."""
        for start in range(0, len(self.x), self.rows):
            part = slice(start, min(start + self.rows, len(self.x)))
            logits = self._buffer[: part.stop - start, : len(self.w)]
            yield part, torch.mm(self.x[part], self.w.t(), out=logits)


class WeightGradient:
    """Sum over chunks of dlogits^T x, (V, D): one product if there is one chunk, otherwise summed in fp32."""

    def __init__(self, chunks: int) -> None:
        self.total: Tensor | None = None
        self.chunks = chunks

    def add(self, dlogits: Tensor, x: Tensor) -> None:
        if self.total is None:
            product = torch.mm(dlogits.t(), x)
            self.total = product if self.chunks == 1 else product.to(torch.promote_types(x.dtype, torch.float32))
        elif self.total.dtype == x.dtype:
            self.total.addmm_(dlogits.t(), x)
        else:
            self.total += torch.mm(dlogits.t(), x)


class LinearCrossEntropy(torch.autograd.Function):
    """(hidden, weight, labels, rows, dtype) -> (loss, right): `rows` computes a chunk, products are in `dtype`."""

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
                if gradient is not None:
                    torch.mm(logits, head.w, out=gradient[part])
                if of_weight:
                    of_w.add(logits, head.x[part])
        total = torch.stack(losses).sum() if losses else hidden.new_zeros((), dtype=torch.float32)
        right = torch.stack(rights).sum() if rights else labels.new_zeros(())
        ctx.mark_non_differentiable(right)
        if gradient is not None:
            gradient = gradient.to(hidden.dtype)
            if not everything:
                gradient = torch.zeros_like(hidden).index_copy_(0, asked, gradient)
        dweight = torch.zeros_like(weight) if of_w.total is None else of_w.total.to(weight.dtype)
        ctx.gradients = (gradient, dweight if of_weight else None)
        return total, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of linear_cross_entropy can be taken once; compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if g is None else g.mul_(dloss) for g in gradients), None, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of the cross-entropy in nats, how many labels are the argmax), both scalars, over rows with label >= 0.

    hidden (N, D), weight (V, D), labels (N,). Rows with a negative label are skipped, and only one chunk of logits
    exists at a time: for a large weight, half as many numbers as it has. Products are in the dtype of the inputs, or of
    autocast; sums in fp32. The gradients can be taken once. Raises ValueError on shapes, dtypes or
    labels that do not fit.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (hidden, weight, labels))
        raise ValueError(f"hidden (N, D), weight (V, D) and labels (N,) do not fit: {shapes}")
    check_ids(labels, len(weight))
    kind, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    elif weight.dtype != dtype:
        raise ValueError(f"hidden is {hidden.dtype}, the weight {weight.dtype}: they must be of one dtype")
    rows, choice.last = torch_rows, "torch"
    if kind in choice.DEVICES and choice.triton_runs("linear_cross_entropy", hidden):
        from vqa_scratch.kernels.rows import cross_entropy_ as rows
    return LinearCrossEntropy.apply(hidden, weight, labels, rows, dtype)
