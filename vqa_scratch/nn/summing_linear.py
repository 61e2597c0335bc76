"""A linear layer for large weights that adds their gradient directly to `.grad`.

Autograd first computes the gradient of a weight and then adds it to `.grad`: 66 MB more for a head of 32,128 x 512,
while all activations are in memory. Megatron-LM (Shoeybi et al. 2019, 1909.08053) accumulates in the same way.

Shapes: N rows (tokens), D inputs, V outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cast: Tensor) -> Tensor:
        ctx.save_for_backward(x, cast)
        ctx.weight = weight
        return F.linear(x, cast)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, cast), weight, dweight = ctx.saved_tensors, ctx.weight, None
        of_x, of_weight, _ = ctx.needs_input_grad
        with torch.autocast(dy.device.type, enabled=False):
            if of_weight:
                rows, drows = x.flatten(0, -2), dy.flatten(0, -2)  # (N, D), (N, V)
                if weight.grad is None:
                    dweight = (drows.t() @ rows).to(weight.dtype)
                elif weight.grad.dtype == dy.dtype:
                    weight.grad.addmm_(drows.t(), rows)
                else:
                    weight.grad += drows.t() @ rows
            return dy @ cast if of_x else None, dweight, None


class SummingLinear(nn.Linear):
    """`nn.Linear` without a bias, for `loss.backward()`: `torch.autograd.grad` does not see what goes to `.grad`."""

    def forward(self, x: Tensor) -> Tensor:
        device, cast = x.device.type, self.weight.detach()
        if not torch.is_grad_enabled():
            return super().forward(x)
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x, cast = x.to(dtype), cast.to(dtype)
        with torch.autocast(device, enabled=False):
            return _Linear.apply(x, self.weight, cast)
