"""The prefix connector: an MLP maps image tokens to embeddings before the words in the decoder's own sequence.

LLaVA: Liu et al. 2023, "Visual Instruction Tuning" (arXiv 2304.08485), with the two-layer MLP of version 1.5 (arXiv
2310.03744). There is no text encoder: the question is the decoder's prompt.

Shapes: I images, B rows, N image tokens, Q of them that are places, D width of the decoder.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.nn.connecting import Conditioning, Connector
from vqa_scratch.nn.decoding import Decoder
from vqa_scratch.nn.states import ImageEncoder, States


class PrefixConnector(Connector):
    """Linear, GELU, linear, on every place of the image, without class token and registers."""

    reads_text = False
    uses_memory = False

    def __init__(self, image: ImageEncoder, text: None, decoder: Decoder) -> None:
        super().__init__()
        self.skipped = image.prefix_tokens
        self.up = nn.Linear(image.dim, decoder.config.dim)
        self.down = nn.Linear(decoder.config.dim, decoder.head.shape[1])

    @classmethod
    def prefix_grid(cls, grid: tuple[int, int], sizes: dict[str, Any]) -> tuple[int, int] | None:
        return grid

    def kept(self, image: States) -> States:
        """Only the places."""
        return States(image.tokens[:, image.prefix_tokens :], places=image.places)

    def kept_tokens(self, prefix_tokens: int, grid: tuple[int, int]) -> int:
        return grid[0] * grid[1]

    def mixing(self, image: int, text: int, grid: tuple[int, int]) -> Tensor:
        return torch.eye(image)[self.skipped :]

    def recipe(self, with_text: bool) -> str:
        return (
            "# An MLP maps the places of the image to embeddings before the words.\n"
            f"places = image_states[:, {self.skipped}:]\n"
            'prefix = linear("down", torch.nn.functional.gelu(linear("up", places)))'
        )

    def forward(self, image: States, text: States | None, image_index: Tensor | None = None) -> Conditioning:
        prefix = self.down(F.gelu(self.up(image.tokens[:, image.prefix_tokens :])))  # (I, Q, D)
        return Conditioning(prefix=prefix, prefix_index=image_index)
