"""The tokens connector: every image token and every question token is a key of the decoder's cross-attention.

Shapes: I images, B rows, N image tokens, T question tokens, D width of the decoder.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vqa_scratch.models.vit import resize_positions
from vqa_scratch.nn.connecting import Conditioning, Connector
from vqa_scratch.nn.decoding import Decoder
from vqa_scratch.nn.memory import Memory
from vqa_scratch.nn.neighbours import GridWaves
from vqa_scratch.nn.states import ImageEncoder, States, TextEncoder

RECIPE_IMAGE = """\
# Every image token is a key of the decoder's cross-attention, and is given its place once more.
memory = linear("image_projection", image_states) + connector["places"]
mask = torch.ones(memory.shape[:2])"""
RECIPE_BOTH = """\
# Every image token and every question token is a key of the decoder's cross-attention, marked by its modality; image
# tokens are given their places once more.
image_keys = linear("image_projection", image_states) + connector["places"] + connector["modality"][0]
text_keys = linear("text_projection", text_states) + connector["modality"][1]
memory = torch.cat([image_keys, text_keys], 1)
mask = torch.cat([torch.ones(image_keys.shape[:2]), attention_mask], 1)"""


class TokensConnector(Connector):
    """Image and question tokens are projected to the decoder's width. A modality embedding distinguishes them, if there
    are both, and a table adds the place of every image token again.

    `grid` is the (rows, columns) of that table, which is resized for other grids.
    """

    def __init__(
        self, image: ImageEncoder, text: TextEncoder | None, decoder: Decoder, *, grid: tuple[int, int]
    ) -> None:
        super().__init__()
        width = decoder.config.dim
        self.grid, self.prefix_tokens = (grid[0], grid[1]), image.prefix_tokens
        self.image_projection = nn.Linear(image.dim, width)
        if text is not None:
            self.text_projection = nn.Linear(text.dim, width)
            self.modality = nn.Parameter(torch.randn(2, width) * decoder.config.init_std)  # image, text
        # The keys get their places again, as in DETR (Carion et al. 2020): the states of an image encoder are about
        # content, and "left of" needs the place. The table starts at zero, which leaves pretrained states unchanged.
        self.places = nn.Parameter(torch.zeros(1, self.prefix_tokens + self.grid[0] * self.grid[1], width))

    @classmethod
    def sizes_for(cls, grid: tuple[int, int], options: Any) -> dict[str, Any]:
        return {"grid": list(grid)}

    @property
    def sizes(self) -> dict[str, Any]:
        return {"grid": list(self.grid)}

    @torch.no_grad()
    def start_from_places(self, places: GridWaves) -> None:
        self.places[0, self.prefix_tokens :] = places.table()

    def mixing(self, image: int, text: int, grid: tuple[int, int]) -> Tensor:
        return torch.eye(image + text)

    def recipe(self, with_text: bool) -> str:
        return RECIPE_BOTH if with_text else RECIPE_IMAGE

    def forward(self, image: States, text: States | None, image_index: Tensor | None = None) -> Conditioning:
        places = resize_positions(self.places, self.grid, image.places.grid)
        keys = self.image_projection(image.tokens) + places  # (I, N, D)
        if text is None:
            return Conditioning([Memory(keys, index=image_index)])
        words = self.text_projection(text.tokens) + self.modality[1]  # (B, T, D)
        return Conditioning([Memory(keys + self.modality[0], index=image_index), Memory(words, text.mask)])
