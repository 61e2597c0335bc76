"""What cross-attention reads: states that several rows may share, and the keys and values projected from them.

Shapes: B rows, M memory entries, R rows an entry, H heads, N memory tokens, T query tokens, D width, d head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


def rows_per_entry(index: Tensor, entries: int) -> int | None:
    """R if `index` reads entry 0 R times, then entry 1 R times, ... up to the last; otherwise None."""
    repeat, rest = divmod(len(index), entries)
    if rest or repeat == 0:
        return None
    in_order = torch.arange(entries, device=index.device).repeat_interleave(repeat)
    return repeat if torch.equal(index, in_order) else None


class KeyValue(NamedTuple):
    """Projected keys and values of one memory part. Rows m*repeat ... m*repeat + repeat - 1 read entry m."""

    k: Tensor  # (M, H, N, d)
    v: Tensor  # (M, H, N, d)
    mask: Tensor | None  # (M, N)
    repeat: int = 1

    def gather(self, index: Tensor) -> "KeyValue":
        """Row i reads what entry `index[i]` holds. Copies only where the rows do not follow the entries in order."""
        used, index = torch.unique(index, return_inverse=True)
        k, v, mask = self.k, self.v, self.mask
        if len(used) < len(k):
            k, v, mask = k[used], v[used], None if mask is None else mask[used]
        repeat = rows_per_entry(index, len(k))
        if repeat is None:
            k, v, mask, repeat = k[index], v[index], None if mask is None else mask[index], 1
        return KeyValue(k, v, mask, repeat)

    def per_row(self) -> "KeyValue":
        """The same part with one entry a row (B, H, N, d)."""
        if self.repeat == 1:
            return self
        k, v = self.k.repeat_interleave(self.repeat, 0), self.v.repeat_interleave(self.repeat, 0)
        mask = None if self.mask is None else self.mask.repeat_interleave(self.repeat, 0)
        return KeyValue(k, v, mask)


@dataclass(frozen=True, eq=False)
class Memory:
    """What cross-attention reads: M entries of N states. Keys and values are projected once an entry, not a row.

    Row b reads entry `index[b]`; without an index it reads entry b // `repeat`. An index that says the same thing as a
    repeat is turned into one, because then the rows of an entry can share its keys without a copy.
    """

    states: Tensor  # (M, N, D)
    mask: Tensor | None = None  # (M, N), True = may attend
    index: Tensor | None = None  # (B,) long
    repeat: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        if self.mask is not None and self.mask.shape != self.states.shape[:2]:
            raise ValueError(f"memory mask must be {tuple(self.states.shape[:2])}, got {tuple(self.mask.shape)}")
        if self.index is None:
            return
        if self.repeat != 1:
            raise ValueError("a memory takes an index or a repeat, not both")
        repeat = rows_per_entry(self.index, len(self.states))
        if repeat is not None:
            object.__setattr__(self, "index", None)
            object.__setattr__(self, "repeat", repeat)

    @property
    def rows(self) -> int:
        """How many rows read this memory."""
        return len(self.states) * self.repeat if self.index is None else len(self.index)


def fold(x: Tensor, repeat: int) -> Tensor:
    """(M*R, H, T, d) -> (M, H, R*T, d): the rows that read one entry become more queries of it."""
    if repeat == 1:
        return x
    return x.unflatten(0, (-1, repeat)).transpose(1, 2).flatten(2, 3)


def unfold(x: Tensor, repeat: int) -> Tensor:
    """(M, H, R*T, d) -> (M*R, H, T, d)."""
    if repeat == 1:
        return x
    return x.unflatten(2, (repeat, -1)).transpose(1, 2).flatten(0, 1)


def concatenate(parts: Sequence[KeyValue]) -> KeyValue:
    """All parts as one, an entry a row: what a trace reads."""
    parts = [part.per_row() for part in parts]
    if len(parts) == 1:
        return parts[0]
    mask = None
    if any(part.mask is not None for part in parts):
        mask = torch.cat(
            [
                part.k.new_ones(len(part.k), part.k.shape[2]).bool() if part.mask is None else part.mask.bool()
                for part in parts
            ],
            -1,
        )
    return KeyValue(torch.cat([part.k for part in parts], 2), torch.cat([part.v for part in parts], 2), mask)
