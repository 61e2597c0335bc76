"""Heads that begin by looking near, as a convolution does, and learn on from there.

Positions made of sines and cosines turn by an angle with every place. A query that is turned by the angle of an offset
is most like the key so many places on. So plain weights of a head can look at a fixed distance (Cordonnier et al. 2020,
"On the Relationship between Self-Attention and Convolutional Layers", 1911.03584). ConViT begins so, with positions of
its own for it (d'Ascoli et al. 2021, 2103.10697); here the layout of a released model stays as it is.

Shapes: D width, N places, d head size, W waves (at most d / 2), A directions: 1 of a sequence, 2 of an image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqa_scratch.nn.attention import MultiHeadAttention

PEAK = 5.0  # score of the place that is looked at; of a place far from it about 0


@dataclass(frozen=True)
class Waves:
    """Channels of a position table whose sines and cosines turn with the place."""

    sines: Tensor  # (W,) channels
    cosines: Tensor  # (W,)
    angles: Tensor  # (W, A) radians by which each turns with a step in each direction


@torch.no_grad()
def look_near(attention: nn.Module, waves: Waves, offsets: Sequence[Sequence[float]]) -> None:
    """Add to the queries and keys of self-attention what makes each head look at an offset (A,), in places.

    Heads beyond the offsets take them in turn. Raises ValueError for more waves than a head has pairs of channels.
    """
    assert isinstance(attention, MultiHeadAttention)
    d, heads = attention.head_dim, attention.heads
    if 2 * len(waves.sines) > d:
        raise ValueError(f"{len(waves.sines)} waves are more than heads of {d} channels can compare")
    size = math.sqrt(PEAK / (attention.scale * len(waves.sines)))
    weight = attention.qkv.weight[: 2 * heads * d].unflatten(0, (2, heads, d))  # (2, heads, d, D)
    even = 2 * torch.arange(len(waves.sines))
    for head in range(heads):
        query, key = weight[0, head], weight[1, head]
        turn = waves.angles @ torch.tensor(offsets[head % len(offsets)], dtype=waves.angles.dtype)  # (W,)
        key[even, waves.sines] += size
        key[even + 1, waves.cosines] += size
        query[even, waves.sines] += size * turn.cos()
        query[even, waves.cosines] += size * turn.sin()
        query[even + 1, waves.cosines] += size * turn.cos()
        query[even + 1, waves.sines] -= size * turn.sin()
