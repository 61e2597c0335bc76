"""The fast decoding state: steps through a decoder's parts, and the same steps replayed as a CUDA graph.

Shapes: G groups (prompts), K members (beams) a group, R = G*K rows, D width, E width of the head, V vocabulary.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from vqa_scratch.generate.fast.cross_attention import cross_attention
from vqa_scratch.generate.fast.products import feed_forward, norm, product
from vqa_scratch.generate.fast.self_attention import FixedRows, OneRow, Rows
from vqa_scratch.generate.state import member_rows
from vqa_scratch.nn.cache import DecoderCache
from vqa_scratch.nn.decoding import FastParts
from vqa_scratch.nn.experts import MixtureOfExperts


def of_steps(steps: int, members: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`times` and `sees` of `Rows` for ordinary steps, in which a member sees only its own new token."""
    return torch.arange(steps, device=device).repeat_interleave(members), torch.eye(members, device=device).bool()


class FastState:
    """A `State` on a decoder's parts, whose sublayers add to x in place."""

    def __init__(self, parts: FastParts, own: OneRow | Rows, cache: DecoderCache) -> None:
        """`own` has the tokens so far; `cache` has the memory, if there is one."""
        self.parts, self.own, self.memory = parts, own, cross_attention(parts.blocks, cache, own.members)
        self.sublayers = list(self._sublayers())
        self.norm = norm(parts.norm)
        self.head = product(parts.head.weight, None) if parts.head_copy is None else parts.head_copy.forward

    def _sublayers(self) -> Iterator[Callable[[Tensor], object]]:
        """Those of all blocks in order, each adding to x; without a memory none that reads it, and no gated layer."""
        readers = 0
        for layer, block in enumerate(self.parts.blocks):
            own = partial(self.own.add, layer)
            if self.memory is None or block.reader is None:
                yield own
            else:
                read, readers = partial(self.memory.add, readers), readers + 1
                yield from (own, read) if block.gated is None else (read, feed_forward(block.gated.mlp), own)
            yield feed_forward(block.mlp)

    @classmethod
    def after(
        cls, parts: FastParts, cache: DecoderCache, mask: Tensor | None, steps: int, members: int = 1
    ) -> "FastState":
        """The state after the prompts; `cache` and `mask` come from `prefill`."""
        if members == len(cache[0].contents[0]) == 1:
            return cls(parts, OneRow(parts, cache, mask, steps), cache)
        return cls(parts, Rows(parts, cache, mask, *of_steps(steps, members, cache.device)), cache)

    def run(self, tokens: Tensor) -> Tensor:
        """The next token of each row (R,) -> states before the head (R, E)."""
        x = self.parts.embed(tokens, self.own.advance())  # (R, D)
        for add in self.sublayers:
            add(x)
        return self.norm(x)

    def step(self, tokens: Tensor) -> Tensor:
        return self.head(self.run(tokens))

    def reorder(self, parents: Tensor) -> None:
        self.own.reorder(parents)

    def keep(self, groups: Tensor) -> None:
        self.own.keep(groups)
        if self.memory is not None:
            self.memory.keep(member_rows(groups, self.own.members))


def tree_states(
    parts: FastParts, cache: DecoderCache, mask: Tensor | None, tokens: Tensor, depths: Tensor, above: Tensor
) -> Tensor:
    """All nodes of one tree after each prompt in one pass: tokens (K,) -> states before the head (G, K, E).

    depths (K,) from 0; above (K, K) bool, True where the second node is the first or one above it. `cache` and `mask`
    come from `prefill` and are not changed.
    """
    own = Rows(parts, cache, mask, depths, above)
    states = FastState(parts, own, cache).run(tokens.repeat(own.groups))
    return states.unflatten(0, (own.groups, len(tokens)))


class GraphState(FastState):
    """Steps of fixed shape, replayed: the host launches one graph a token instead of some thirty kernels a layer.

    The first step after a change of rows runs normally, the second is captured. The requirements of a graph are tested
    on the CPU; it has not run on a GPU yet.
    """

    def __init__(self, parts: FastParts, cache: DecoderCache, mask: Tensor | None, steps: int, members: int) -> None:
        if any(isinstance(block.mlp.module, MixtureOfExperts) for block in parts.blocks):
            raise ValueError("a CUDA graph runs the same kernels at every step, but experts change from token to token")
        if cache.device.type != "cuda":
            raise ValueError("a CUDA graph needs a decoder on a GPU")
        if torch.is_autocast_enabled("cuda"):
            raise ValueError("a CUDA graph keeps no weights that autocast casts: give the decoder the type itself")
        super().__init__(parts, FixedRows(parts, cache, mask, *of_steps(steps, members, cache.device)), cache)
        self._forget()

    def _forget(self) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False

    def step(self, tokens: Tensor) -> Tensor:
        if not self.warm:  # libraries initialise in the first call, which a capture does not allow
            self.warm = True
            return super().step(tokens)
        if self.graph is None:
            self.tokens, self.graph = tokens.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records, and does not run
                self.scores = super().step(self.tokens)
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.scores

    def keep(self, groups: Tensor) -> None:
        super().keep(groups)
        self._forget()
