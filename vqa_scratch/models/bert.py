"""The text encoders BERT, DistilBERT and RoBERTa: one post-LN transformer, three checkpoint layouts.

Devlin et al. 2019 (1810.04805), Sanh et al. 2019 (1910.01108), Liu et al. 2019 (1907.11692). Only the embeddings
differ: DistilBERT has no token types; RoBERTa counts positions from the padding id + 1 and skips padding.

Shapes: B batch, T text tokens, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.models.hf_config import HFConfig, Layout, Released, check_heads
from vqa_scratch.nn import taps
from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.nn.layers import MLP, activation, init_weights
from vqa_scratch.nn.relative_bias import ScoreBias
from vqa_scratch.nn.states import States, TextEncoder
from vqa_scratch.weights import fields, maps


def positions_from_ids(input_ids: Tensor, pad_id: int) -> Tensor:
    """(B, T) RoBERTa position ids: tokens count from `pad_id` + 1, padding stays at `pad_id`."""
    real = (input_ids != pad_id).long()
    return real.cumsum(-1) * real + pad_id


@dataclass(frozen=True, eq=False)
class BertLayout(Layout):
    """What differs between the members of the family."""

    skips_padding: bool = False  # positions are those of `positions_from_ids`, not 0, 1, 2, ...


_ENCODER = {"is_decoder": False, "position_embedding_type": "absolute"}
LAYOUTS = {
    "bert": BertLayout("BertModel", fields.BERT, maps.BERT, fixed=_ENCODER),
    "distilbert": BertLayout(
        "DistilBertModel", fields.DISTILBERT, maps.DISTILBERT, {"layers": 6, "token_types": 0}, _ENCODER
    ),
    "roberta": BertLayout(
        "RobertaModel", fields.BERT, maps.ROBERTA, {"vocab_size": 50265, "pad_id": 1}, _ENCODER, skips_padding=True
    ),
}


@dataclass(frozen=True)
class BertConfig(HFConfig[BertLayout]):
    """Sizes of a BERT-like encoder. The defaults are bert-base-uncased."""

    LAYOUTS: ClassVar[Mapping[str, BertLayout]] = LAYOUTS

    layout: str = "bert"  # or distilbert, roberta
    vocab_size: int = 30522
    dim: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072  # inner width of the MLP
    max_positions: int = 512  # rows of the position table
    token_types: int = 2  # 0: no such table
    activation: str = "gelu"
    norm_eps: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    init_std: float = 0.02
    pad_id: int = 0

    def __post_init__(self) -> None:
        check_heads(self.dim, self.heads)
        if self.pad_id >= self.vocab_size:
            raise UserError(f"padding token {self.pad_id} is not among the {self.vocab_size} tokens of the vocabulary")
        if self.family.skips_padding and self.pad_id + 1 >= self.max_positions:
            raise UserError(f"positions begin after padding token {self.pad_id}: {self.max_positions} are too few")


class BertBlock(taps.Tapped):
    """Post-LN: norm(x + attention(x)), then norm(x + MLP(x))."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attn = MultiHeadAttention(config.dim, config.heads, dropout=config.attention_dropout)
        self.norm1 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = MLP(config.dim, config.hidden, activation(config.activation), dropout=config.dropout)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, key_mask: Tensor | None = None, bias: ScoreBias | None = None, **read: Any) -> Tensor:
        """(B, T, D) -> (B, T, D); a bias includes the mask, `read` is for `between`."""
        x = taps.tap(self.tap_prefix, "resid_pre", x)
        x = self.norm1(x + self.dropout(self.attn(x, key_mask=key_mask, bias=bias)))
        x = taps.tap(self.tap_prefix, "resid_mid", self.between(x, **read))
        return taps.tap(self.tap_prefix, "resid_post", self.norm2(x + self.mlp(x)))

    def between(self, x: Tensor) -> Tensor:
        """What a block does between its halves: here nothing."""
        return x


class Bert(Released[BertConfig], TextEncoder):
    """Embeddings, their sum normed, then post-LN blocks. No pooler: it belongs to the task."""

    config_class = BertConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config, self.layout, self.dim = config, config.family, config.dim
        first = config.pad_id + 1 if self.layout.skips_padding else 0
        self.longest = config.max_positions - first  # at most so many tokens
        self.tokens = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Embedding(config.max_positions, config.dim)
        self.token_types = nn.Embedding(config.token_types, config.dim) if config.token_types else None
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(BertBlock(config) for _ in range(config.layers))
        self.apply(lambda module: init_weights(module, config.init_std))
        taps.name_modules(self.blocks, "text")

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(B, T) -> (B, T, D); arguments as in `states`."""
        return self.states(input_ids, attention_mask, token_type_ids).tokens

    def states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> States:
        """(B, T) -> states (B, T, D) and their mask.

        attention_mask (B, T), True = may attend; token_type_ids (B, T) default to 0. Raises ValueError on more tokens
        than positions, or on token types for a model without them.
        """
        if input_ids.shape[1] > self.longest:
            raise ValueError(f"{input_ids.shape[1]} tokens, but the position table serves {self.longest}")
        if self.layout.skips_padding:
            position_ids = positions_from_ids(input_ids, self.config.pad_id)
        else:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        x = self.tokens(input_ids) + self.positions(position_ids)
        if self.token_types is not None:
            x = x + (self.token_types.weight[0] if token_type_ids is None else self.token_types(token_type_ids))
        elif token_type_ids is not None:
            raise ValueError(f"a {self.config.layout} encoder has no token types")
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x, attention_mask)
        return States(x, None if attention_mask is None else attention_mask.bool())
