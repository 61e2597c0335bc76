"""The Q-Former of BLIP-2 (Li et al. 2023, arXiv 2301.12597, section 3.1): learned queries that read an image.

A BERT encoder whose input is the queries instead of words; every other block also reads the image by cross-attention.
The output has one token a query, whatever the size of the image.

Shapes: B batch, Q queries, N image tokens, D width, C width of the image encoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vqa_scratch.models.bert import BertBlock, BertConfig, BertLayout
from vqa_scratch.nn import taps
from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.nn.layers import init_weights
from vqa_scratch.nn.memory import Memory
from vqa_scratch.nn.relative_bias import ScoreBias
from vqa_scratch.weights import fields


@dataclass(frozen=True)
class QFormerConfig(BertConfig):
    """Sizes of a Q-Former; those of embeddings mean nothing here. The defaults are those of all released BLIP-2."""

    LAYOUTS: ClassVar[Mapping[str, BertLayout]] = {
        # one that reads text too is for retrieval
        "blip_2_qformer": BertLayout("Blip2QFormerModel", fields.QFORMER, fixed={"use_qformer_text_input": False})
    }

    layout: str = "blip_2_qformer"
    context_dim: int = 1408  # width of the image encoder
    cross_every: int = 2  # blocks 0, 2, 4, ... read the image


class QFormerBlock(BertBlock):
    """BERT's block with cross-attention to the image, if one is given, between its halves, post-LN like them."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__(config)
        self.cross = MultiHeadAttention(
            config.dim, config.heads, context_dim=config.context_dim, dropout=config.attention_dropout
        )
        self.norm_cross = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None = None,
        bias: ScoreBias | None = None,
        image: Memory | None = None,
    ) -> Tensor:
        x = taps.tap(self.tap_prefix, "resid_pre", x)
        x = self.norm1(x + self.dropout(self.attn(x, key_mask=key_mask, bias=bias)))
        if image is not None:
            x = self.norm_cross(x + self.dropout(self.cross(x, image)))
        x = taps.tap(self.tap_prefix, "resid_mid", x)
        return taps.tap(self.tap_prefix, "resid_post", self.norm2(x + self.mlp(x)))


class QFormer(nn.Module):
    """Learned queries, normed, through the blocks. There is no norm at the end: post-LN blocks end with one."""

    def __init__(self, config: QFormerConfig, queries: int) -> None:
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(torch.empty(1, queries, config.dim).normal_(std=config.init_std))
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            BertBlock(config) if layer % config.cross_every else QFormerBlock(config) for layer in range(config.layers)
        )
        self.blocks.apply(lambda module: init_weights(module, config.init_std))
        taps.name_modules(self.blocks, "query")

    def forward(self, image: Tensor, seen: Tensor | None = None) -> Tensor:
        """(B, N, C) -> (B, Q, D). `seen` (Q, N) says which tokens each query may read; None: all."""
        memory = Memory(image, seen=None if seen is None else seen.expand(len(image), -1, -1))
        x = self.dropout(self.norm(self.queries)).expand(len(image), -1, -1)
        for block in self.blocks:
            x = block(x, image=memory) if isinstance(block, QFormerBlock) else block(x)
        return x
