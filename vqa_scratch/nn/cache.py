"""The KV cache: keys and values kept between decoding steps, without gradients; in training those of a prefix, with.

Shapes: B rows, M memory entries, H heads, T tokens so far, N memory tokens, d head size.
"""

import torch
from torch import Tensor

from vqa_scratch.nn.memory import KeyValue
from vqa_scratch.nn.memory_parts import of_last_token


class KVCache:
    """One layer: self-attention appends to it; cross-attention fills `cross` once and then reads it."""

    def __init__(self) -> None:
        self.length = 0
        self.cross: list[KeyValue] | None = None
        self._kv: tuple[Tensor, Tensor] | None = None  # (B, H, capacity, d) each

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values (B, H, T, d) of new tokens; returns all so far, as views."""
        start, self.length = self.length, self.length + k.shape[2]
        old = self._kv
        if old is None or self.length > old[0].shape[2]:
            capacity = max(16, 2 * self.length)  # doubling keeps the copying linear in the final length
            rows, heads, _, size = k.shape
            self._kv = k.new_empty(rows, heads, capacity, size), v.new_empty(rows, heads, capacity, size)
            if old is not None:
                for kept, before in zip(self._kv, old, strict=True):
                    kept[:, :, :start] = before[:, :, :start]
        for kept, new in zip(self.contents, (k, v), strict=True):
            kept[:, :, start:] = new.detach()
        return self.contents

    @property
    def contents(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens so far, (B, H, T, d) views."""
        assert self._kv is not None, "the cache is empty"
        k, v = self._kv
        return k[:, :, : self.length], v[:, :, : self.length]

    def fill_cross(self, parts: list[KeyValue]) -> None:
        """Keep the keys and values of the memory for later steps, whose tokens may read what the last one may now."""
        self.cross = [of_last_token(part)._replace(k=part.k.detach(), v=part.v.detach()) for part in parts]

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat rows: row i becomes what row `rows[i]` was. rows (B',) long."""
        if self._kv is not None:
            k, v = self._kv
            self._kv = k[rows], v[rows]
        if self.cross is not None:
            self.cross = [part.select(rows) for part in self.cross]


class DecoderCache(list[KVCache]):
    """One KVCache a layer, with the operations of a decoding loop."""

    def __init__(self, layers: int) -> None:
        super().__init__(KVCache() for _ in range(layers))

    @property
    def length(self) -> int:
        """Tokens cached so far."""
        return self[0].length

    @property
    def device(self) -> torch.device:
        """The device of the keys."""
        return self[0].contents[0].device

    def rewind(self, length: int) -> None:
        """Forget all tokens after the first `length`."""
        for layer in self:
            layer.length = length

    def select(self, rows: Tensor) -> None:
        """`KVCache.select` in every layer."""
        for layer in self:
            layer.select(rows)


class TrainedKVCache(KVCache):
    """One layer, with gradients: tokens come after `before`, which stays as it is, so a block may run again (gradient
    checkpointing)."""

    def __init__(self, before: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.before = self._kv = before
        self.length = 0 if before is None else before[0].shape[2]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.before is not None:
            k, v = torch.cat([self.before[0], k], 2), torch.cat([self.before[1], v], 2)
        self._kv = k, v
        return k, v

    def behind(self, rows: Tensor) -> "TrainedKVCache":
        """The tokens so far are those before the next ones; row i has those of row `rows[i]`."""
        assert self._kv is not None, "the cache is empty"
        k, v = self._kv
        return TrainedKVCache((k.index_select(0, rows), v.index_select(0, rows)))


class TrainedCache(DecoderCache):
    """`TrainedKVCache` in every layer: the first pass is that of the prefix, then `select` gives each row its own."""

    def __init__(self, layers: int) -> None:
        list.__init__(self, (TrainedKVCache() for _ in range(layers)))

    def select(self, rows: Tensor) -> None:
        self[:] = [layer.behind(rows) for layer in self if isinstance(layer, TrainedKVCache)]
