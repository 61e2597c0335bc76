"""Attention masks and the position ids that follow from them. True (or 1) = may attend, everywhere.

Shapes: B batch, Tq queries, Tk keys, T tokens, H heads.
"""

import torch
from torch import Tensor


def causal_mask(queries: int, keys: int, device: torch.device | None = None) -> Tensor:
    """(Tq, Tk) bool, aligned to the end of the keys: query i sees keys 0 ... Tk - Tq + i.

    The alignment makes the same call right for a whole sequence and for the last tokens behind a cache.
    """
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def allowed(key_mask: Tensor | None, causal: bool, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """Which key each query may read, broadcastable to (B, H, Tq, Tk); None where nothing is masked."""
    if key_mask is not None:
        if key_mask.ndim != 2 or key_mask.shape[1] != keys:
            raise ValueError(f"key_mask must be (batch, {keys} keys), got {tuple(key_mask.shape)}")
        key_mask = key_mask.bool()[:, None, None, :]  # (B, 1, 1, Tk)
    if not causal or queries == 1:  # a single query stands last: it sees every key
        return key_mask
    order = causal_mask(queries, keys, device)
    return order if key_mask is None else key_mask & order  # (B, 1, Tq, Tk)


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """(B, T) position ids that count attended tokens only, so that left padding does not move a prompt.

    Padding in front gets 0, as does the first token.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def positions_from_ids(input_ids: Tensor, pad: int) -> Tensor:
    """(B, T) RoBERTa position ids: tokens count from `pad` + 1, padding stays at `pad`."""
    real = (input_ids != pad).long()
    return real.cumsum(-1) * real + pad


def decoder_positions(
    rows: int, past: int, new: int, attention_mask: Tensor | None, limit: int, device: torch.device
) -> Tensor:
    """(B or 1, T) position ids of `new` tokens behind `past` cached ones, for a table of `limit` positions.

    attention_mask (B, past + T): positions count attended tokens; None: all are. Raises ValueError on more tokens than
    positions, or a mask of another shape.
    """
    total = past + new
    if total > limit:
        raise ValueError(f"{total} tokens, but the position table serves {limit}")
    if attention_mask is None:
        return torch.arange(past, total, device=device)[None]
    if attention_mask.shape != (rows, total):
        raise ValueError(f"attention_mask must be {(rows, total)}, got {tuple(attention_mask.shape)}")
    return positions_from_mask(attention_mask)[:, past:]
