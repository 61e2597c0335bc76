"""Where decoding stands: the cache behind the tokens so far, and the step that takes it one token further.

The prompt goes through the decoder's modules once; from then on `StaticState` steps over the decoder's parts with a
cache of its final size. All members (beams) of a group share the group's prompt and memory without a copy: each writes
its keys beside the others' and sees, of these, only its own ancestors'. So a change of beams moves a mask, not a cache.

Shapes: G groups (prompts), K members a group, R = G*K rows, P prompt tokens, C places in the cache, H heads, d head
size, D width, V vocabulary.
"""

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vqa_scratch.generate import cross
from vqa_scratch.nn.cache import DecoderCache
from vqa_scratch.nn.decoding import DecoderParts, adding, linear


class Decoder(Protocol):
    """What decoding asks of a model (an `nn.Module`): GPT-2 and T5 have it."""

    training: bool

    def new_cache(self) -> DecoderCache:
        """An empty cache."""

    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, memory: Any = None, cache: Any = None
    ) -> Tensor:
        """(B, T) -> (B, T, D): states of the new tokens; attention_mask (B, cached + T), padding on the left."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""

    def decoding_parts(self) -> DecoderParts:
        """What a step goes through."""


class State(Protocol):
    """What the loops ask of a state. Rows are groups times members, the members of a group side by side."""

    def step(self, tokens: Tensor) -> Tensor:
        """The next token of each row (R,) -> scores of the one after it (R, V)."""

    def reorder(self, parents: Tensor) -> None:
        """Row r goes on from what row `parents[r]` was, a member of the same group."""

    def keep(self, groups: Tensor) -> None:
        """Keep these groups (G',) only, in this order."""


class ModuleState:
    """Steps through the decoder's modules: what a trace needs, and a decoder in training."""

    def __init__(self, decoder: Decoder, cache: DecoderCache, mask: Tensor, memory: Any, members: int) -> None:
        self.decoder, self.cache, self.mask, self.memory, self.members = decoder, cache, mask, memory, members
        if members > 1:
            self._select(torch.arange(len(mask), device=mask.device).repeat_interleave(members))

    def _select(self, rows: Tensor) -> None:
        self.cache.select(rows)
        self.mask = self.mask[rows]

    def step(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        hidden = self.decoder.hidden(tokens[:, None], self.mask, memory=self.memory, cache=self.cache)
        return self.decoder.logits(hidden[:, -1])

    def reorder(self, parents: Tensor) -> None:
        self._select(parents)

    def keep(self, groups: Tensor) -> None:
        members = torch.arange(self.members, device=groups.device)
        self._select((groups[:, None] * self.members + members).flatten())


class StaticState:
    """Steps over the decoder's parts, with a cache of C = P + K * steps places made at once."""

    def __init__(
        self,
        parts: DecoderParts,
        cache: DecoderCache,
        mask: Tensor | None,
        steps: int,
        members: int,
        *,
        tree: bool = False,
    ) -> None:
        """`cache` and `mask` are those of `prefill`; with `tree` the members are the nodes of one `steps` deep."""
        self.parts, self.members, self.used = parts, members, 0
        k, _ = cache[0].contents
        self.groups, self.heads, self.prompt, self.size = k.shape
        new = members if tree else members * steps
        self.places = self.prompt + new
        self.cached = k.new_empty(len(cache), 2, self.groups, self.heads, self.places, self.size)
        # Keys are kept scaled: one product less a step. (L, 2, 1, 1, 1, 1)
        scales = [[layer.attn.scale, 1.0] for layer in self.parts.layers]
        exact = torch.promote_types(k.dtype, torch.float32)
        self.factors = torch.tensor(scales, dtype=exact, device=k.device)[..., None, None, None, None]
        for own, factors, kept in zip(cache, self.factors, self.cached, strict=True):
            kept[:, :, :, : self.prompt] = torch.stack(own.contents) * factors
        if mask is not None:  # what a decoder puts before its prompt, as BLIP-2 does its image, is always seen
            mask = F.pad(mask, (self.prompt - mask.shape[1], 0), value=True)
        start = torch.full((self.groups,), self.prompt, device=k.device) if mask is None else mask.sum(1)
        self.positions = start.repeat_interleave(members)  # (R,) of the tokens to come
        self.seen = None  # (G, K, C), -inf where a member may not look
        if mask is not None or members > 1:
            self.seen = k.new_full((self.groups, members, self.places), -math.inf if members > 1 else 0.0)
            self.seen[:, :, : self.prompt] = 0.0
            if mask is not None:
                self.seen[:, :, : self.prompt].masked_fill_(~mask[:, None], -math.inf)
        self.distances = None  # (H, P + steps), T5: the bias of the last of all tokens; an earlier one's is its end
        if self.parts.bias is not None:
            self.distances = self.parts.bias(self.prompt + steps)[0, :, 0].to(k.dtype)
            self.columns = torch.arange(self.places, device=k.device)  # (C,) time of each place
            self.columns[self.prompt :] = self.prompt + torch.arange(new, device=k.device) // members
        memory = None
        if cache[0].cross is not None:
            memory = [own.cross for own in cache]
            if members > 1:
                rows = torch.arange(self.groups, device=k.device).repeat_interleave(members)
                memory = cross.select(memory, rows)
        self.crossings = cross.crossings(parts.layers, memory)
        self.layers = []
        for layer, crossing in zip(parts.layers, self.crossings.each, strict=True):
            attn = layer.attn
            own = (layer.norm, linear(attn.qkv), adding(attn.out.weight, attn.out.bias))
            self.layers.append((*own, crossing, layer.mlp_norm, layer.mlp))
        self._lay_out()

    def _lay_out(self) -> None:
        """After a change of groups: views of the cache."""
        both = self.cached.flatten(2, 3)  # (L, 2, G * H, C, d)
        self.keys, self.values = both[:, 0].transpose(2, 3), both[:, 1]
        self.spread = None  # (G * H, K, C): `seen` where it does not change from step to step
        if self.seen is not None and self.members == 1:
            self.spread = self.seen.repeat_interleave(self.heads, 0)

    def _bias(self, until: int, times: Tensor | None = None) -> Tensor | None:
        """What is added to the scores of the first `until` places, broadcastable to (G * H, K, until).

        `times` (K,) are those of the members' tokens after the prompt; None: of all the same, the next one.
        """
        if self.distances is None:
            if self.seen is None:
                return None
            if self.spread is not None:
                return self.spread[:, :, :until]
            return self.seen[:, :, :until].repeat_interleave(self.heads, 0)
        now = self.columns.new_tensor([self.used]) if times is None else times
        first = self.distances.shape[1] - 1 - self.prompt - now  # (K or 1,) the bias of place 0
        # (H, K or 1, until); what lies after a member is out of its sight, whatever its bias
        bias = self.distances[:, (self.columns[:until] + first[:, None]).clamp(max=self.distances.shape[1] - 1)]
        if self.seen is not None:
            return (bias + self.seen[:, None, :, :until]).flatten(0, 1)
        return bias if self.groups == 1 else bias.repeat(self.groups, 1, 1)

    def step(self, tokens: Tensor) -> Tensor:
        start = self.prompt + self.members * self.used
        until = start + self.members
        if self.members > 1:  # a member sees its own token
            self.seen[:, :, start:until].diagonal(dim1=1, dim2=2).zero_()
        x = self._through_layers(tokens, start, until, self._bias(until))
        self.used += 1
        self.positions += 1
        return self.parts.logits(self.parts.norm(x))

    def tree(self, tokens: Tensor, depths: Tensor, above: Tensor) -> Tensor:
        """All nodes of one tree behind each prompt at once, in place of steps: (K,) tokens -> states (G, K, D).

        depths (K,) from 0; above (K, K) bool, True where the second node is the first or one above it. The state must
        be fresh and made for a tree of K nodes.
        """
        until = self.prompt + self.members
        if self.members > 1:
            self.seen[:, :, self.prompt :].masked_fill_(above, 0.0)
        if self.distances is not None:
            self.columns[self.prompt : until] = self.prompt + depths
        self.positions += depths.repeat(self.groups)
        x = self._through_layers(tokens.repeat(self.groups), self.prompt, until, self._bias(until, depths))
        return self.parts.norm(x).unflatten(0, (self.groups, -1))

    def _views(self, start: int, until: int) -> tuple[Tensor, Tensor, Tensor]:
        """By layer: keys and values of the first `until` places, and where those from `start` on are written."""
        return self.keys[..., :until], self.values[:, :, :until], self.cached[:, :, :, :, start:until]

    def _write(self, new: Tensor, keys_and_values: Tensor, factors: Tensor) -> None:
        """Put those of this step (2, G, H, K, d) where `_views` says."""
        torch.mul(keys_and_values, factors, out=new)

    def _through_layers(self, tokens: Tensor, start: int, until: int, bias: Tensor | None) -> Tensor:
        """One token a row (R,) -> (R, D); their keys go to the places from `start` to `until`."""
        x = self.parts.embed(tokens, self.positions)  # (R, D)
        groups, members, heads, size = self.groups, self.members, self.heads, self.size
        fused, flat, rows = (groups, members, 3, heads, size), (groups * heads, members, size), (len(x), heads * size)
        views = (view.unbind(0) for view in (*self._views(start, until), self.factors))
        for layer, keys, values, new, factors in zip(self.layers, *views, strict=True):
            norm, qkv, add, crossing, mlp_norm, mlp = layer
            q, k_and_v = qkv(norm(x)).view(fused).permute(2, 0, 3, 1, 4).split((1, 2))  # (3, G, H, K, d)
            self._write(new, k_and_v, factors)
            z = cross.attend(q.reshape(flat), keys, values, bias)
            if members > 1:
                z = z.view(groups, heads, members, size).transpose(1, 2)
            add(x, z.reshape(rows))
            if crossing is not None:
                crossing(x)
            mlp(x, mlp_norm(x))
        return x

    def reorder(self, parents: Tensor) -> None:
        # Positions need no move: the members of a group stand at the same one.
        self.seen = self.seen.flatten(0, 1).index_select(0, parents).view(self.seen.shape)

    def _filled(self) -> int:
        """How many places of the cache hold something that a later step reads."""
        return self.prompt + self.members * self.used

    def keep(self, groups: Tensor) -> None:
        layers, both, _, *rest = self.cached.shape
        kept, until = self.cached.new_empty(layers, both, len(groups), *rest), self._filled()
        kept[:, :, :, :, :until] = self.cached[:, :, :, :, :until].index_select(2, groups)
        self.cached = kept
        self.groups = len(groups)
        if self.seen is not None:
            self.seen = self.seen.index_select(0, groups)
        members = torch.arange(self.members, device=groups.device)
        rows = (groups[:, None] * self.members + members).flatten()
        self.positions = self.positions[rows]
        self.crossings.keep(rows)
        self._lay_out()
