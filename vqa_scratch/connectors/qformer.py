"""The Q-Former connector: learned queries read the image, and their states are a prefix of the decoder's sequence.

BLIP-2: Li et al. 2023 (arXiv 2301.12597, section 3.1). The decoder gets `queries` tokens for an image of any size.

Shapes: I images, B rows, N image tokens, Q queries, D width of the decoder.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vqa_scratch.models.qformer import QFormer, QFormerConfig
from vqa_scratch.nn.connecting import Conditioning, Connector
from vqa_scratch.nn.decoding import Decoder
from vqa_scratch.nn.states import ImageEncoder, States

RECIPE = """\
# Learned queries read the image; their states stand before the words.
qformer = QFormer({config}, {queries}).eval()
own = {{name: tensor for name, tensor in connector.items() if name.startswith("qformer.")}}
qformer.load_state_dict({{name.removeprefix("qformer."): tensor for name, tensor in own.items()}})
prefix = linear("projection", qformer(image_states))"""


class QFormerConnector(Connector):
    """A Q-Former with the decoder's width, in which every block reads the image, and a projection of its states."""

    reads_text = False
    uses_memory = False

    def __init__(
        self, image: ImageEncoder, text: None, decoder: Decoder, *, queries: int = 16, layers: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        width = decoder.config.dim
        config = QFormerConfig(
            dim=width,
            layers=layers,
            heads=heads,
            hidden=4 * width,
            context_dim=image.dim,
            cross_every=1,
            dropout=0.0,
            attention_dropout=0.0,
        )
        self.qformer = QFormer(config, queries)
        self.projection = nn.Linear(width, decoder.head.shape[1])

    @classmethod
    def sizes_for(cls, grid: tuple[int, int], options: Any) -> dict[str, Any]:
        return {"queries": options.queries, "heads": options.heads}

    @classmethod
    def prefix_length(cls, grid: tuple[int, int], sizes: dict[str, Any]) -> int:
        return sizes["queries"]

    @property
    def sizes(self) -> dict[str, Any]:
        config = self.qformer.config
        return {"queries": self.qformer.queries.shape[1], "layers": config.layers, "heads": config.heads}

    @property
    def queries(self) -> nn.Module:
        return self.qformer

    def mixing(self, image: int, text: int, grid: tuple[int, int]) -> Tensor:
        return torch.eye(image + self.qformer.queries.shape[1])[image:]

    def recipe(self, with_text: bool) -> str:
        return RECIPE.format(config=self.qformer.config, queries=self.qformer.queries.shape[1])

    def recipe_imports(self) -> list[str]:
        return ["from vqa_scratch.models import QFormer, QFormerConfig"]

    def forward(self, image: States, text: States | None, image_index: Tensor | None = None) -> Conditioning:
        prefix = self.projection(self.qformer(image.tokens))  # (I, Q, D)
        return Conditioning(prefix=prefix, prefix_index=image_index)
