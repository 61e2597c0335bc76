"""A decoder taken apart for decoding: what one step of one token a row needs, as plain functions of its weights.

Every pre-norm decoder here is the same loop over the same parts; GPT-2, T5 and OPT differ in what the parts are. At
small sizes a step costs what its calls cost, so the functions call torch directly and no module stands between.

Shapes: R rows, D width, H heads.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.nn import layers
from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.nn.layers import Activation

Function = Callable[[Tensor], Tensor]


class DecoderLayer(NamedTuple):
    """x + attn(norm(x)), x + cross(cross_norm(x)) where there is one and it has a memory, x + mlp(mlp_norm(x))."""

    norm: Function
    attn: MultiHeadAttention
    cross_norm: Function | None
    cross: MultiHeadAttention | None
    mlp_norm: Function
    mlp: Function


class DecoderParts(NamedTuple):
    """What a step goes through, in order; the head is the decoder's own `logits`."""

    embed: Callable[[Tensor, Tensor], Tensor]  # tokens (R,), positions (R,) -> (R, D), a tensor of its own
    layers: list[DecoderLayer]
    norm: Function  # (R, D) -> (R, D)
    max_positions: int | None  # tokens that positions serve, prompt included; None: any number
    bias: Callable[[int], Tensor] | None = None  # n -> (1, H, 1, n), added to the scores of the last of n tokens


def linear(module: nn.Linear) -> Function:
    """(R, D) -> (R, D') through the weights of `module`."""
    weight, bias = module.weight, module.bias
    if torch.is_autocast_enabled(weight.device.type):  # which keeps its copy of a weight, not of a view of it
        return lambda x: F.linear(x, weight, bias)
    if weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        return lambda x: layers.linear(x, weight, bias)
    turned = weight.detach().t()
    return (lambda x: torch.mm(x, turned)) if bias is None else (lambda x: torch.addmm(bias, x, turned))


def layer_norm(module: nn.LayerNorm) -> Function:
    """LayerNorm with the weights of `module`."""
    shape, weight, bias, eps = module.normalized_shape, module.weight, module.bias, module.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


def mlp(up: nn.Linear, activation: Activation, down: nn.Linear, gate: nn.Linear | None = None) -> Function:
    """`down(activation(up(x)))`, or with a gate `down(activation(gate(x)) * up(x))`."""
    rise, fall = linear(up), linear(down)
    if gate is None:
        return lambda x: fall(activation(rise(x)))
    open_gate = linear(gate)
    return lambda x: fall(activation(open_gate(x)) * rise(x))
