"""The Q-Former connector: learned queries read the image, and their states are a prefix of the decoder's sequence.

BLIP-2: Li et al. 2023 (arXiv 2301.12597, section 3.1). The decoder gets `queries` tokens for an image of any size.

Shapes: I images, B rows, N image tokens, Q queries, D width of the decoder.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vqa_scratch.connectors.learned_queries import LearnedQueries
from vqa_scratch.models.qformer import QFormer, QFormerConfig
from vqa_scratch.nn.connecting import Conditioning
from vqa_scratch.nn.decoding import Decoder
from vqa_scratch.nn.neighbours import tiled
from vqa_scratch.nn.states import ImageEncoder, States

RECIPE = """\
# Learned queries read the image; their states stand before the words.
qformer = QFormer({config}, {queries}).eval()
own = {{name: tensor for name, tensor in connector.items() if name.startswith("qformer.")}}
qformer.load_state_dict({{name.removeprefix("qformer."): tensor for name, tensor in own.items()}})
prefix = linear("projection", qformer({reads}))"""


class QFormerConnector(LearnedQueries):
    """A Q-Former with the decoder's width, in which every block reads the image, and a projection of its states."""

    uses_memory = False

    def __init__(
        self,
        image: ImageEncoder,
        text: None,
        decoder: Decoder,
        *,
        queries: int = 16,
        layers: int = 2,
        heads: int = 4,
        grid: Sequence[int] | None = None,
        tiles: bool = False,
    ) -> None:
        super().__init__(image, grid, tiles)
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
    def prefix_grid(cls, grid: tuple[int, int], sizes: dict[str, Any]) -> tuple[int, int]:
        return tiled(sizes["queries"])

    @classmethod
    def prefix_length(cls, grid: tuple[int, int], sizes: dict[str, Any]) -> int:
        return sizes["queries"]

    @property
    def sizes(self) -> dict[str, Any]:
        config = self.qformer.config
        return super().sizes | {"layers": config.layers, "heads": config.heads}

    @property
    def table(self) -> nn.Parameter:
        return self.qformer.queries

    @property
    def queries(self) -> nn.Module:
        return self.qformer

    def recipe(self, with_text: bool) -> str:
        return RECIPE.format(config=self.qformer.config, queries=self.table.shape[1], reads=self.reads)

    def recipe_imports(self) -> list[str]:
        return ["from vqa_scratch.models import QFormer, QFormerConfig", *super().recipe_imports()]

    def forward(self, image: States, text: States | None, image_index: Tensor | None = None) -> Conditioning:
        prefix = self.projection(self.qformer(*self.read(image)))  # (I, Q, D)
        return Conditioning(prefix=prefix, prefix_index=image_index)
