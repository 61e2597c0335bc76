"""A decoder of pre-norm blocks: what GPT-2, OPT and Llama have in common, and what the first two have besides.

Cross-attention, between self-attention and MLP, reads one or several memories (see `nn.memory`); without one its
sublayer is skipped, which makes the model a plain language model.

Shapes: B rows, T tokens, N memory tokens, D width of the blocks, E width of the embedding (mostly D), V vocabulary.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vqa_scratch.models.hf_config import C, ReleasedDecoder
from vqa_scratch.nn import taps
from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.nn.cache import DecoderCache, KVCache
from vqa_scratch.nn.decoding import FastBlock, FastMLP, Reader
from vqa_scratch.nn.gated_cross import GatedCrossAttention
from vqa_scratch.nn.layers import decoder_positions
from vqa_scratch.nn.memory import Memory
from vqa_scratch.nn.rotary import Rotation


class PreNormBlock(taps.Tapped):
    """x + self-attention, x + cross-attention (if built with it and given a memory), x + MLP, each of a norm of x.

    A subclass builds the parts. `dropout` is of what the attentions add; `gated`, a layer that reads images, may stand
    before them (`ReleasedDecoder.add_gated`).
    """

    norm1: nn.Module
    attn: MultiHeadAttention
    norm_cross: nn.Module
    cross: MultiHeadAttention
    norm2: nn.Module
    mlp: nn.Module

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.gated: GatedCrossAttention | None = None
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None,
        memory: list[Memory] | None,
        cache: KVCache | None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D). The rotation is that of the tokens (B or 1, 1, T, r)."""
        x = x if self.gated is None else self.gated(x, memory, cache)
        x = taps.tap(self.tap_prefix, "resid_pre", x)
        how: dict[str, Any] = {"key_mask": key_mask, "causal": True, "cache": cache, "rotate": rotation}
        x = self.add(x, self.norm1, lambda h: self.dropout(self.attn(h, **how)))
        if self.reads(memory, cache):
            x = self.add(x, self.norm_cross, lambda h: self.dropout(self.cross(h, memory, cache=cache)))
        x = taps.tap(self.tap_prefix, "resid_mid", x)
        return taps.tap(
            self.tap_prefix, "resid_post", self.add(x, self.norm2, lambda h: self.feed_forward(h, key_mask))
        )

    def add(self, x: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """x (B, T, D) with what a sublayer makes of its norm."""
        return x + sublayer(norm(x))

    def reads(self, memory: list[Memory] | None, cache: KVCache | None) -> bool:
        """Whether cross-attention runs: the block has it, and there is something to read."""
        return hasattr(self, "cross") and (memory is not None or (cache is not None and cache.cross is not None))

    def feed_forward(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        """The MLP of the tokens (B, T, D), the last of those that key_mask is about."""
        return self.mlp(x)

    def fast_block(self) -> FastBlock:
        """The parts of the block, for `generate`."""
        cross = Reader(self.norm_cross, self.cross) if hasattr(self, "cross") else None
        gated = None if self.gated is None else self.gated.fast_parts()
        return FastBlock(self.norm1, self.attn, cross, FastMLP(self.norm2, self.mlp), gated)


class ExpertBlock(PreNormBlock):
    """A block whose MLP is a mixture of experts, to which no padding is sent."""

    def feed_forward(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        return self.mlp(x, None if key_mask is None else key_mask[:, -x.shape[1] :].bool())


class BlockDecoder(ReleasedDecoder[C]):
    """Token embedding, blocks one after the other, a last norm."""

    tokens: nn.Embedding
    table_size: int | None = None  # rows of a table of positions

    def embed(self, ids: Tensor) -> Tensor:
        return self.tokens(ids)

    def before_blocks(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        """Embeddings (B, T, E), position ids (B or 1, T) -> (B, T, D), what the first block reads."""
        return embeddings

    def rotation(self, positions: Tensor) -> Rotation | None:
        """Positions (...) -> what turns queries and keys there; None: nothing does."""
        return None

    def after_blocks(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def hidden(
        self,
        embeddings: Tensor,
        attention_mask: Tensor | None = None,
        *,
        memory: list[Memory] | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """(B, T, E) -> (B, T, E), the states before the head; all as in `Decoder.hidden`."""
        if memory is not None and not self.reads_memory:
            how = "build GPT2 with add_cross_attention=True, or add gated layers"
            raise ValueError(f"this decoder has no cross-attention: {how}")
        positions = decoder_positions(embeddings, attention_mask, cache, self.table_size)
        x, rotation = self.before_blocks(embeddings, positions), self.rotation(positions[:, None])
        for layer, block in enumerate(self.blocks):
            x = block(x, attention_mask, memory, None if cache is None else cache[layer], rotation)
        return self.after_blocks(x)


class PositionTableDecoder(BlockDecoder[C]):
    """Of GPT-2 and OPT: positions are a table, and the head is the token embedding."""

    positions: nn.Embedding
    dropout: nn.Module  # of the sum of tokens and positions

    @property
    def head(self) -> Tensor:
        return self.tokens.weight

    def before_blocks(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        return self.dropout(embeddings + self.positions(positions))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *,
        memory: list[Memory] | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """(B, T) -> logits (B, T, V).

        Cross-attention reads encoder_hidden_states (B, N, D) with their mask (B, N), or `memory`; other arguments as in
        `hidden`.
        """
        if encoder_hidden_states is not None:
            if memory is not None:
                raise ValueError("give encoder_hidden_states or memory, not both")
            memory = [Memory(encoder_hidden_states, encoder_attention_mask)]
        return self.logits(self.hidden(self.embed(input_ids), attention_mask, memory=memory, cache=cache))
