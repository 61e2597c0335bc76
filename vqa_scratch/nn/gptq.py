"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): codes chosen so that a layer says what it said, not weight by weight.

Of the inputs x that a matrix W reads, H = sum of x x^T is all that counts: an error D of W changes what it says by
tr(D H D^T). Columns are rounded one after the other, and the error of each is spread over those to come, by the
Cholesky factor of the inverse of H + 0.01 mean(diag H).

Shapes: N outputs, K inputs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vqa_scratch.nn.quantized import Codes, Format, checked, matrices, replace

BLOCK = 128  # columns that are finished before their errors are spread over all later ones
DAMPING = 0.01  # of the mean of the diagonal


class Recorded(nn.Module):
    """A linear map that adds up the products of what it reads."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.gram = linear, torch.zeros(linear.in_features, linear.in_features)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.detach().flatten(0, -2).float()
        self.gram.addmm_(rows.t(), rows)
        return self.linear(x)


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside this context the modules of a decoder add up H (K, K) of each of its `matrices`, by name."""
    layers = {name: Recorded(linear) for name, linear in matrices(model).items()}
    for name, layer in layers.items():
        replace(model, name, layer)
    try:
        yield {name: layer.gram for name, layer in layers.items()}
    finally:
        for name, layer in layers.items():
            replace(model, name, layer.linear)


def gptq(kind: Format, weight: Tensor, gram: Tensor) -> Codes:
    """The codes of a matrix (N, K), given H (K, K)."""
    inputs = weight.shape[1]
    damped = gram.double() + max(DAMPING * gram.diagonal().mean().item(), 1e-8) * torch.eye(inputs, dtype=torch.double)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    spread = torch.linalg.cholesky(inverse, upper=True).float()  # (K, K), upper
    left, codes, grids = weight.detach().float().clone(), torch.empty_like(weight, dtype=torch.float32), []
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        errors = left.new_empty(len(left), stop - start)
        for at in range(start, stop):
            if at % (kind.group or inputs) == 0:
                grids.append(kind.grid(left[:, at : at + (kind.group or inputs)]))
            code = kind.encode(left[:, at : at + 1], *grids[-1])
            error = (left[:, at : at + 1] - kind.decode(code, *grids[-1])) / spread[at, at]
            left[:, at + 1 : stop] -= error * spread[at, at + 1 : stop]
            codes[:, at : at + 1], errors[:, at - start : at - start + 1] = code, error
        left[:, stop:] -= errors @ spread[start:stop, stop:]
    return kind.stored(codes, tuple(torch.cat(parts, 1) for parts in zip(*grids, strict=True)))


def gptq_codes(model: nn.Module, kind: Format, grams: Mapping[str, Tensor]) -> dict[str, Codes]:
    """Of all `matrices`, given what `recorded` found. Raises UserError as `checked`."""
    return {name: gptq(kind, linear.weight, grams[name]) for name, linear in checked(model, kind).items()}


def relative_error(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    """||x W - x W'|| / ||x W|| over the inputs of which `gram` is the sum."""
    size = lambda matrix: ((matrix @ gram) * matrix).sum().clamp(min=0.0).sqrt()  # noqa: E731
    weight = weight.detach()
    return float(size(weight - other.detach()) / size(weight))
