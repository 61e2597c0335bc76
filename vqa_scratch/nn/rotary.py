"""Rotary positions (RoPE; Su et al. 2021, arXiv 2104.09864): a position turns pairs of a head's numbers by angles.

The pair of dimensions i and i + r/2 turns by position * f_i, where f_i = theta^(-2i/r). Then the score of a query and a
key depends on how far apart they are, not on where they stand. Files of later models change the frequencies so that
longer texts need no angle that training has not seen: "linear" divides all of them (Chen et al. 2023, arXiv
2306.15595), "llama3" the low ones (Grattafiori et al. 2024, arXiv 2407.21783).

Shapes: B rows, H heads, T tokens, R rows of one token, d head size, r <= d its numbers that turn.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """The turns of some positions. Calling it turns heads (..., d): their first r numbers."""

    cos: Tensor  # (..., r), in fp32
    sin: Tensor  # (..., r), in fp32; the first half has the minus of the turn

    def __call__(self, x: Tensor) -> Tensor:
        size = self.cos.shape[-1]
        turned = x[..., :size]
        turned = turned * self.cos.to(x.dtype) + turned.roll(size // 2, -1) * self.sin.to(x.dtype)
        return turned if size == x.shape[-1] else torch.cat([turned, x[..., size:]], -1)

    def in_place(self, x: Tensor) -> None:
        """The same without gradients, written to x."""
        size = self.cos.shape[-1]
        turned = x if size == x.shape[-1] else x.narrow(-1, 0, size)
        opposite = turned.roll(size // 2, -1)
        turned.mul_(self.cos).addcmul_(opposite, self.sin)

    def of(self, positions: Tensor) -> "Rotation":
        """(R,) of the positions 0, 1, 2, ... that this one has, for heads (R, H, d)."""
        return Rotation(*(table.index_select(0, positions).unsqueeze(1) for table in self))

    def to(self, dtype: torch.dtype) -> "Rotation":
        return Rotation(self.cos.to(dtype), self.sin.to(dtype))


@dataclass(frozen=True)
class Rotary:
    """The frequencies of a model; it has no parameters."""

    theta: float = 10_000.0
    share: float = 1.0  # of each head that turns: r = int(share * d)
    kind: str = "default"  # or "linear", "llama3"
    factor: float = 1.0  # by which frequencies are divided
    low: float = 1.0  # llama3: with fewer turns than this in `original` positions, a frequency is divided by `factor`
    high: float = 4.0  # llama3: with more turns than this it stays; between the two it is a mean of both
    original: int = 8192  # positions of the training before that

    def frequencies(self, head_dim: int, device: torch.device | None = None) -> Tensor:
        """(r/2,) radians a position, in fp32."""
        size = int(head_dim * self.share)
        frequencies = 1.0 / self.theta ** (torch.arange(0, size, 2, device=device).float() / size)
        if self.kind == "default":
            return frequencies
        if self.kind == "linear":
            return frequencies / self.factor
        turns = self.original / (2 * math.pi / frequencies)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
        return (1 - kept) * frequencies / self.factor + kept * frequencies

    def rotation(self, positions: Tensor, head_dim: int) -> Rotation:
        """Whole positions (...) -> their rotation. Angles are made in fp32: bf16 has no 257."""
        angles = positions[..., None].float() * self.frequencies(head_dim, positions.device)
        sin = angles.sin()
        return Rotation(torch.cat([angles.cos()] * 2, -1), torch.cat([-sin, sin], -1))
