"""What a decoder gives to decode fast: the parts of its blocks, in the order in which a token passes through them.

At small sizes a step of one token costs what its calls cost, so `generate/fast/` makes plain functions of these parts
and no module's forward runs. Every pre-norm decoder is the same loop over them; a decoder that is none has no parts.

Shapes: R rows (one token each), D width, E width of the head, H heads, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.nn.layers import Activation


class FastBlock(NamedTuple):
    """x += attn(norm(x)), x += cross(cross_norm(x)) if there is a memory, x += down(activation(up(mlp_norm(x)))).

    With a `gate` the last is down(activation(gate(h)) * up(h)).
    """

    norm: nn.Module
    attn: MultiHeadAttention
    cross_norm: nn.Module | None
    cross: MultiHeadAttention | None
    mlp_norm: nn.Module
    up: nn.Linear
    activation: Activation
    down: nn.Linear
    gate: nn.Linear | None = None


class FastParts(NamedTuple):
    """A whole decoder, in order: tokens and positions, blocks, the last norm, the head."""

    embed: Callable[[Tensor, Tensor], Tensor]  # tokens (R,), positions (R,) -> a new tensor (R, D)
    blocks: list[FastBlock]
    norm: Callable[[Tensor], Tensor]  # (R, D) -> (R, E): all that stands between the last block and the head
    head: Tensor  # (V, E)
    bias: Callable[[int], Tensor] | None = None  # n -> (1, H, 1, n), added to the scores of the last of n tokens
