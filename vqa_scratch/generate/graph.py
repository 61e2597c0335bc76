"""Steps that are the same operations on the same memory every time, as a CUDA graph wants them.

The host then launches one graph a token instead of some thirty kernels a layer. A step reads all places of the cache,
those to come masked out, and writes to a place that a tensor names. Greedy decoding and sampling of decoders without a
relative bias. Tested on the CPU for what a graph asks for; not run on a GPU yet.

Shapes as in `state.py`, with K = 1.
"""

import math

import torch
from torch import Tensor

from vqa_scratch.generate.state import StaticState
from vqa_scratch.nn.cache import DecoderCache
from vqa_scratch.nn.decoding import DecoderParts


class FixedState(StaticState):
    """A `StaticState` whose steps depend on no number that the host knows."""

    def __init__(self, parts: DecoderParts, cache: DecoderCache, mask: Tensor | None, steps: int, members: int) -> None:
        if members != 1 or parts.bias is not None:
            raise ValueError("steps of fixed shape serve neither beams nor a relative bias")
        everything = torch.ones(len(cache[0].contents[0]), cache.length, dtype=torch.bool, device=cache.device)
        super().__init__(parts, cache, everything if mask is None else mask, steps, members)
        self.cached[:, :, :, :, self.prompt :] = 0.0  # read with weight 0 before it is written: it must be a number
        self.place = torch.tensor([self.prompt], device=cache.device)  # (1,) where the next token is written

    def _lay_out(self) -> None:
        self.seen[:, :, self.prompt + self.used :] = -math.inf
        super()._lay_out()

    def _filled(self) -> int:
        return self.places

    def _views(self, start: int, until: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.keys, self.values, self.cached

    def _write(self, new: Tensor, keys_and_values: Tensor, factors: Tensor) -> None:
        new.index_copy_(3, self.place, (keys_and_values * factors).to(new.dtype))

    def advance(self, tokens: Tensor) -> Tensor:
        """A step without its bookkeeping on the host."""
        self.seen.index_fill_(2, self.place, 0.0)
        self.spread.index_fill_(2, self.place, 0.0)
        x = self._through_layers(tokens, 0, self.places, self.spread)
        self.place += 1
        self.positions += 1
        return self.parts.logits(self.parts.norm(x))

    def step(self, tokens: Tensor) -> Tensor:
        self.used += 1
        return self.advance(tokens)


class GraphState(FixedState):
    """The same replayed: the first step after a change of rows runs as it is, the second is captured."""

    def __init__(self, parts: DecoderParts, cache: DecoderCache, mask: Tensor | None, steps: int, members: int) -> None:
        if cache.device.type != "cuda":
            raise ValueError("a CUDA graph needs a decoder on a GPU")
        if torch.is_autocast_enabled("cuda"):
            raise ValueError("a CUDA graph keeps no weights that autocast casts: give the decoder the type itself")
        super().__init__(parts, cache, mask, steps, members)

    def _lay_out(self) -> None:
        super()._lay_out()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False

    def step(self, tokens: Tensor) -> Tensor:
        self.used += 1
        if not self.warm:  # libraries set themselves up in the first call, which a capture does not allow
            self.warm = True
            return self.advance(tokens)
        if self.graph is None:
            self.tokens, self.graph = tokens.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records, and does not run
                self.scores = self.advance(self.tokens)
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.scores
