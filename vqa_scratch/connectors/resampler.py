"""The resampler connector: learned latents read the image, and gated layers in the decoder read the latents.

Flamingo: Alayrac et al. 2022 (arXiv 2204.14198), as OpenFlamingo builds it (Awadalla et al. 2023, 2308.01390). The
decoder gets `queries` keys for an image of any size, in layers of their own before its blocks. Their gates start at
zero, so that at first the decoder says what it would say without an image; `small_models` opens them, for a decoder
that has learned nothing yet. The question is the decoder's prompt.

Shapes: I images, N image tokens, Q latents, D width of the image encoder.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vqa_scratch.connectors.learned_queries import LearnedQueries
from vqa_scratch.models.hf_config import ReleasedDecoder, check_heads
from vqa_scratch.models.resampler import Resampler, ResamplerConfig
from vqa_scratch.nn import taps
from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.nn.connecting import Conditioning
from vqa_scratch.nn.gated_cross import flamingo_layer
from vqa_scratch.nn.memory import Memory
from vqa_scratch.nn.neighbours import GridWaves
from vqa_scratch.nn.states import ImageEncoder, States, TextEncoder

RECIPE = """\
# Learned latents read the image; gated layers, each before a block of the decoder, read them.
def part(start):
    return {{name.removeprefix(start): tensor for name, tensor in connector.items() if name.startswith(start)}}

resampler = Resampler({config}).eval()
resampler.load_state_dict(part("resampler."))
memory = [Memory(resampler({reads}))]
blocks = next(module for module in decoder.modules() if isinstance(module, torch.nn.ModuleList))
for number, block in enumerate(blocks):
    layer = flamingo_layer({sizes}).eval()
    layer.load_state_dict(part(f"gated.{{number}}."))
    block.register_forward_pre_hook(lambda block, x, layer=layer: (layer(x[0], memory, None), *x[1:]))"""


class ResamplerConnector(LearnedQueries):
    """A Perceiver resampler of the image encoder's width, and a gated layer before each block of the decoder."""

    adds_layers = True

    def __init__(
        self,
        image: ImageEncoder,
        text: TextEncoder | None,
        decoder: ReleasedDecoder,
        *,
        queries: int = 16,
        layers: int = 2,
        heads: int = 4,
        grid: Sequence[int] | None = None,
        tiles: bool = False,
    ) -> None:
        super().__init__(image, grid, tiles)
        width = decoder.config.dim
        for dim in (image.dim, width):
            check_heads(dim, heads)
        config = ResamplerConfig(image.dim, latents=queries, layers=layers, heads=heads, head_dim=image.dim // heads)
        self.resampler = Resampler(config)
        taps.name_modules(self.resampler.blocks, "query")
        self.layer = {"dim": width, "context_dim": image.dim, "heads": heads, "head_dim": width // heads}
        decoder.add_gated({number: flamingo_layer(**self.layer) for number in range(decoder.config.layers)})

    @property
    def sizes(self) -> dict[str, Any]:
        config = self.resampler.config
        return super().sizes | {"layers": config.layers, "heads": config.heads}

    @property
    def table(self) -> nn.Parameter:
        return self.resampler.latents

    @property
    def queries(self) -> nn.Module:
        return self.resampler

    @torch.no_grad()
    def start_from_places(self, places: GridWaves) -> None:
        """What a latent reads of the image begins about as large as the latent: of a sixteenth, a run may never learn
        that there is an image (bench/RESULTS.md)."""
        super().start_from_places(places)
        for block in self.resampler.blocks.children():
            cross = block.get_submodule("cross")
            assert isinstance(cross, MultiHeadAttention)
            nn.init.xavier_uniform_(cross.kv.weight[cross.heads * cross.head_dim :])
            nn.init.xavier_uniform_(cross.out.weight)

    def recipe(self, with_text: bool) -> str:
        sizes = ", ".join(f"{name}={value}" for name, value in self.layer.items())
        return RECIPE.format(config=self.resampler.config, sizes=sizes, reads=self.reads)

    def recipe_imports(self) -> list[str]:
        return [
            "from vqa_scratch.models.resampler import Resampler, ResamplerConfig",
            "from vqa_scratch.nn import Memory",
            "from vqa_scratch.nn.gated_cross import flamingo_layer",
            *super().recipe_imports(),
        ]

    def forward(self, image: States, text: States | None, image_index: Tensor | None = None) -> Conditioning:
        return Conditioning([Memory(self.resampler(*self.read(image)), index=image_index)])  # (I, Q, D)
