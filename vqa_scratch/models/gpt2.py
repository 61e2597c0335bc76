"""GPT-2, the decoder of Radford et al. 2019, with optional cross-attention between self-attention and MLP.

Pre-LN, learned positions, tanh GELU, output head shared with the token embedding. `block_decoder.py` runs its
blocks.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from vqa_scratch.models.block_decoder import PositionTableDecoder, PreNormBlock
from vqa_scratch.models.hf_config import HFConfig, Layout, check_heads
from vqa_scratch.nn import taps
from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.nn.decoding import FastParts, fast_blocks
from vqa_scratch.nn.layers import MLP, activation, init_weights
from vqa_scratch.weights import fields, maps
from vqa_scratch.weights.convert import load_into

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GPT2Config(HFConfig[Layout]):
    """Sizes of a GPT-2. The defaults are the 124M model."""

    LAYOUTS: ClassVar[Mapping[str, Layout]] = {"gpt2": Layout("GPT2LMHeadModel", fields.GPT2, maps.GPT2)}

    vocab_size: int = 50257
    max_positions: int = 1024
    dim: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int | None = None  # inner width of the MLP; None: 4 * dim
    activation: str = "gelu_new"
    norm_eps: float = 1e-5
    embedding_dropout: float = 0.1
    dropout: float = 0.1
    attention_dropout: float = 0.1
    init_std: float = 0.02
    add_cross_attention: bool = False
    scale_scores: bool = True  # divide scores by sqrt(head size)
    scale_by_layer: bool = False  # and by the number of the layer, from 1 (Mistral's GPT-2)
    bos_id: int = 50256
    eos_id: int | tuple[int, ...] = 50256  # any of several ends a text
    pad_id: int | None = None  # GPT-2 was trained without padding

    layout: str = "gpt2"

    def __post_init__(self) -> None:
        check_heads(self.dim, self.heads)

    def mlp(self, hidden: int | None = None) -> nn.Module:
        """A new MLP of a block, of the inner width of this config or of another."""
        return MLP(self.dim, hidden or self.hidden or 4 * self.dim, activation(self.activation), dropout=self.dropout)


class GPT2Block(PreNormBlock):
    """Pre-LN, maybe with cross-attention."""

    def __init__(self, config: GPT2Config, layer: int, mlp: nn.Module) -> None:
        super().__init__(config.dropout)
        scale = (config.dim // config.heads) ** -0.5 if config.scale_scores else 1.0
        if config.scale_by_layer:
            scale /= layer + 1
        attention = partial(MultiHeadAttention, config.dim, config.heads, scale=scale, dropout=config.attention_dropout)
        self.norm1 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attn = attention()
        if config.add_cross_attention:
            self.norm_cross = nn.LayerNorm(config.dim, eps=config.norm_eps)
            self.cross = attention(context_dim=config.dim)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = mlp


class PostNormBlock(GPT2Block):
    """The same parts with each norm after its sublayer: OPT-350M, SpeechT5."""

    def add(self, x: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        return norm(x + sublayer(x))


class GPT2(PositionTableDecoder[GPT2Config]):
    """Tokens and positions, pre-LN blocks, a last norm, and a head that is the token embedding."""

    config_class = GPT2Config
    block = GPT2Block

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config, self.reads_memory, self.table_size = config, config.add_cross_attention, config.max_positions
        self.tokens = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Embedding(config.max_positions, config.dim)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.blocks = nn.ModuleList(self.block(config, layer, config.mlp()) for layer in range(config.layers))
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.apply(lambda module: init_weights(module, config.init_std))
        # Radford et al. 2019, section 2.3: residual projections start smaller by the root of their number.
        for name, parameter in self.named_parameters():
            if name.endswith(("attn.out.weight", "cross.out.weight", ".down.weight")):
                nn.init.normal_(parameter, std=config.init_std / math.sqrt(2 * config.layers))
        taps.name_modules(self.blocks, "decoder")

    def fast_state(self) -> FastParts:
        tokens_table, positions_table = self.tokens.weight.detach(), self.positions.weight.detach()

        def embed(tokens: Tensor, positions: Tensor) -> Tensor:
            return tokens_table.index_select(0, tokens).add_(positions_table.index_select(0, positions))

        return FastParts(embed, fast_blocks(self.blocks), self.norm, self.tokens)

    @classmethod
    def from_checkpoint(
        cls,
        config: Mapping[str, Any],
        tensors: dict[str, Tensor],
        source: str,
        *,
        add_cross_attention: bool | None = None,
    ) -> Self:
        """As in `Released`. `add_cross_attention=True` adds cross-attention to a checkpoint without it, such as plain
        gpt2: only those weights may be missing; they stay random, and one log line counts them. None follows the
        checkpoint."""
        sizes = GPT2Config.from_hf(config)
        if add_cross_attention is not None:
            sizes = replace(sizes, add_cross_attention=add_cross_attention)
        model = cls(sizes)
        fresh = load_into(model, tensors, model.key_map, optional=maps.GPT2_CROSS, source=source)
        if fresh:
            logger.warning("%s has no cross-attention: %d of its parameters start at random", source, len(fresh))
        return model.eval()
