"""Decoding one row, the case in which a step costs what its calls cost: nothing in it is copied or laid out anew.

A line of the cache holds q, k and v of one token, in the order in which the fused projection gives them, so the
projection writes straight into its line. Padding is left out when the prompt's keys are laid down.

Shapes: P prompt tokens without padding, C places in the cache, L layers, H heads, d head size, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vqa_scratch.generate import cross
from vqa_scratch.nn.cache import DecoderCache
from vqa_scratch.nn.decoding import DecoderParts, adding, linear_into


class SingleState:
    """A `State` of one prompt with one member, with a cache of C = P + steps places made at once."""

    def __init__(
        self, parts: DecoderParts, cache: DecoderCache, mask: Tensor | None, steps: int, members: int = 1
    ) -> None:
        """`cache` and `mask` are those of `prefill`."""
        assert members == 1 and len(cache[0].contents[0]) == 1
        self.parts = parts
        k, _ = cache[0].contents
        _, heads, before, size = k.shape
        kept = [own.contents for own in cache]
        if mask is not None:  # what a decoder puts before its prompt, as BLIP-2 does its image, is always seen
            seen = F.pad(mask[0], (before - mask.shape[1], 0), value=True)
            kept = [(k[:, :, seen], v[:, :, seen]) for k, v in kept]
        self.length, self.used = kept[0][0].shape[2], 0
        lines = k.new_empty(len(cache), self.length + steps, 3, heads, size)
        if self.length:
            for line, (k, v) in zip(lines, kept, strict=True):
                line[: self.length, 1], line[: self.length, 2] = k[0].transpose(0, 1), v[0].transpose(0, 1)
        self.rows = lines.flatten(2)  # (L, C, 3 * H * d)
        self.queries = lines[:, :, 0].unsqueeze(3)  # (L, C, H, 1, d)
        self.keys, self.values = lines[:, :, 1].permute(0, 2, 3, 1), lines[:, :, 2].transpose(1, 2)
        # of the tokens to come
        self.positions = torch.arange(self.length, self.length + steps, device=k.device).unsqueeze(1)
        self.distances = None  # (H, 1, C), T5: the bias of the last of all tokens; an earlier one's is its end
        if parts.bias is not None:
            self.distances = parts.bias(self.length + steps)[0].to(k.dtype)
        self.width = heads * size
        crossings = cross.crossings(parts.layers, [own.cross for own in cache] if cache[0].cross is not None else None)
        self.layers = []
        for layer, crossing in zip(parts.layers, crossings.each, strict=True):
            attn = layer.attn
            own = (layer.norm, linear_into(attn.qkv), attn.scale, adding(attn.out.weight, attn.out.bias))
            self.layers.append((*own, crossing, layer.mlp_norm, layer.mlp))

    def step(self, tokens: Tensor) -> Tensor:
        at = self.length + self.used
        until = at + 1
        bias = None if self.distances is None else self.distances[..., -until:]
        x = self.parts.embed(tokens, self.positions[self.used])  # (1, D)
        views = (self.rows[:, at:until], self.queries[:, at], self.keys[..., :until], self.values[:, :, :until])
        for layer, row, q, keys, values in zip(self.layers, *(view.unbind(0) for view in views), strict=True):
            norm, qkv_into, scale, add, crossing, mlp_norm, mlp = layer
            qkv_into(row, norm(x))
            z = cross.attend(q, keys, values, bias, scale)  # (H, 1, d)
            add(x, z.reshape(1, self.width))
            if crossing is not None:
                crossing(x)
            mlp(x, mlp_norm(x))
        self.used += 1
        return self.parts.logits(self.parts.norm(x))

    def reorder(self, parents: Tensor) -> None:
        """One row goes on from itself."""

    def keep(self, groups: Tensor) -> None:
        """One row is kept, or decoding is over."""
