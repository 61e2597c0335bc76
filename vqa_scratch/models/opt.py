"""OPT, the open decoders of Zhang et al. 2022 (arXiv 2205.01068): GPT-2's block with ReLU, and three differences.

Positions count attended tokens and start at row 2 of their table; the embedding may be narrower than the blocks, with a
linear map on either side; and one model (350M) has its norms after each sublayer instead of before it.

Shapes: B rows, T tokens, D width, E width of the embedding (mostly D), V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from vqa_scratch.models.block_decoder import PositionTableDecoder
from vqa_scratch.models.gpt2 import GPT2Block, GPT2Config, PostNormBlock
from vqa_scratch.models.hf_config import Layout
from vqa_scratch.nn import taps
from vqa_scratch.nn.decoding import FastParts, fast_blocks
from vqa_scratch.nn.layers import init_weights
from vqa_scratch.weights import fields, maps

OFFSET = 2  # rows of the position table that no token uses: fairseq kept them for padding
# Options of the layout that no released OPT uses.
_FIXED = {"enable_bias": True, "layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False}


@dataclass(frozen=True)
class OPTConfig(GPT2Config):
    """Sizes of an OPT, named as in GPT-2. The defaults are the 125M model."""

    LAYOUTS: ClassVar[Mapping[str, Layout]] = {"opt": Layout("OPTForCausalLM", fields.OPT, maps.OPT, fixed=_FIXED)}

    vocab_size: int = 50272
    max_positions: int = 2048
    hidden: int = 3072  # inner width of the MLP
    activation: str = "relu"
    attention_dropout: float = 0.0
    bos_id: int = 2
    eos_id: int | tuple[int, ...] = 2
    pad_id: int = 1
    layout: str = "opt"
    embedding_dim: int | None = None  # None: dim
    norm_first: bool = True  # False: post-LN, and no norm at the end

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embedding_dim is None:
            object.__setattr__(self, "embedding_dim", self.dim)


class OPT(PositionTableDecoder[OPTConfig]):
    """Tokens and positions, blocks, a last norm, and a head that is the token embedding."""

    config_class = OPTConfig

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        self.config, self.reads_memory, self.table_size = config, config.add_cross_attention, config.max_positions
        block = GPT2Block if config.norm_first else PostNormBlock
        width = config.embedding_dim or config.dim
        narrow = width != config.dim
        self.tokens = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(config.max_positions + OFFSET, config.dim)
        self.project_in = nn.Linear(width, config.dim, bias=False) if narrow else nn.Identity()
        self.blocks = nn.ModuleList(block(config, layer, config.mlp()) for layer in range(config.layers))
        self.norm = nn.LayerNorm(config.dim) if config.norm_first else nn.Identity()
        self.project_out = nn.Linear(config.dim, width, bias=False) if narrow else nn.Identity()
        self.apply(lambda module: init_weights(module, config.init_std))
        taps.name_modules(self.blocks, "decoder")

    def before_blocks(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        return self.project_in(embeddings) + self.positions(positions + OFFSET)

    def after_blocks(self, x: Tensor) -> Tensor:
        return self.project_out(self.norm(x))

    @property
    def direct_head(self) -> Tensor | None:
        return super().direct_head if self.config.norm_first and self.config.embedding_dim == self.config.dim else None

    def fast_state(self) -> FastParts | None:
        if not self.config.norm_first:  # the loop over `FastBlock`s is pre-LN
            return None

        def embed(tokens: Tensor, positions: Tensor) -> Tensor:
            return self.before_blocks(self.tokens(tokens), positions)

        narrow = self.config.embedding_dim != self.config.dim
        norm = nn.Sequential(self.norm, self.project_out) if narrow else self.norm
        return FastParts(embed, fast_blocks(self.blocks), norm, self.tokens)
