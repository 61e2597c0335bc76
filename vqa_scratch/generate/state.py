"""What decoding asks of a model, what the loops ask of a state, and the state that any model has.

Shapes: B rows, T tokens, G groups (prompts), K members (beams) a group, R = G*K rows, D width, E width of the
embedding, V vocabulary.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from vqa_scratch.nn.cache import DecoderCache
from vqa_scratch.nn.decoding import FastParts


class Decoder(Protocol):
    """What decoding asks of a model (an `nn.Module`)."""

    training: bool

    @property
    def max_positions(self) -> int | None:
        """Tokens that its positions serve, prompt included; None: any number."""

    @property
    def head(self) -> Tensor:
        """(V, D): logits are hidden @ head^T."""

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, E)."""

    def hidden(
        self, embeddings: Tensor, attention_mask: Tensor | None = None, *, memory: Any = None, cache: Any = None
    ) -> Tensor:
        """(B, T, E) -> (B, T, D): states under the head of the new tokens; attention_mask (B, cached + T)."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""

    def new_cache(self) -> DecoderCache:
        """An empty cache."""

    def fast_state(self) -> FastParts | None:
        """What a fast state is made of; None: decoding goes through the modules."""


class State(Protocol):
    """Where decoding stands: the tokens so far, and the step that takes it one token further.

    Rows are groups times members, the members of a group side by side.
    """

    def step(self, tokens: Tensor) -> Tensor:
        """The next token of each row (R,) -> scores of the one after it (R, V)."""

    def reorder(self, parents: Tensor) -> None:
        """Row r goes on from what row `parents[r]` was, a member of the same group."""

    def keep(self, groups: Tensor) -> None:
        """Keep these groups (G',) only, in this order."""


def member_rows(groups: Tensor, members: int) -> Tensor:
    """(G',) -> (G' * K,): the rows of these groups."""
    return (groups[:, None] * members + torch.arange(members, device=groups.device)).flatten()


class ModuleState:
    """Steps through the decoder's modules: for a trace, for training mode, and for a decoder without fast parts."""

    def __init__(self, decoder: Decoder, cache: DecoderCache, mask: Tensor, memory: Any, members: int) -> None:
        """mask (G, tokens so far), True = may attend; `cache` holds G rows."""
        self.decoder, self.cache, self.mask, self.memory, self.members = decoder, cache, mask, memory, members
        if members > 1:
            self._select(torch.arange(len(mask), device=mask.device).repeat_interleave(members))

    def _select(self, rows: Tensor) -> None:
        self.cache.select(rows)
        self.mask = self.mask[rows]

    def step(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        embeddings = self.decoder.embed(tokens[:, None])
        hidden = self.decoder.hidden(embeddings, self.mask, memory=self.memory, cache=self.cache)
        return self.decoder.logits(hidden[:, -1])

    def reorder(self, parents: Tensor) -> None:
        self._select(parents)

    def keep(self, groups: Tensor) -> None:
        self._select(member_rows(groups, self.members))
