"""Self-attention of a decoding step: the keys and values so far, plus the new token.

`OneRow` is for one row, where the calls are the cost of a step; `Rows` for any number, with or without beams;
`FixedRows` for a CUDA graph, which needs the same operations on the same memory at every step. All have room for the
whole answer from the start. A step is `advance()`, which returns the positions of the new tokens, then `add(layer, x)`.

Shapes: G groups (prompts), K members (beams) a group, R = G*K rows, P prompt tokens, C places in the cache, L layers,
H heads, d head size, D width.
"""

import math

import torch
from torch import Tensor

from vqa_scratch.generate.fast.products import adding, attend, linear, linear_into, norm
from vqa_scratch.nn.cache import DecoderCache
from vqa_scratch.nn.decoding import FastParts


class OneRow:
    """Self-attention of one prompt with one member, without copies.

    A line of the cache holds q, k and v of one token, in the order of the fused projection, which writes directly into
    its line. Padding of the prompt is left out of the cache.
    """

    members = 1

    def __init__(self, parts: FastParts, cache: DecoderCache, mask: Tensor | None, steps: int) -> None:
        """`cache` (one row) and `mask` come from `prefill`; C = P + steps places, P without padding."""
        kept = [own.contents for own in cache]
        if mask is not None:
            kept = [(k[:, :, mask[0]], v[:, :, mask[0]]) for k, v in kept]
        k, _ = kept[0]
        _, heads, self.length, size = k.shape
        lines = k.new_empty(len(cache), self.length + steps, 3, heads, size)
        for line, (k, v) in zip(lines, kept, strict=True):
            line[: self.length, 1], line[: self.length, 2] = k[0].transpose(0, 1), v[0].transpose(0, 1)
        self.lines = lines.flatten(2)  # (L, C, 3 * H * d)
        self.queries = lines[:, :, 0].unsqueeze(3)  # (L, C, H, 1, d)
        self.keys, self.values = lines[:, :, 1].permute(0, 2, 3, 1), lines[:, :, 2].transpose(1, 2)
        self.positions = torch.arange(self.length + steps, device=k.device).unsqueeze(1)
        self.distances = None  # (H, 1, C), T5: the bias of the last token; an earlier token's is the end of it
        if parts.bias is not None:
            self.distances = parts.bias(self.length + steps)[0].to(k.dtype)
        self.width = heads * size
        self.blocks = [
            (norm(b.norm), linear_into(b.attn.qkv), b.attn.scale, adding(b.attn.out.weight, b.attn.out.bias))
            for b in parts.blocks
        ]

    def advance(self) -> Tensor:
        """Make a line for the next token; returns its position (1,)."""
        at, until = self.length, self.length + 1
        self.length = until
        self.bias = None if self.distances is None else self.distances[..., -until:]
        views = (self.lines[:, at:until], self.queries[:, at], self.keys[..., :until], self.values[:, :, :until])
        self.now = list(zip(*(view.unbind(0) for view in views), strict=True))  # by layer
        return self.positions[at]

    def add(self, layer: int, x: Tensor) -> None:
        """x (1, D) += self-attention of the token to itself and those before it."""
        before, qkv_into, scale, out = self.blocks[layer]
        line, q, keys, values = self.now[layer]
        qkv_into(line, before(x))
        out(x, attend(q, keys, values, self.bias, scale).reshape(1, self.width))  # of (H, 1, d)

    def reorder(self, parents: Tensor) -> None:
        """There is only one row."""

    def keep(self, groups: Tensor) -> None:
        """There is only one group."""


