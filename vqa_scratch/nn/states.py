"""The interface of an encoder, and its output: states, which of them are real, and their places in the image.

Shapes: M inputs (images or texts), N tokens, D width.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn


class Places(NamedTuple):
    """A grid of tokens over an image, in raster order. Pixel k spans k to k + 1, so its centre is k + 0.5."""

    grid: tuple[int, int]  # (rows, columns)
    first: float  # centre of the first row and the first column, in pixels
    stride: float  # pixels from one row or column to the next


NOWHERE = Places((0, 0), 0.0, 0.0)  # of the tokens of a text


@dataclass(frozen=True, eq=False)
class States:
    """The states of M inputs. The places are of the last `grid[0] * grid[1]` tokens; the tokens before them
    (class token, registers) have no place."""

    tokens: Tensor  # (M, N, D)
    mask: Tensor | None = None  # (M, N), True = a real token; None: all are
    places: Places = NOWHERE

    @property
    def prefix_tokens(self) -> int:
        """How many of the N tokens are before the places."""
        rows, columns = self.places.grid
        return self.tokens.shape[1] - rows * columns


class ImageEncoder(nn.Module, ABC):
    """Turns images into states."""

    config: Any  # has `channels`
    dim: int  # D
    prefix_tokens: int  # how many of the N tokens are before the places

    @abstractmethod
    def places(self, height: int, width: int) -> Places:
        """The places of an image of this size in pixels. Raises ValueError for a size that cannot be."""

    @abstractmethod
    def states(self, pixel_values: Tensor) -> States:
        """(M, C, H, W) -> states (M, N, D) with their places."""


class TextEncoder(nn.Module, ABC):
    """Turns texts into states, read as ids or heard as sound."""

    config: Any
    dim: int  # D
    longest: int  # tokens at most, N

    @abstractmethod
    def states(self, inputs: Tensor, mask: Tensor | None = None) -> States:
        """Texts (M, T), or sounds (M, mels, frames), and which of their tokens or states are real -> (M, N, D)."""


class Stem(nn.Module):
    """Turns the pixels of a ViT into tokens, (M, C, H, W) -> (M, N, D): one for each square of patch_size x patch_size
    pixels, in raster order."""

    first: float  # the pixel on which the first token is centred, in both directions
