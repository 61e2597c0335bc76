"""The decoding state: its interface for the loops, and the implementation that works for every decoder.

Shapes: G groups (prompts), K members (beams) a group, R = G*K rows, V vocabulary.
"""

from typing import Protocol

import torch
from torch import Tensor

from vqa_scratch.nn.cache import DecoderCache
from vqa_scratch.nn.decoding import Decoder
from vqa_scratch.nn.memory import Memory
from vqa_scratch.nn.memory_parts import for_next_tokens


class State(Protocol):
    """The tokens so far, and a step to the next token. Rows are groups times members, one group after the other."""

    def step(self, tokens: Tensor) -> Tensor:
        """The next token of each row (R,) -> scores of the one after it (R, V)."""

    def reorder(self, parents: Tensor) -> None:
        """Row r becomes what row `parents[r]` was, a member of the same group."""

    def keep(self, groups: Tensor) -> None:
        """Keep these groups (G',) only, in this order."""


def member_rows(groups: Tensor, members: int) -> Tensor:
    """(G',) -> (G' * K,): the rows of these groups."""
    return (groups[:, None] * members + torch.arange(members, device=groups.device)).flatten()


class ModuleState:
    """Steps with the decoder's modules: in a trace, in training mode, and for a decoder without fast parts."""

    def __init__(
        self, decoder: Decoder, cache: DecoderCache, mask: Tensor, memory: list[Memory] | None, members: int
    ) -> None:
        """mask (G, tokens so far), True = may attend; `cache` holds G rows."""
        self.decoder, self.cache, self.mask, self.members = decoder, cache, mask, members
        self.memory = for_next_tokens(memory)
        if members > 1:
            self.reorder(torch.arange(len(mask), device=mask.device).repeat_interleave(members))

    def step(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        embeddings = self.decoder.embed(tokens[:, None])
        hidden = self.decoder.hidden(embeddings, self.mask, memory=self.memory, cache=self.cache)
        return self.decoder.logits(hidden[:, -1])

    def reorder(self, parents: Tensor) -> None:
        self.cache.select(parents)
        self.mask = self.mask[parents]

    def keep(self, groups: Tensor) -> None:
        self.reorder(member_rows(groups, self.members))
