"""The heard connector: image tokens are keys of the decoder's cross-attention, and what was heard of the question is a
prefix in the decoder's own sequence, where a typed question would be its prompt.

So every piece of the question looks at the image itself, as the words of a prompt do, and no transcript is made.

Shapes: I images, B rows, N image tokens, K pieces of sound, D width of the decoder.
"""

from typing import Any

from torch import Tensor, nn

from vqa_scratch.connectors.tokens import TokensConnector
from vqa_scratch.models.vit import resize_positions
from vqa_scratch.nn.connecting import Conditioning
from vqa_scratch.nn.decoding import Decoder
from vqa_scratch.nn.memory import Memory
from vqa_scratch.nn.states import ImageEncoder, States, TextEncoder


class HeardConnector(TokensConnector):
    """The image side is that of `tokens`; the `pieces` of the other side are normed and projected."""

    def __init__(
        self, image: ImageEncoder, text: TextEncoder, decoder: Decoder, *, grid: tuple[int, int], pieces: int
    ) -> None:
        super().__init__(image, None, decoder, grid=grid)
        self.pieces, self.norm = pieces, nn.LayerNorm(text.dim)
        self.text_projection = nn.Linear(text.dim, decoder.head.shape[1])

    @classmethod
    def prefix_length(cls, grid: tuple[int, int], sizes: dict[str, Any]) -> int:
        return int(sizes["pieces"])

    @property
    def sizes(self) -> dict[str, Any]:
        return super().sizes | {"pieces": self.pieces}

    def forward(self, image: States, text: States | None, image_index: Tensor | None = None) -> Conditioning:
        assert text is not None, "the question is heard"
        places = resize_positions(self.places, self.grid, image.places.grid)
        keys = self.image_projection(image.tokens) + places  # (I, N, D)
        said = self.text_projection(self.norm(text.tokens))  # (B, K, D)
        return Conditioning([Memory(keys, index=image_index)], prefix=said, prefix_mask=text.mask)
