"""The gated MLP (Shazeer 2020, 2002.05202) with its own backward pass, which keeps fewer tensors for it.

With autograd `down(activation(gate(x)) * up(x))` keeps four tensors of the inner width: gate(x), up(x), the activation
and the product. Here the first two are kept and the others computed again: two elementwise steps more, next to nine
matrix products.

Shapes: N rows (tokens), D width, hidden the inner width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vqa_scratch.nn import taps
from vqa_scratch.nn.layers import Activation


def gated_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: Activation) -> Tensor:
    """x (..., D), gate and up (hidden, D), down (D, hidden) -> (..., D); in its dtype under autocast.

    `activation` is any elementwise function that torch differentiates. A second derivative raises RuntimeError.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, gate, up, down = (tensor.to(dtype) for tensor in (x, gate, up, down))
    with torch.autocast(device, enabled=False):
        return _GatedMLP.apply(x, gate, up, down, activation)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, activation: Activation) -> Tensor:
        gate, up = F.linear(x, w_gate), F.linear(x, w_up)
        ctx.save_for_backward(x, w_gate, w_up, w_down, gate, up)
        ctx.activation = activation
        return F.linear(activation(gate) * up, w_down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w_gate, w_up, w_down, gate, up = ctx.saved_tensors
        of_x, of_gate, of_up, of_down = ctx.needs_input_grad[:4]
        shape = x.shape
        x, dy, gate, up = (tensor.flatten(0, -2) for tensor in (x, dy, gate, up))  # (N, ...)
        with torch.autocast(dy.device.type, enabled=False):
            with torch.enable_grad():
                gate = gate.detach().requires_grad_()
                active = ctx.activation(gate)
            product = active.detach() * up
            dw_down = dy.t() @ product if of_down else None
            dproduct = dy @ w_down
            dup = torch.mul(dproduct, active.detach(), out=product)
            (dgate,) = torch.autograd.grad(active, gate, dproduct.mul_(up))
            dx = (dgate @ w_gate).addmm_(dup, w_up).view(shape) if of_x else None
            dw_gate = dgate.t() @ x if of_gate else None
            dw_up = dup.t() @ x if of_up else None
        return dx, dw_gate, dw_up, dw_down, None


class GatedMLP(taps.Tapped):
    """`down(activation(gate(x)) * up(x))` (Shazeer 2020, 2002.05202). (..., D) -> (..., D)."""

    def __init__(self, dim: int, hidden: int, activation: Activation, *, bias: bool = False, dropout: float = 0.0):
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=bias)
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)
        self.activation, self.dropout = activation, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        plain = isinstance(self.down, nn.Linear) and self.down.bias is None  # not quantised
        if not plain or taps.wanted(self.tap_prefix, "pre", "post"):
            gate = taps.tap(self.tap_prefix, "pre", self.gate(x))
            out = self.down(taps.tap(self.tap_prefix, "post", self.activation(gate) * self.up(x)))
        else:
            out = gated_mlp(x, self.gate.weight, self.up.weight, self.down.weight, self.activation)
        return taps.tap(self.tap_prefix, "out", self.dropout(out))
