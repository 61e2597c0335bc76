"""The patches connector: there is no image encoder; a linear map of the pixels of each patch, a newline after each row.

Fuyu (Adept 2023; `models/fuyu.py`): an image of any size becomes tokens in the order of reading, and where a patch lies
is told by the tokens before it alone. The question is the decoder's prompt.

Shapes: I images, B rows, h rows of w patches, Q = h * (w + 1) prefix tokens, E width of the decoder's embedding.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vqa_scratch.nn.connecting import Conditioning, Connector
from vqa_scratch.nn.decoding import Decoder
from vqa_scratch.nn.states import ImageEncoder, States, TextEncoder

RECIPE = """\
# The pixels of each patch go through a linear map and stand before the words.
prefix = linear("projection", image_states)"""
NEWLINES = """
# A learned newline ends each row of patches.
prefix = prefix.unflatten(1, image.places(*pixels.shape[2:]).grid)
prefix = torch.cat([prefix, connector["newline"].expand(1, prefix.shape[1], 1, -1)], 2).flatten(1, 2)"""


class PatchesConnector(Connector):
    """A linear map, and with `newlines` a learned token after each row of patches.

    Without them the decoder cannot tell how wide an image is: they are what makes any size readable.
    """

    reads_text = False
    uses_memory = False
    reads_pixels = True

    def __init__(
        self, image: ImageEncoder, text: TextEncoder | None, decoder: Decoder, *, newlines: bool = True
    ) -> None:
        super().__init__()
        width = decoder.head.shape[1]
        self.newlines = newlines
        self.projection = nn.Linear(image.dim, width)
        if newlines:
            self.newline = nn.Parameter(torch.randn(width) * decoder.config.init_std)

    @classmethod
    def sizes_for(cls, grid: tuple[int, int], options: Any) -> dict[str, Any]:
        return {"newlines": True}

    @classmethod
    def prefix_grid(cls, grid: tuple[int, int], sizes: dict[str, Any]) -> tuple[int, int] | None:
        return grid[0], grid[1] + sizes["newlines"]

    @property
    def sizes(self) -> dict[str, Any]:
        return {"newlines": self.newlines}

    def marks(self, grid: tuple[int, int]) -> list[str]:
        return [f"newline {row + 1}" for row in range(grid[0] * self.newlines)]

    def mixing(self, image: int, text: int, grid: tuple[int, int]) -> Tensor:
        tokens = torch.eye(len(self.marks(grid)) + image)
        if not self.newlines:
            return tokens
        newlines, patches = tokens[: grid[0], None], tokens[grid[0] :].unflatten(0, grid)
        return torch.cat([patches, newlines], 1).flatten(0, 1)

    def recipe(self, with_text: bool) -> str:
        return RECIPE + (NEWLINES if self.newlines else "")

    def forward(self, image: States, text: States | None, image_index: Tensor | None = None) -> Conditioning:
        prefix = self.projection(image.tokens)  # (I, h*w, E)
        if self.newlines:
            rows = prefix.unflatten(1, image.places.grid)
            ends = self.newline.to(rows.dtype).expand(*rows.shape[:2], 1, -1)
            prefix = torch.cat([rows, ends], 2).flatten(1, 2)  # (I, Q, E)
        return Conditioning(prefix=prefix, prefix_index=image_index)
