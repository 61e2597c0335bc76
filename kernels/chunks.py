"""A head over a large vocabulary, a chunk of rows at a time: how many rows, in which dtype, where the sums go.

Shapes: N rows, D width, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

FEWEST_LOGITS = 2**22  # on the CPU: smaller heads gain nothing from chunks
FEWEST_ROWS = 4096  # on a GPU: a product of fewer rows, or one more sum of weight gradients, is not worth its time
ALIGNED = 64  # on a GPU the rows of logits begin at multiples of this, which the fast products ask for


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that hidden @ weight^T is computed in: autocast's where it is on. Raises ValueError on two dtypes."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, the weight {weight.dtype}: they must be of one dtype")
    return hidden.dtype


def check(hidden: Tensor, weight: Tensor, ids: Tensor) -> None:
    """Raises ValueError if hidden (N, D), weight (V, D) and ids (N,) do not fit, or an id is beyond the vocabulary."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or ids.shape != hidden.shape[:1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (hidden, weight, ids))
        raise ValueError(f"hidden (N, D), weight (V, D) and ids (N,) do not fit: {shapes}")
    check_ids(ids, len(weight))


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Raises ValueError if an id lies beyond the vocabulary; on a GPU, where looking would wait, kernels give NaN."""
    if ids.device.type == "cpu" and ids.numel() and int(ids.max()) >= vocabulary:
        raise ValueError(f"id {int(ids.max())} is beyond the vocabulary of {vocabulary}")


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
        """(rows, their logits), in one buffer that the next chunk takes over."""
        for start in range(0, len(self.x), self.rows):
            part = slice(start, min(start + self.rows, len(self.x)))
            logits = self._buffer[: part.stop - start, : len(self.w)]
            yield part, torch.mm(self.x[part], self.w.t(), out=logits)


class WeightGradient:
    """sum over chunks of dlogits^T x, (V, D): in one product if there is one chunk, else summed in fp32."""

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
