"""The interface of a decoder, and the parts it exposes for fast decoding.

In a small model the time of a one-token step goes into calls, so `generate/fast/` turns these parts into plain
functions and runs no module's forward. Every pre-norm decoder is the same loop over them; other decoders expose none.

Shapes: B rows, T tokens, R rows of one token, D width of the blocks, E width of embedding and head (mostly D), H heads,
V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.nn.cache import DecoderCache, TrainedCache
from vqa_scratch.nn.connecting import Conditioning
from vqa_scratch.nn.memory import Memory
from vqa_scratch.nn.rotary import Rotation


class Reader(NamedTuple):
    """Cross-attention with a norm before it: x += factor * attn(norm(x))."""

    norm: nn.Module
    attn: MultiHeadAttention
    factor: Tensor | None = None  # (1,) or (D,); None: 1


class FastMLP(NamedTuple):
    """x += factor * module(norm(x))."""

    norm: nn.Module
    module: nn.Module  # an MLP, a GatedMLP or a MixtureOfExperts
    factor: Tensor | None = None  # (1,) or (D,); None: 1


class FastGated(NamedTuple):
    """A layer before a block, for a decoder with a memory."""

    cross: Reader
    mlp: FastMLP


class FastBlock(NamedTuple):
    """The layer `gated`, x += attn(norm(x)), `cross`, the MLP. Without a memory `gated` and `cross` are left out; a
    block has one of them at most."""

    norm: nn.Module
    attn: MultiHeadAttention
    cross: Reader | None
    mlp: FastMLP
    gated: FastGated | None = None

    @property
    def reader(self) -> Reader | None:
        """What reads the memory."""
        return self.cross if self.gated is None else self.gated.cross


class FastParts(NamedTuple):
    """A whole decoder, in order: tokens and positions, blocks, the last norm, the head."""

    embed: Callable[[Tensor, Tensor], Tensor]  # tokens (R,), positions (R,) -> a new tensor (R, D)
    blocks: list[FastBlock]
    norm: Callable[[Tensor], Tensor]  # (R, D) -> (R, E): everything between the last block and the head
    head: nn.Linear | nn.Embedding  # its weight is (V, E)
    bias: Callable[[int], Tensor] | None = None  # n -> (1, H, 1, n), added to the scores of the last of n tokens
    rotation: Callable[[Tensor], Rotation] | None = None  # positions (n,) -> what turns queries and keys there
    head_copy: nn.Module | None = None  # (..., E) -> (..., V), in place of the product with `head`

    def logits(self, states: Tensor) -> Tensor:
        """(..., E) -> (..., V)."""
        return F.linear(states, self.head.weight) if self.head_copy is None else self.head_copy(states)


def fast_blocks(blocks: nn.ModuleList) -> list[FastBlock]:
    """The parts of blocks that have a method `fast_block`."""
    return [block.fast_block() for block in blocks]  # type: ignore[operator]  # the list says only that it has modules


class Decoder(nn.Module, ABC):
    """A model that predicts the next token."""

    config: Any  # has `layers` and `max_positions`

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.head_copy: nn.Module | None = None  # quantised, in place of the product with `head` in `logits`

    @property
    def max_positions(self) -> int | None:
        """The largest number of tokens, prompt included; None: any number."""
        return self.config.max_positions

    @property
    @abstractmethod
    def head(self) -> Tensor:
        """(V, E): logits are hidden @ head^T."""

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, E), without positions."""

    @abstractmethod
    def hidden(
        self,
        embeddings: Tensor,
        attention_mask: Tensor | None = None,
        *,
        memory: list[Memory] | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """(B, T, E) -> (B, T, E): the states before the head, from embeddings of tokens or of anything else.

        attention_mask (B, cached + T), True = may attend; rows may be padded on either side, which moves no position.
        Cross-attention and gated layers read the memories; a cache keeps their keys, which serve later passes. Raises
        ValueError on more tokens than positions, a mask of another length, or a memory that nothing reads.
        """

    def hidden_after(
        self,
        given: Conditioning,
        embeddings: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """(B, T, E) -> (B, T, E): the states of tokens that read the memories, or follow the prefix, that are `given`.

        The states of a prefix do not depend on what comes after it, so it goes through the blocks once, however many
        rows share it; its keys and values are repeated. Where each row has its own, both go through at once.
        attention_mask (B, T) is that of the tokens; `cache` is empty, and then keeps both.
        """
        if given.prefix is None:
            return self.hidden(embeddings, attention_mask, memory=given.memory, cache=cache)
        prefix, length = given.prefix.to(embeddings.dtype), given.prefix_length
        attention_mask = given.seen(attention_mask, embeddings.shape[1])
        if given.prefix_index is None:
            both = torch.cat([prefix, embeddings], 1)
            return self.hidden(both, attention_mask, memory=given.memory, cache=cache)[:, length:]
        assert given.memory is None, "a prefix that rows share goes without a memory"
        cache = TrainedCache(len(self.new_cache())) if cache is None else cache
        self.hidden(prefix, given.prefix_mask, cache=cache)
        cache.select(given.prefix_index)
        return self.hidden(embeddings, attention_mask, cache=cache)

    @abstractmethod
    def after_blocks(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, E): from the last block to the states before the head."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., E) -> (..., V)."""
        return F.linear(hidden, self.head) if self.head_copy is None else self.head_copy(hidden)

    def readout(self, states: Tensor) -> Tensor:
        """(..., D) -> (..., V): the logits if these were the states after the last block."""
        return self.logits(self.after_blocks(states))

    @property
    def direct_head(self) -> Tensor | None:
        """(V, D), if the states are a plain sum of addends and `readout` is direct_head @ norm(states); else None."""
        return self.head

    def new_cache(self) -> DecoderCache:
        """An empty cache for this model."""
        return DecoderCache(self.config.layers)

    def fast_state(self) -> FastParts | None:
        """What a fast decoding state is made of; None: decode with the modules."""
        return None
