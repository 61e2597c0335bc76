"""The interface of a connector: from the states of the encoders to the memory or prefix of the decoder.

Shapes: I images, B rows of the decoder (B >= I: several rows may share an image), N image tokens, T text tokens, Q
prefix tokens, D width of the decoder.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.nn.memory import Memory
from vqa_scratch.nn.neighbours import GridWaves
from vqa_scratch.nn.states import States


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the decoder reads besides its own tokens: memories for its cross-attention, or embeddings before its tokens.
    The latter are counted by positions; every token of a row sees all of them but padding, which stands in front."""

    memory: list[Memory] | None = None
    prefix: Tensor | None = None  # (I, Q, D); one that rows share is read once
    prefix_index: Tensor | None = None  # (B,) the prefix of each row; None: row b has prefix b
    prefix_mask: Tensor | None = None  # (I, Q) True = no padding; None: all of it

    @property
    def prefix_length(self) -> int:
        """Q: how many tokens stand before those of a row."""
        return 0 if self.prefix is None else self.prefix.shape[1]

    def seen(self, mask: Tensor | None, tokens: int) -> Tensor | None:
        """(B, Q + T): which of the prefix and of the T `tokens` after it are no padding, from the mask (B, T) of the
        latter; None: all of them, there as here."""
        if self.prefix_mask is None:
            return None if mask is None else F.pad(mask.bool(), (self.prefix_length, 0), value=True)
        before = self.prefix_mask if self.prefix_index is None else self.prefix_mask[self.prefix_index]
        return torch.cat([before, before.new_ones(len(before), tokens) if mask is None else mask.bool()], 1)


class Connector(nn.Module, ABC):
    """From the states of I images, and of B questions if there is a text encoder, to the conditioning of B rows.

    A subclass takes the image encoder, the text encoder (None if there is none, or if `reads_text` is False), the
    decoder, and its own keywords, which `sizes` returns. It only reads the sizes of the three, unless it `adds_layers`.
    """

    reads_text: ClassVar[bool] = True  # False: the question is only the decoder's prompt
    uses_memory: ClassVar[bool] = True  # whether the decoder reads memories by cross-attention
    adds_layers: ClassVar[bool] = False  # True: by that of layers which the connector adds to the decoder
    reads_pixels: ClassVar[bool] = False  # True: there is no image encoder, its states are patches of pixels

    @classmethod
    def sizes_for(cls, grid: tuple[int, int], options: Any) -> dict[str, Any]:
        """The keywords of a new connector, from the (rows, columns) of an image's places and the run's options."""
        return {}

    @classmethod
    def prefix_grid(cls, grid: tuple[int, int], sizes: dict[str, Any]) -> tuple[int, int] | None:
        """(rows, columns) of an image with this grid in the prefix, row by row; None if no token there is a place."""
        return None

    @classmethod
    def prefix_length(cls, grid: tuple[int, int], sizes: dict[str, Any]) -> int:
        """Q: how many positions of the decoder an image with this grid takes."""
        laid_out = cls.prefix_grid(grid, sizes)
        return 0 if laid_out is None else laid_out[0] * laid_out[1]

    @classmethod
    def needs_cross_attention(cls) -> bool:
        """Whether the decoder must have been built with cross-attention."""
        return cls.uses_memory and not cls.adds_layers

    @property
    def sizes(self) -> dict[str, Any]:
        """The keywords that build the same connector again."""
        return {}

    def start_from_places(self, places: GridWaves) -> None:
        """Begin with what tells the places of an image apart, if there is a table of them or learned queries."""

    def kept(self, image: States) -> States:
        """The part of the image's states that is used; a feature cache stores only this."""
        return image

    def kept_tokens(self, prefix_tokens: int, grid: tuple[int, int]) -> int:
        """How many tokens `kept` returns for an image with this many prefix tokens and places."""
        return prefix_tokens + grid[0] * grid[1]

    @property
    def queries(self) -> nn.Module | None:
        """The module of learned queries whose states are the prefix, with `blocks` that read the image; or None."""
        return None

    def marks(self, grid: tuple[int, int]) -> list[str]:
        """Labels of the M learned tokens, such as newlines, that it puts among those of an image with this grid."""
        return []

    @abstractmethod
    def mixing(self, image: int, text: int, grid: tuple[int, int]) -> Tensor:
        """(K, S): how much of each of the S = M + N + Q + T tokens (marks, image, queries, text) is in each of the K
        keys (or prefix tokens) of an image with this grid; rows sum to 1. For the tools that study a model."""

    @abstractmethod
    def recipe(self, with_text: bool) -> str:
        """The same written with plain tensors, for the README of an exported run: lines that make `memory` and `mask`,
        or `prefix`, of `image_states` (1, N, .), `text_states` (1, T, .), `attention_mask` (1, T), and the tensors of
        this connector by `connector[name]` and `linear(name, x)`."""

    def recipe_imports(self) -> list[str]:
        """Import lines that `recipe` needs."""
        return []

    @abstractmethod
    def forward(self, image: States, text: States | None, image_index: Tensor | None = None) -> Conditioning:
        """States (I, N, ...) and (B, T, ...) -> what the decoder reads.

        Row b is about image `image_index[b]`; None means image b.
        """
