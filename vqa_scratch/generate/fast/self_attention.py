"""Self-attention of a decoding step: the keys and values so far, plus the new token.

`OneRow` is for one row, where the calls are the cost of a step; `Rows` for any number, with or without beams;
`FixedRows` for a CUDA graph, which needs the same operations on the same memory at every step. All have room for the
whole answer from the start. A step is `advance()`, which returns the positions of the new tokens, then `add(layer, x)`.

Shapes: G groups (prompts), K members (beams) a group, R = G*K rows, P prompt tokens, C places in the cache, L layers,
H heads, J heads of keys and values, F = H / J heads that read one of these, d head size, D width.
"""

import math

import torch
from torch import Tensor

from vqa_scratch.generate.fast.products import attend, linear, linear_adding, linear_into, norm, turnings
from vqa_scratch.nn.cache import DecoderCache
from vqa_scratch.nn.decoding import FastParts
from vqa_scratch.nn.rotary import Rotation


def rotations(parts: FastParts, tokens: int, like: Tensor) -> Rotation | None:
    """Those of the positions 0 ... tokens - 1, in the dtype of the keys; None for a decoder that turns nothing."""
    if parts.rotation is None:
        return None
    return parts.rotation(torch.arange(tokens, device=like.device)).to(like.dtype)


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
        (_, kv_heads, self.length, size), heads = k.shape, parts.blocks[0].attn.heads
        lines = k.new_empty(len(cache), self.length + steps, heads + 2 * kv_heads, size)
        keys, values = lines[:, :, heads:].split(kv_heads, 2)  # (L, C, J, d)
        for layer, (k, v) in enumerate(kept):
            keys[layer, : self.length], values[layer, : self.length] = k[0].transpose(0, 1), v[0].transpose(0, 1)
        self.lines, self.places = lines.flatten(2), lines  # (L, C, (H + 2 J) * d), (L, C, H + 2 J, d)
        self.queries = lines[:, :, :heads].unflatten(2, (kv_heads, -1))  # (L, C, J, F, d)
        self.keys, self.values = keys.permute(0, 2, 3, 1), values.transpose(1, 2)
        self.positions = torch.arange(self.length + steps, device=k.device).unsqueeze(1)
        self.rotations = rotations(parts, self.length + steps, k)
        self.distances = None  # (H, 1, C), T5: the bias of the last token; an earlier token's is the end of it
        if parts.bias is not None:
            self.distances = parts.bias(self.length + steps)[0].to(k.dtype)
        self.width = heads * size
        self.blocks = [
            (norm(b.norm), linear_into(b.attn.qkv), b.attn.scale, linear_adding(b.attn.out)) for b in parts.blocks
        ]
        self.turns = turnings(parts.blocks, self.rotations is not None)

    def advance(self) -> Tensor:
        """Make a line for the next token; returns its position (1,)."""
        at, until = self.length, self.length + 1
        self.length = until
        self.bias = None if self.distances is None else self.distances[..., -until:]
        views = (self.lines[:, at:until], self.queries[:, at], self.keys[..., :until], self.values[:, :, :until])
        self.now = list(zip(*(view.unbind(0) for view in views), strict=True))  # by layer
        if self.turns:
            self.heads = self.places[:, at:until].unbind(0)  # (1, H + 2 J, d) of each layer
            self.rotation = None if self.rotations is None else self.rotations.of(self.positions[at])
        return self.positions[at]

    def add(self, layer: int, x: Tensor) -> None:
        """x (1, D) += self-attention of the token to itself and those before it."""
        before, qkv_into, scale, out = self.blocks[layer]
        line, q, keys, values = self.now[layer]
        qkv_into(line, before(x))
        if self.turns:
            self.turns[layer](self.heads[layer], self.rotation)
        out(x, attend(q, keys, values, self.bias, scale).reshape(1, self.width))  # of (J, F, d)

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
        (self.groups, self.heads, self.prompt, self.size), attn = k.shape, parts.blocks[0].attn
        self.readers = attn.heads // self.heads  # F
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
        self.rotations = rotations(parts, places, k)
        self.blocks = [(norm(b.norm), linear(b.attn.qkv), linear_adding(b.attn.out)) for b in parts.blocks]
        self.turns = turnings(parts.blocks, self.rotations is not None)
        self._lay_out()

    def _lay_out(self) -> None:
        """Make views of the cache and shapes, after a change of groups."""
        groups, members, heads, readers, size = self.groups, self.members, self.heads, self.readers, self.size
        self.pieces = heads * readers * size, 2 * heads * size  # of the fused projection
        self.queries, self.flat = (groups, members, heads, readers, size), (groups * heads, members * readers, size)
        self.pairs, self.apart = (groups, members, 2, heads, size), (groups, heads, members, readers, size)
        self.joined = groups * members, heads * readers * size
        both = self.cached.flatten(2, 3)  # (L, 2, G * J, C, d)
        self.keys, self.values = both[:, 0].transpose(2, 3), both[:, 1]
        self.spread = None  # (G * J, 1, C): `seen`, if it does not change between steps
        if self.seen is not None and members == 1:
            self.spread = self.seen.repeat_interleave(heads, 0)

    def _look(self, start: int, until: int, bias: Tensor | None) -> None:
        """The next step reads the places before `until` and writes to those from `start` on."""
        self.bias = bias
        views = (self.keys[..., :until], self.values[:, :, :until], self.cached[:, :, :, :, start:until], self.factors)
        self.now = list(zip(*(view.unbind(0) for view in views), strict=True))  # by layer

    def _bias(self, until: int, times: Tensor) -> Tensor | None:
        """The bias on the scores of the places before `until`, broadcastable to (G * J, K * F, until); times (K,)."""
        if self.distances is None:
            if self.seen is None:
                return None
            if self.spread is not None:
                return self.spread[:, :, :until]
            seen = self.seen[:, :, :until].repeat_interleave(self.heads, 0)
            return seen if self.readers == 1 else seen.repeat_interleave(self.readers, 1)
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
        return self._at(self.next + times)

    def _at(self, positions: Tensor) -> Tensor:
        """The new tokens are at these positions (G, K); returns them as (R,)."""
        positions = positions.flatten()
        self.rotation = None if self.rotations is None else self.rotations.of(positions)
        return positions

    def add(self, layer: int, x: Tensor) -> None:
        """x (R, D) += self-attention of each token to itself and those before it."""
        before, qkv, out = self.blocks[layer]
        keys, values, place, factors = self.now[layer]
        fused = qkv(before(x))
        if self.turns:
            self.turns[layer](fused.view(len(x), -1, self.size), self.rotation)
        q, keys_and_values = fused.split(self.pieces, 1)
        self._write(place, keys_and_values.view(self.pairs).permute(2, 0, 3, 1, 4), factors)  # (2, G, J, K, d)
        q = q.view(self.queries).transpose(1, 2)  # (G, J, K, F, d)
        z = attend(q.reshape(self.flat), keys, values, self.bias)
        if self.members > 1:
            z = z.view(self.apart).transpose(1, 2)
        out(x, z.reshape(self.joined))

    def _write(self, place: Tensor, keys_and_values: Tensor, factors: Tensor) -> None:
        """Write those of this step (2, G, J, K, d) to their places."""
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
        return self._at(self.next)

    def _write(self, place: Tensor, keys_and_values: Tensor, factors: Tensor) -> None:
        place.index_copy_(3, self.place, (keys_and_values * factors).to(place.dtype))
