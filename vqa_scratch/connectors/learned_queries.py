"""What connectors have in common whose learned queries read the image.

Shapes: I images, N image tokens, Q queries, D width of the image encoder.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.models.vit import resize_positions
from vqa_scratch.nn.connecting import Connector
from vqa_scratch.nn.neighbours import GridWaves, places_of_tiles, read_tiles, tiled
from vqa_scratch.nn.states import ImageEncoder, States


class LearnedQueries(Connector):
    """`queries` that read the image's tokens, to which a table adds their places again, as in `tokens`.

    `grid` is the (rows, columns) of that table, which is resized for other grids; None: no table, as in the runs from
    before there was one. With `tiles` each query reads the places of its own tile of the image, as in the Spatial
    Vision Aggregator of Cambrian-1 (Tong et al. 2024, arXiv 2406.16860); without, each reads all of it. `reads` is what
    `recipe` says the queries are given. Raises UserError for tiles without a grid.
    """

    reads_text = False

    def __init__(self, image: ImageEncoder, grid: Sequence[int] | None, tiles: bool) -> None:
        super().__init__()
        if tiles and grid is None:
            raise UserError("learned queries that read a tile each need the grid of the image's places")
        self.grid, self.tiles = None if grid is None else (grid[0], grid[1]), tiles
        self.prefix_tokens = image.prefix_tokens
        if self.grid is not None:
            self.places = nn.Parameter(torch.zeros(1, self.prefix_tokens + self.grid[0] * self.grid[1], image.dim))

    @property
    @abstractmethod
    def table(self) -> nn.Parameter:
        """(1, Q, width) or (Q, width): the learned queries."""

    @classmethod
    def sizes_for(cls, grid: tuple[int, int], options: Any) -> dict[str, Any]:
        return {
            "queries": options.queries,
            "heads": options.heads,
            "grid": list(grid),
            "tiles": options.query_tiles,
        }

    @property
    def sizes(self) -> dict[str, Any]:
        grid = {} if self.grid is None else {"grid": list(self.grid)}
        return {"queries": self.table.shape[-2], **grid, "tiles": self.tiles}

    def mixing(self, image: int, text: int, grid: tuple[int, int]) -> Tensor:
        return torch.eye(image + self.table.shape[-2])[image:]

    @property
    def reads(self) -> str:
        if not self.tiles:
            return "image_states" if self.grid is None else 'image_states + connector["places"]'
        tiles = f"places_of_tiles({self.grid}, {tiled(self.table.shape[-2])})"
        return f'image_states + connector["places"], torch.nn.functional.pad({tiles}, ({self.prefix_tokens}, 0))'

    def recipe_imports(self) -> list[str]:
        return ["from vqa_scratch.nn.neighbours import places_of_tiles"] if self.tiles else []

    @torch.no_grad()
    def start_from_places(self, places: GridWaves) -> None:
        if self.grid is None:
            return
        self.places[0, self.prefix_tokens :] = 2 * places.table()
        assert self.queries is not None
        blocks = self.queries.get_submodule("blocks").children()
        read_tiles(self.table, [block.get_submodule("cross") for block in blocks], places)

    def read(self, image: States) -> tuple[Tensor, Tensor | None]:
        """What the queries are given: the image's tokens with their places (I, N, D), and which of them each query may
        read (Q, N), None if all."""
        if self.grid is None:
            return image.tokens, None
        placed = image.tokens + resize_positions(self.places, self.grid, image.places.grid)
        if not self.tiles:
            return placed, None
        tiles = places_of_tiles(image.places.grid, tiled(self.table.shape[-2])).to(placed.device)
        return placed, F.pad(tiles, (image.prefix_tokens, 0))  # a class token is in no tile
