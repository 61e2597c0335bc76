"""What an encoder gives: its states, which of them are real, and where in the image each one looks.

Shapes: M inputs (images or texts), N tokens, D width.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Places(NamedTuple):
    """A grid of tokens over an image, in raster order. Pixel k reaches from k to k + 1: its own centre is k + 0.5."""

    grid: tuple[int, int]  # (rows, columns)
    first: float  # pixel on which the first row and the first column are centred
    stride: float  # pixels from one row or column to the next

    def centre(self, row: int, column: int) -> tuple[float, float]:
        """(y, x) in pixels: what a token is about, as the middle of what it sees."""
        return self.first + self.stride * row, self.first + self.stride * column


@dataclass(frozen=True, eq=False)
class States:
    """The states of M inputs. The last `grid[0] * grid[1]` tokens are places, if there are any; what comes before them
    (class token, registers) is no place."""

    tokens: Tensor  # (M, N, D)
    mask: Tensor | None = None  # (M, N), True = a real token; None: all are
    places: Places | None = None

    @property
    def prefix_tokens(self) -> int:
        """How many of the N tokens stand before the places."""
        return (
            self.tokens.shape[1]
            if self.places is None
            else self.tokens.shape[1] - self.places.grid[0] * self.places.grid[1]
        )
