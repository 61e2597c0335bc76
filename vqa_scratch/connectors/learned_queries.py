"""What connectors have in common whose learned queries read the image.

Shapes: I images, N image tokens, Q queries, D width of the image encoder.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vqa_scratch.models.vit import resize_positions
from vqa_scratch.nn.connecting import Connector
from vqa_scratch.nn.neighbours import GridWaves, read_tiles
from vqa_scratch.nn.states import ImageEncoder, States


class LearnedQueries(Connector):
    """`queries` that read the image's tokens, to which a table adds their places again, as in `tokens`.

    `grid` is the (rows, columns) of that table, which is resized for other grids; None: no table, as in the runs from
    before there was one. `reads` is what `recipe` says of the image's states.
    """

    reads_text = False

    def __init__(self, image: ImageEncoder, grid: Sequence[int] | None) -> None:
        super().__init__()
        self.grid = None if grid is None else (grid[0], grid[1])
        self.prefix_tokens = image.prefix_tokens
        if self.grid is not None:
            self.places = nn.Parameter(torch.zeros(1, self.prefix_tokens + self.grid[0] * self.grid[1], image.dim))

    @property
    @abstractmethod
    def table(self) -> nn.Parameter:
        """(1, Q, width) or (Q, width): the learned queries."""

    @classmethod
    def sizes_for(cls, grid: tuple[int, int], options: Any) -> dict[str, Any]:
        return {"queries": options.queries, "heads": options.heads, "grid": list(grid)}

    @property
    def sizes(self) -> dict[str, Any]:
        grid = {} if self.grid is None else {"grid": list(self.grid)}
        return {"queries": self.table.shape[-2], **grid}

    def mixing(self, image: int, text: int, grid: tuple[int, int]) -> Tensor:
        return torch.eye(image + self.table.shape[-2])[image:]

    @property
    def reads(self) -> str:
        return "image_states" if self.grid is None else 'image_states + connector["places"]'

    @torch.no_grad()
    def start_from_places(self, places: GridWaves) -> None:
        if self.grid is None:
            return
        self.places[0, self.prefix_tokens :] = 2 * places.table()
        assert self.queries is not None
        blocks = self.queries.get_submodule("blocks").children()
        read_tiles(self.table, [block.get_submodule("cross") for block in blocks], places)

    def placed(self, image: States) -> Tensor:
        """(I, N, D)."""
        if self.grid is None:
            return image.tokens
        return image.tokens + resize_positions(self.places, self.grid, image.places.grid)
