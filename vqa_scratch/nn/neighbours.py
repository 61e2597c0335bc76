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


@dataclass(frozen=True)
class GridWaves:
    """The waves of a table for the places of an image: a quarter of the D channels each for the sines and cosines of
    columns, then of rows. Wavelengths go from 2 places to 4 grids."""

    grid: tuple[int, int]  # rows, columns
    dim: int  # D

    @property
    def angles(self) -> Tensor:
        """(D / 4,) radians a place."""
        return 2 * math.pi / torch.logspace(1.0, math.log2(4 * max(self.grid)), self.dim // 4, base=2.0)

    def waves(self, number: int) -> Waves:
        """So many of each direction, (columns, rows), from the shortest to the longest."""
        quarter = self.dim // 4
        kept = torch.linspace(0, quarter - 1, number).round().long()
        sines, angles = torch.cat([kept, 2 * quarter + kept]), self.angles[kept]
        return Waves(sines, quarter + sines, torch.block_diag(angles[:, None], angles[:, None]))

    def table(self, tiles: tuple[int, int] | None = None) -> Tensor:
        """(N, D) from -0.5 to 0.5: one row a place, or for the middles of (rows, columns) tiles that cut the grid."""
        rows, columns = (
            (torch.arange(number) + 0.5) * (side / number) - 0.5
            for side, number in zip(self.grid, tiles or self.grid, strict=True)
        )
        down, right = torch.meshgrid(rows, columns, indexing="ij")
        turned = [axis.flatten()[:, None] * self.angles for axis in (right, down)]  # (N, D / 4)
        return 0.5 * torch.cat([wave for angles in turned for wave in (angles.sin(), angles.cos())], 1)


def tiled(number: int) -> tuple[int, int]:
    """(rows, columns) of so many tiles, as near to a square as they come."""
    rows = next(side for side in range(math.isqrt(number), 0, -1) if number % side == 0)
    return rows, number // rows


def places_of_tiles(grid: tuple[int, int], tiles: tuple[int, int]) -> Tensor:
    """(Q, N) bool: the places of a grid in each of (rows, columns) tiles, both row by row.

    Tiles that do not divide the grid share the places on their borders, as the windows of adaptive pooling do, so each
    has one at least.
    """

    def spans(places: int, tiles: int) -> Tensor:
        place, tile = torch.arange(places), torch.arange(tiles)[:, None]
        return (place >= tile * places // tiles) & (place * tiles < (tile + 1) * places)

    down, right = map(spans, grid, tiles)
    return (down[:, None, :, None] & right[None, :, None, :]).flatten(2).flatten(0, 1)


@torch.no_grad()
def look_near(attention: nn.Module, waves: Waves, offsets: Sequence[Sequence[float]]) -> None:
    """Add to the queries and keys of attention what makes each head look at an offset (A,), in places.

    In cross-attention both sides have the waves. Heads beyond the offsets take them in turn. Raises ValueError for more
    waves than a head has pairs of channels.
    """
    assert isinstance(attention, MultiHeadAttention)
    d, heads = attention.head_dim, attention.heads
    if 2 * len(waves.sines) > d:
        raise ValueError(f"{len(waves.sines)} waves are more than heads of {d} channels can compare")
    size = math.sqrt(PEAK / (attention.scale * len(waves.sines)))
    both = (attention.q.weight, attention.kv.weight) if attention.is_cross else attention.qkv.weight.split(heads * d)
    queries, keys = (weight[: heads * d].unflatten(0, (heads, d)) for weight in both[:2])  # (heads, d, D)
    even = 2 * torch.arange(len(waves.sines))
    for head in range(heads):
        query, key = queries[head], keys[head]
        turn = waves.angles @ torch.tensor(offsets[head % len(offsets)], dtype=waves.angles.dtype)  # (W,)
        key[even, waves.sines] += size
        key[even + 1, waves.cosines] += size
        query[even, waves.sines] += size * turn.cos()
        query[even, waves.cosines] += size * turn.sin()
        query[even + 1, waves.cosines] += size * turn.cos()
        query[even + 1, waves.sines] -= size * turn.sin()


@torch.no_grad()
def read_tiles(queries: nn.Parameter, readers: Sequence[nn.Module], places: GridWaves) -> None:
    """Let queries (..., Q, D) begin as the middles of Q tiles of an image, each head of `readers` at a quarter of it.

    Queries that begin alike see the mean of the image, and find out late that it has places (bench/RESULTS.md).
    """
    tiles = tiled(queries.shape[-2])
    queries[...] = 2 * places.table(tiles)
    down, right = (side / number / 4 for side, number in zip(places.grid, tiles, strict=True))
    for reader in readers:
        assert isinstance(reader, MultiHeadAttention)
        look_near(reader, places.waves(reader.head_dim // 4), [[x, y] for y in (-down, down) for x in (-right, right)])
