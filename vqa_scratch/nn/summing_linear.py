"""A linear layer for large weights that adds their gradient directly to `.grad`.

Autograd first computes the gradient of a weight and then adds it to `.grad`: 66 MB more for a head of 32,128 x 512,
while all activations are in memory. Megatron-LM (Shoeybi et al. 2019, 1909.08053) accumulates in the same way.

In fp32 on a CPU its products with a weight are oneDNN's, not MKL's as torch's are: on an AMD EPYC with AVX-512, 3,200
rows and the weights of flan-t5-small, they take 0.84 to 0.95 of the time. Those for the gradient of a weight do not.

Shapes: N rows (tokens), D inputs, V outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

HAS_ONE_DNN = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def one_dnn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear without gradients, by the operator that torch.compile uses for linear layers on a CPU."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def product(x: Tensor, weight: Tensor) -> Tensor:
    """(..., D) and (V, D) -> (..., V), as F.linear, without gradients."""
    ours = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and HAS_ONE_DNN
    return one_dnn(x, weight) if ours else F.linear(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cast: Tensor) -> Tensor:
        ctx.save_for_backward(x, cast)
        ctx.weight = weight
        return product(x, cast)

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
            return product(dy, cast.t()) if of_x else None, dweight, None


class SummingLinear(nn.Linear):
    """`nn.Linear` without a bias, for `loss.backward()`: `torch.autograd.grad` does not see what goes to `.grad`."""

    def forward(self, x: Tensor) -> Tensor:
        device, cast = x.device.type, self.weight.detach()
        if torch.is_autocast_enabled(device):
            if not torch.is_grad_enabled():
                return super().forward(x)  # autocast keeps its copy of the weight
            dtype = torch.get_autocast_dtype(device)
            x, cast = x.to(dtype), cast.to(dtype)
        with torch.autocast(device, enabled=False):
            return _Linear.apply(x, self.weight, cast) if torch.is_grad_enabled() else product(x, cast)
