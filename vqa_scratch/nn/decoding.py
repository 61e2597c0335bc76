"""What everything around a decoder asks of it, and the parts that it gives away to be decoded fast.

At small sizes a step of one token costs what its calls cost, so `generate/fast/` makes plain functions of these parts
and no module's forward runs. Every pre-norm decoder is the same loop over them; a decoder that is none has no parts.

Shapes: B rows, T tokens, R rows of one token, D width of the blocks, E width of embedding and head (mostly D), H heads,
V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.nn.cache import DecoderCache
from vqa_scratch.nn.layers import Activation
from vqa_scratch.nn.memory import Memory


class FastBlock(NamedTuple):
    """x += attn(norm(x)), x += cross(cross_norm(x)) if there is a memory, x += down(activation(up(mlp_norm(x)))).

    With a `gate` the last is down(activation(gate(h)) * up(h)).
    """

    norm: nn.Module
    attn: MultiHeadAttention
    cross_norm: nn.Module | None
    cross: MultiHeadAttention | None
    mlp_norm: nn.Module
    up: nn.Linear
    activation: Activation
    down: nn.Linear
    gate: nn.Linear | None = None


class FastParts(NamedTuple):
    """A whole decoder, in order: tokens and positions, blocks, the last norm, the head."""

    embed: Callable[[Tensor, Tensor], Tensor]  # tokens (R,), positions (R,) -> a new tensor (R, D)
    blocks: list[FastBlock]
    norm: Callable[[Tensor], Tensor]  # (R, D) -> (R, E): all that stands between the last block and the head
    head: Tensor  # (V, E)
    bias: Callable[[int], Tensor] | None = None  # n -> (1, H, 1, n), added to the scores of the last of n tokens


class Decoder(nn.Module, ABC):
    """A model that says the next token."""

    config: Any  # has `layers` and `max_positions`

    @property
    def max_positions(self) -> int | None:
        """Tokens that the positions serve, prompt included; None: any number."""
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
        """(B, T, E) -> (B, T, E): states under the head, from embeddings that need not be those of tokens.

        attention_mask (B, cached + T), True = may attend; rows may be padded on either side. Cross-attention reads the
        memories; a cache keeps their keys.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., E) -> (..., V)."""
        return F.linear(hidden, self.head)

    def new_cache(self) -> DecoderCache:
        """An empty cache for this model."""
        return DecoderCache(self.config.layers)

    def fast_state(self) -> FastParts | None:
        """What a fast decoding state is made of; None: decoding goes through the modules."""
        return None
