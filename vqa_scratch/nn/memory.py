"""What cross-attention reads: states that several rows may share, and the keys and values projected from them.

Many questions may ask about one image. Rows that share an entry become more queries of that entry, so its keys are
projected once and never copied. In a text with several images each row has an entry of its own, the states of its
images one after the other, and each token reads those of one image (`nn/memory_parts.py`).

Shapes: B rows, M memory entries, R rows an entry at most, H heads, N memory tokens, T query tokens, D width, d head
size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Sharing(NamedTuple):
    """How B rows share M entries. Each entry has R slots for rows, M*R in all; row b is in slot `slot[b]`."""

    entries: int  # M
    repeat: int = 1  # R
    slot: Tensor | None = None  # (B,) long; None: the rows fill all slots in order

    @classmethod
    def from_index(cls, index: Tensor, entries: int) -> "Sharing | None":
        """Row b reads entry `index[b]`. None if more than half of the slots would be empty."""
        counts = torch.bincount(index, minlength=entries)
        repeat = int(counts.max())
        if entries * repeat > 2 * len(index):
            return None
        order = index.argsort(stable=True)
        first = counts.cumsum(0) - counts  # (M,) rows that read an earlier entry
        rank = torch.empty_like(index)
        rank[order] = torch.arange(len(index), device=index.device) - first[index[order]]
        slot = index * repeat + rank
        in_order = len(slot) == entries * repeat and torch.equal(slot, torch.arange(len(slot), device=slot.device))
        return cls(entries, repeat, None if in_order else slot)

    @property
    def rows(self) -> int:
        """B."""
        return self.entries * self.repeat if self.slot is None else len(self.slot)

    def entry_of_row(self, device: torch.device) -> Tensor:
        """(B,) the entry that each row reads."""
        return (torch.arange(self.rows, device=device) if self.slot is None else self.slot) // self.repeat

    def fold(self, x: Tensor) -> Tensor:
        """(B, H, T, d) -> (M, H, R*T, d): rows become queries of their entry; empty slots hold zeros."""
        if self.slot is not None:
            x = x.transpose(1, 2)  # (B, T, H, d), so that joining R and T below is a view
            x = x.new_zeros(self.entries * self.repeat, *x.shape[1:]).index_copy(0, self.slot, x).transpose(1, 2)
        if self.repeat == 1:
            return x
        return x.unflatten(0, (-1, self.repeat)).transpose(1, 2).flatten(2, 3)

    def unfold(self, x: Tensor) -> Tensor:
        """(M, H, R*T, d) -> (B, H, T, d), the inverse of `fold`."""
        if self.repeat > 1:
            x = x.unflatten(2, (self.repeat, -1)).transpose(1, 2).flatten(0, 1)
        return x if self.slot is None else x.index_select(0, self.slot)


class KeyValue(NamedTuple):
    """Projected keys and values of one memory, and how rows share its entries."""

    k: Tensor  # (M, H, N, d)
    v: Tensor  # (M, H, N, d)
    mask: Tensor | None  # (M, N)
    sharing: Sharing
    seen: Tensor | None = None  # (B, T, N), as in `Memory`

    def take(self, index: Tensor) -> "KeyValue":
        """Entry i is entry `index[i]` of this one, read by row i only."""
        mask, seen = (None if x is None else x[index] for x in (self.mask, self.seen))
        return KeyValue(self.k[index], self.v[index], mask, Sharing(len(index)), seen)

    def keep(self, entries: Tensor | None, sharing: Sharing) -> "KeyValue":
        """Only these entries (None: all), shared as in `sharing`; takes what `share` returns."""
        return (self if entries is None else self.take(entries))._replace(sharing=sharing)

    def select(self, rows: Tensor) -> "KeyValue":
        """Row i becomes what row `rows[i]` was. Entries that no row reads are dropped."""
        return self.keep(*share(self.sharing.entry_of_row(self.k.device)[rows], len(self.k)))

    def per_row(self) -> "KeyValue":
        """The same with one entry for each row (B, H, N, d)."""
        own = self.sharing.repeat == 1 and self.sharing.slot is None
        return self if own else self.take(self.sharing.entry_of_row(self.k.device))


@dataclass(frozen=True, eq=False)
class Memory:
    """M entries of N states that cross-attention reads. Keys and values are projected for each entry, not each row.

    Row b reads entry `index[b]`, or entry b // `repeat` without an index. `seen` says for each token of this pass which
    states it may read; tokens that follow in a cache may read what the last one may. A token that may read nothing gets
    zeros. Raises ValueError on misshapen masks.
    """

    states: Tensor  # (M, N, D)
    mask: Tensor | None = None  # (M, N), True = may attend
    index: Tensor | None = None  # (B,) long
    repeat: int = field(default=1, kw_only=True)
    seen: Tensor | None = field(default=None, kw_only=True)  # (B, T, N), True = may attend; None: every token all
    sharing: Sharing | None = field(init=False, repr=False)  # None: too uneven to share

    def __post_init__(self) -> None:
        if self.mask is not None and self.mask.shape != self.states.shape[:2]:
            raise ValueError(f"memory mask must be {tuple(self.states.shape[:2])}, got {tuple(self.mask.shape)}")
        if self.index is not None and self.repeat != 1:
            raise ValueError("a memory takes an index or a repeat, not both")
        entries = len(self.states)
        if self.seen is not None and (self.index is not None or self.repeat != 1):
            raise ValueError("tokens that read different states need an entry for each row: no index and no repeat")
        if self.seen is not None and (self.seen.ndim != 3 or self.seen.shape[::2] != self.states.shape[:2]):
            expected = f"({entries}, tokens, {self.states.shape[1]})"
            raise ValueError(f"what each token may read must be {expected}, got {tuple(self.seen.shape)}")
        sharing = Sharing(entries, self.repeat) if self.index is None else Sharing.from_index(self.index, entries)
        if sharing is not None and sharing.slot is not None:  # an index on the CPU needs no sync
            sharing = sharing._replace(slot=sharing.slot.to(self.states.device))
        object.__setattr__(self, "sharing", sharing)

    def project(self, k: Tensor, v: Tensor) -> KeyValue:
        """Add to the keys and values (M, H, N, d) of the states how rows share them."""
        if self.sharing is not None:
            return KeyValue(k, v, self.mask, self.sharing, self.seen)
        assert self.index is not None, "only an index can be too uneven to share"
        return KeyValue(k, v, self.mask, Sharing(len(k))).take(self.index)


def share(index: Tensor, entries: int) -> tuple[Tensor | None, Sharing]:
    """For rows that read entries `index` (B,): the entries to keep (None: all), and how the rows share them."""
    used, index = torch.unique(index, return_inverse=True)
    sharing = Sharing.from_index(index, len(used))
    if sharing is None or sharing.repeat == 1:  # too uneven, or one row each: one entry a row
        return used[index], Sharing(len(index))
    return (None if len(used) == entries else used), sharing


def check_rows(parts: Sequence[KeyValue], rows: int, tokens: int = 1) -> None:
    """Raise ValueError unless every part is for that many rows, and for so many tokens if it differs between them."""
    for part in parts:
        if part.sharing.rows != rows:
            raise ValueError(f"{rows} rows, but the memory serves {part.sharing.rows}")
        if part.seen is not None and part.seen.shape[1] != tokens:
            raise ValueError(f"{tokens} tokens, but the memory says what {part.seen.shape[1]} may read")