class Rows:
    """Self-attention of any number of rows.

    All members of a group share the keys of its prompt without a copy. Each writes its own keys next to the others' and
    sees only those of its ancestors. So a change of beams changes a mask, not the cache.
    """

    def __init__(self, parts: FastParts, cache: DecoderCache, mask: Tensor | None, times: Tensor, sees: Tensor) -> None:
        """`cache` (G rows) and `mask` come from `prefill`.

        times (C - P,): the time of the token in each place after the prompt, K places a step, from 0. sees (K, K) bool,
        True where the first member sees the second one's token of the same step.
        """
        k, _ = cache[0].contents
        self.times, self.sees, self.members, self.used = times, sees, len(sees), 0
        self.groups, self.heads, self.prompt, self.size = k.shape
        places = self.prompt + len(times)
        self.cached = k.new_empty(len(cache), 2, self.groups, self.heads, places, self.size)
        # The cache holds scaled keys: one product less a step. (L, 2, 1, 1, 1, 1)
        scales = [[block.attn.scale, 1.0] for block in parts.blocks]
        exact = torch.promote_types(k.dtype, torch.float32)
        self.factors = torch.tensor(scales, dtype=exact, device=k.device)[..., None, None, None, None]
        for own, factors, kept in zip(cache, self.factors, self.cached, strict=True):
            kept[:, :, :, : self.prompt] = torch.stack(own.contents) * factors
        # (G, 1), the position after the prompt
        self.next = k.new_full((self.groups, 1), self.prompt, dtype=torch.long) if mask is None else mask.sum(1, True)
        self.seen = None  # (G, K, C), -inf where a member may not look
        if mask is not None or self.members > 1:
            self.seen = k.new_full((self.groups, self.members, places), -math.inf if self.members > 1 else 0.0)
            self.seen[:, :, : self.prompt] = 0.0
            if mask is not None:
                self.seen[:, :, : self.prompt].masked_fill_(~mask[:, None], -math.inf)
        self.distances = None  # (H, tokens), T5: the bias of the last token; an earlier token's is the end of it
        if parts.bias is not None:
            self.distances = parts.bias(self.prompt + int(times.max()) + 1)[0, :, 0].to(k.dtype)
            self.all_times = torch.cat([torch.arange(-self.prompt, 0, device=k.device), times])  # (C,)
        self.blocks = [
            (norm(b.norm), linear(b.attn.qkv), adding(b.attn.out.weight, b.attn.out.bias)) for b in parts.blocks
        ]
        self._lay_out()

    def _lay_out(self) -> None:
        """Make views of the cache and shapes, after a change of groups."""
        groups, members, heads, size = self.groups, self.members, self.heads, self.size
        self.fused, self.flat = (groups, members, 3, heads, size), (groups * heads, members, size)
        self.apart, self.joined = (groups, heads, members, size), (groups * members, heads * size)
        both = self.cached.flatten(2, 3)  # (L, 2, G * H, C, d)
        self.keys, self.values = both[:, 0].transpose(2, 3), both[:, 1]
        self.spread = None  # (G * H, K, C): `seen`, if it does not change between steps
        if self.seen is not None and members == 1:
            self.spread = self.seen.repeat_interleave(heads, 0)

    def _look(self, start: int, until: int, bias: Tensor | None) -> None:
        """The next step reads the places before `until` and writes to those from `start` on."""
        self.bias = bias
        views = (self.keys[..., :until], self.values[:, :, :until], self.cached[:, :, :, :, start:until], self.factors)
        self.now = list(zip(*(view.unbind(0) for view in views), strict=True))  # by layer

    def _bias(self, until: int, times: Tensor) -> Tensor | None:
        """The bias on the scores of the places before `until`, broadcastable to (G * H, K, until); times (K,)."""
        if self.distances is None:
            if self.seen is None:
                return None
            if self.spread is not None:
                return self.spread[:, :, :until]
            return self.seen[:, :, :until].repeat_interleave(self.heads, 0)
        last = self.distances.shape[1] - 1  # distance 0; a member cannot see later tokens
        bias = self.distances[:, (last + self.all_times[:until] - times[:, None]).clamp(max=last)]  # (H, K, until)
        if self.seen is not None:
            return (bias + self.seen[:, None, :, :until]).flatten(0, 1)
        return bias if self.groups == 1 else bias.repeat(self.groups, 1, 1)

    def advance(self) -> Tensor:
        """Make places for the next token of each row; returns their positions (R,)."""
        start, until = self._filled(), self._filled() + self.members
        times = self.times[self.members * self.used :][: self.members]
        if self.seen is not None and self.members > 1:
            self.seen[:, :, start:until].masked_fill_(self.sees, 0.0)
        self._look(start, until, self._bias(until, times))
        self.used += 1
        return (self.next + times).flatten()

    def add(self, layer: int, x: Tensor) -> None:
        """x (R, D) += self-attention of each token to itself and those before it."""
        before, qkv, out = self.blocks[layer]
        keys, values, place, factors = self.now[layer]
        q, keys_and_values = qkv(before(x)).view(self.fused).permute(2, 0, 3, 1, 4).split((1, 2))  # (3, G, H, K, d)
        self._write(place, keys_and_values, factors)
        z = attend(q.reshape(self.flat), keys, values, self.bias)
        if self.members > 1:
            z = z.view(self.apart).transpose(1, 2)
        out(x, z.reshape(self.joined))

    def _write(self, place: Tensor, keys_and_values: Tensor, factors: Tensor) -> None:
        """Write those of this step (2, G, H, K, d) to their places."""
        torch.mul(keys_and_values, factors, out=place)

    def reorder(self, parents: Tensor) -> None:
        """Row r becomes what row `parents[r]` was; the members of a group are all at the same position."""
        if self.seen is not None:
            self.seen = self.seen.flatten(0, 1).index_select(0, parents).view(self.seen.shape)

    def _filled(self) -> int:
        """How many places of the cache are in use."""
        return self.prompt + self.members * self.used

    def keep(self, groups: Tensor) -> None:
        """Keep these groups (G',) only, in this order."""
        layers, both, _, *rest = self.cached.shape
        kept, until = self.cached.new_empty(layers, both, len(groups), *rest), self._filled()
        kept[:, :, :, :, :until] = self.cached[:, :, :, :, :until].index_select(2, groups)
        self.cached, self.groups, self.next = kept, len(groups), self.next.index_select(0, groups)
        if self.seen is not None:
            self.seen = self.seen.index_select(0, groups)
        self._lay_out()


