"""Token by token: one loop for greedy decoding and sampling. Rows that have ended are dropped on the way.

Shapes: B rows, L rows still decoded, A new tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vqa_scratch.generate.state import State

# Ended rows are dropped once fewer than this share still run: dropping costs a copy of the cache.
COMPACT_BELOW = 0.75
# On a GPU the host waits for the device when it asks whether all rows have ended: it asks every so many tokens.
ASK_EVERY = {"cpu": 1, "cuda": 8}

# scores (L, V), the rows they belong to (L,), new tokens so far -> token and its log-probability, (L,) each
Choose = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class Generated(NamedTuple):
    """`ids` (B, A): the new tokens, EOS included, then `fill`; `log_probs` (B, A): of each of them, 0 after EOS."""

    ids: Tensor
    log_probs: Tensor
    lengths: Tensor  # (B,) new tokens a row, EOS included


def decode(
    scores: Tensor, state: State, choose: Choose, *, max_new_tokens: int, eos_id: int | None, fill: int = 0
) -> Generated:
    """Choose, step, choose, ... until every row has said EOS or `max_new_tokens`.

    `scores` (B, V) and `state` are what `begin` returns. Log-probabilities are those that `choose` gives.
    """
    rows, device = len(scores), scores.device
    ids = torch.full((rows, max_new_tokens), fill, device=device)
    log_probs = torch.zeros(rows, max_new_tokens, device=device)
    live = torch.arange(rows, device=device)
    done = torch.zeros(rows, dtype=torch.bool, device=device)  # of the live rows
    made, since = 0, 0
    pending: list[tuple[Tensor, Tensor]] = []  # what was chosen since `since`, for the live rows

    def write() -> None:
        nonlocal since, pending
        if pending:
            chosen, their = (torch.stack(column, 1) for column in zip(*pending, strict=True))
            ids[live, since:made], log_probs[live, since:made] = chosen, their
        since, pending = made, []

    ask_every = ASK_EVERY.get(device.type, 1)
    while True:
        token, log_prob = choose(scores, live, made)
        pending.append((token, log_prob))
        made += 1
        if made == max_new_tokens:
            break
        if eos_id is not None:
            done |= token == eos_id
            if made % ask_every == 0:
                running = len(live) - int(done.count_nonzero())
                if running == 0:
                    break
                if running < COMPACT_BELOW * len(live):
                    write()
                    kept = (~done).nonzero().squeeze(1)
                    state.keep(kept)
                    live, token, done = live[kept], token[kept], done[kept]
        scores = state.step(token)
    write()
    return finished(ids[:, :made], log_probs[:, :made], eos_id, fill)


def finished(ids: Tensor, log_probs: Tensor, eos_id: int | None, fill: int) -> Generated:
    """Cut what was chosen after EOS; ids and log_probs (B, A)."""
    if eos_id is None:
        return Generated(ids, log_probs, torch.full((len(ids),), ids.shape[1], device=ids.device))
    is_end = ids == eos_id
    lengths = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, ids.shape[1])
    after = torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None]
    longest = int(lengths.max())
    return Generated(ids.masked_fill(after, fill)[:, :longest], log_probs.masked_fill(after, 0.0)[:, :longest], lengths)
