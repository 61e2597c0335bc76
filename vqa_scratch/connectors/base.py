"""What a connector is: it takes the states of the encoders and says what the decoder is given.

Shapes: I images, B rows of the decoder (B >= I: an image may serve several), N image tokens, T text tokens, Q tokens of
a prefix, D width of the decoder.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from vqa_scratch.nn.memory import Memory
from vqa_scratch.nn.states import States


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the decoder is given beside its own tokens: memories that its cross-attention reads, or embeddings that
    stand before its tokens. Every token of a row sees all of it."""

    memory: list[Memory] | None = None
    prefix: Tensor | None = None  # (B, Q, D)


class Connector(nn.Module, ABC):
    """From the states of I images, and of B questions if there is a text encoder, to what B rows of the decoder get.

    A subclass takes the image encoder, the text encoder (None if there is none, or if `reads_text` is False), the
    decoder, and then what else it needs as keywords, which `sizes` gives back. It reads their widths only; the modules
    stay where they are.
    """

    reads_text: ClassVar[bool] = True  # False: the question reaches the decoder as a prompt alone
    uses_memory: ClassVar[bool] = True  # whether the decoder needs cross-attention

    @classmethod
    def sizes_for(cls, grid: tuple[int, int], options: Any) -> dict[str, Any]:
        """The keywords of a new connector, from the (rows, columns) of an image's places and the options of the run."""
        return {}

    @classmethod
    def prefix_length(cls, grid: tuple[int, int], sizes: dict[str, Any]) -> int:
        """Q: how many positions of the decoder it takes, for an image of such a grid."""
        return 0

    @property
    def sizes(self) -> dict[str, Any]:
        """The keywords that build the same connector again."""
        return {}

    def start_from_places(self, table: Tensor) -> None:
        """Let a table of places, if there is one, begin as `table` (N, D): one row a place."""

    def kept(self, image: States) -> States:
        """What of the image's states is read at all; a feature cache keeps no more."""
        return image

    def kept_tokens(self, prefix_tokens: int, grid: tuple[int, int]) -> int:
        """How many tokens `kept` leaves of an image with so many prefix tokens and places."""
        return prefix_tokens + grid[0] * grid[1]

    @property
    def queries(self) -> nn.Module | None:
        """Learned queries whose states are the prefix, if it has any: a module with `blocks` that read the image."""
        return None

    @abstractmethod
    def mixing(self, image: int, text: int) -> Tensor:
        """(K, S): which of the S = N + Q + T tokens of image, queries and text each of the K keys (or tokens of the
        prefix) is made of; rows sum to 1. For the tools that study a model."""

    @abstractmethod
    def recipe(self, with_text: bool) -> str:
        """The same written with plain tensors, for the README of an exported run: lines that make `memory` and `mask`,
        or `prefix`, of `image_states` (1, N, .), `text_states` (1, T, .), `attention_mask` (1, T), and the tensors of
        this connector by `connector[name]` and `linear(name, x)`."""

    def recipe_imports(self, with_text: bool) -> list[str]:
        """Import lines that `recipe` needs."""
        return []

    @abstractmethod
    def forward(self, image: States, text: States | None, image_index: Tensor | None = None) -> Conditioning:
        """States (I, N, ...) and (B, T, ...) -> what the decoder is given.

        Row b is about image `image_index[b]`; None means that row b is about image b.
        """
