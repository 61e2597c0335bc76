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
Addition = Callable[[Tensor, Tensor], object]  # changes its first argument, in place, by what it makes of the second


class DecoderLayer(NamedTuple):
    """x += attn(norm(x)), x += cross(cross_norm(x)) where there is one and it has a memory, mlp(x, mlp_norm(x))."""

    norm: Function
    attn: MultiHeadAttention
    cross_norm: Function | None
    cross: MultiHeadAttention | None
    mlp_norm: Function
    mlp: Addition


class DecoderParts(NamedTuple):
    """What a step goes through, in order."""

    embed: Callable[[Tensor, Tensor], Tensor]  # tokens (R,), positions (R,) -> (R, D), a tensor of its own
    layers: list[DecoderLayer]
    norm: Function  # (R, D) -> (R, D)
    logits: Function  # (..., D) -> (..., V)
    max_positions: int | None  # tokens that positions serve, prompt included; None: any number
    bias: Callable[[int], Tensor] | None = None  # n -> (1, H, 1, n), added to the scores of the last of n tokens


def _by_vector(weight: Tensor) -> bool:
    """Whether one row does not meet this weight as a matrix; see `layers.linear`."""
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu"


def _for_few_rows(weight: Tensor, bias: Tensor | None) -> Function | None:
    """The way that some rows of `layers.FEW_ROWS` take through this weight; None: as any other number."""
    return (lambda x: layers.one_dnn(x, weight, bias)) if layers.suits_one_dnn(weight) else None


def product(weight: Tensor, bias: Tensor | None) -> Function:
    """x (R, D) -> x weight^T + bias, (R, D')."""
    if torch.is_autocast_enabled(weight.device.type):  # which keeps its copy of a weight, not of a view of it
        return lambda x: F.linear(x, weight, bias)
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if _by_vector(weight):
        return lambda x: layers.linear(x, weight, bias)
    turned = weight.t()
    plain = (lambda x: torch.mm(x, turned)) if bias is None else (lambda x: torch.addmm(bias, x, turned))
    for_few = _for_few_rows(weight, bias)
    return plain if for_few is None else (lambda x: for_few(x) if len(x) in layers.FEW_ROWS else plain(x))


def linear(module: nn.Linear) -> Function:
    """(R, D) -> (R, D') through the weights of `module`."""
    return product(module.weight, module.bias)


def linear_into(module: nn.Linear) -> Addition:
    """(place, x): the same for one row x (1, D), written to a place (1, D')."""
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    if torch.is_autocast_enabled(weight.device.type) or _by_vector(weight):
        apply = linear(module)
        return lambda place, x: place.copy_(apply(x))
    turned = weight.t()
    if bias is None:
        return lambda place, x: torch.mm(x, turned, out=place)
    return lambda place, x: torch.addmm(bias, x, turned, out=place)


def adding(weight: Tensor, bias: Tensor | None) -> Addition:
    """A residual connection: x (R, D') += z (R, D) weight^T + bias, with no tensor in between."""
    if torch.is_autocast_enabled(weight.device.type) or _by_vector(weight):
        apply = product(weight, bias)
        return lambda x, z: x.add_(apply(z))
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    turned, for_few = weight.t(), _for_few_rows(weight, bias)
    plain = (lambda x, z: x.addmm_(z, turned)) if bias is None else (lambda x, z: x.addmm_(z, turned).add_(bias))
    return plain if for_few is None else (lambda x, z: x.add_(for_few(z)) if len(x) in layers.FEW_ROWS else plain(x, z))


def layer_norm(module: nn.LayerNorm) -> Function:
    """LayerNorm with the weights of `module`."""
    shape, weight, bias, eps = module.normalized_shape, module.weight, module.bias, module.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


def mlp(up: nn.Linear, activation: Activation, down: nn.Linear, gate: nn.Linear | None = None) -> Addition:
    """(x, h): x += `down(activation(up(h)))`, or with a gate `down(activation(gate(h)) * up(h))`."""
    rise, fall = linear(up), adding(down.weight, down.bias)
    if gate is None:
        return lambda x, h: fall(x, activation(rise(h)))
    open_gate = linear(gate)
    return lambda x, h: fall(x, activation(open_gate(h)) * rise(h))