class FixedRows(Rows):
    """`Rows` whose steps do not depend on numbers on the host.

    All places are read, later ones masked, and the place of the next token is a tensor. For one member a group and
    decoders without a relative bias.
    """

    def __init__(self, parts: FastParts, cache: DecoderCache, mask: Tensor | None, times: Tensor, sees: Tensor) -> None:
        if len(sees) != 1 or parts.bias is not None:
            raise ValueError("steps of fixed shape serve neither beams nor a relative bias")
        everything = torch.ones(len(cache[0].contents[0]), cache.length, dtype=torch.bool, device=cache.device)
        super().__init__(parts, cache, everything if mask is None else mask, times, sees)
        self.cached[:, :, :, :, self.prompt :] = 0.0  # read with weight 0 before it is written: must be finite
        assert self.seen is not None  # there is a mask
        self.seen[:, :, self.prompt :] = -math.inf
        self.place = torch.tensor([self.prompt - 1], device=cache.device)  # (1,) of the last token
        self.next -= 1  # and its position
        self._lay_out()

    def _filled(self) -> int:
        return self.cached.shape[4]

    def advance(self) -> Tensor:
        self.place += 1
        self.next += 1
        for mask in (self.seen, self.spread):
            if mask is not None:
                mask.index_fill_(2, self.place, 0.0)
        self._look(0, self._filled(), self.spread)
        return self.next.flatten()

    def _write(self, place: Tensor, keys_and_values: Tensor, factors: Tensor) -> None:
        place.index_copy_(3, self.place, (keys_and_values * factors).to(place.dtype))
