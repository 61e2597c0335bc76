"""The decoding loop of greedy decoding and sampling, which drops rows that have ended.

Shapes: B rows, L rows still running, A new tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vqa_scratch.generate.state import State
from vqa_scratch.generation_options import end_ids

# Ended rows are dropped when less than this share of rows still runs: dropping copies the cache.
COMPACT_BELOW = 0.75
# Checking whether all rows have ended makes the host wait for a GPU, so it is done once in so many tokens.
ASK_EVERY = {"cpu": 1, "cuda": 8}
# Log-probabilities are computed for several steps at once, up to this many scores, which saves calls. On a GPU a step
# may overwrite the scores of the one before.
SCORES_KEPT = {"cpu": 1 << 16}

# scores (L, V), their rows (L,), new tokens so far -> tokens (L,) and their scores (L, V) after the processors, or
# always None if log-probabilities are not needed
Choose = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor | None]]


class Generated(NamedTuple):
    """`ids` (B, A): the new tokens, EOS included, then `fill`; `log_probs` (B, A): theirs, 0 after EOS.

    `log_probs` is None if `choose` returns no scores.
    """

    ids: Tensor
    log_probs: Tensor | None
    lengths: Tensor  # (B,) new tokens a row, EOS included

    def likely(self) -> Tensor:
        """(B,) the probability of all tokens of a row. Raises ValueError if `choose` returned no scores."""
        if self.log_probs is None:
            raise ValueError("without scores there are no probabilities")
        return self.log_probs.sum(1).exp()


class _Record:
    """The chosen tokens of all rows and their lengths, copied into one tensor when rows are dropped, not each step."""

    def __init__(self, rows: int, steps: int, ends: tuple[int, ...], fill: int, device: torch.device) -> None:
        self.ends, self.fill = ends, fill
        self.ids = torch.full((rows, steps), fill, device=device)
        self.log_probs: Tensor | None = None  # as `ids`, from the first scores on
        self.lengths = [0] * rows  # 0: has not ended
        self.rows = list(range(rows))  # the L running rows
        self.live = torch.arange(rows, device=device)  # the same
        self.made = self.read = self.written = 0  # tokens in each running row: chosen, read by the host, written
        self.tokens: list[Tensor] = []  # (L,) each, those after `written`
        self.found: list[Tensor] = []  # (L, steps) each, log-probabilities of the first of these
        self.scores: list[Tensor] = []  # (L, V) each, of the others
        self.kept = SCORES_KEPT.get(device.type, 0)

    def add(self, tokens: Tensor, scores: Tensor | None) -> None:
        self.tokens.append(tokens)
        self.made += 1
        if scores is not None:
            if self.log_probs is None:
                self.log_probs = torch.zeros(self.ids.shape, device=self.ids.device)
            self.scores.append(scores)
            if (len(self.scores) + 1) * scores.numel() > self.kept:
                self._measure()

    def running(self) -> list[int]:
        """Which of the live rows have not ended; here the host waits for the device."""
        unread = self.tokens[self.read - self.written :]
        for tokens in torch.stack(unread).tolist() if len(unread) > 1 else [tokens.tolist() for tokens in unread]:
            self.read += 1
            for row, token in zip(self.rows, tokens, strict=True):
                if token in self.ends and self.lengths[row] == 0:
                    self.lengths[row] = self.read
        return [place for place, row in enumerate(self.rows) if self.lengths[row] == 0]

    def keep(self, places: Tensor) -> None:
        """Keep these (L',) of the live rows."""
        self._write()
        self.live = self.live[places]
        self.rows = self.live.tolist()

    def _measure(self) -> None:
        scores, tokens = torch.stack(self.scores, 1), torch.stack(self.tokens[-len(self.scores) :], 1)
        self.found.append(scores.float().log_softmax(-1).gather(2, tokens[..., None]).squeeze(2))
        self.scores = []

    def _write(self) -> None:
        if self.scores:
            self._measure()
        new = slice(self.written, self.made)
        self.ids[self.live, new] = torch.stack(self.tokens, 1)
        if self.log_probs is not None:
            self.log_probs[self.live, new] = torch.cat(self.found, 1)
        self.tokens, self.found, self.written = [], [], self.made

    def generated(self) -> Generated:
        """All tokens, cut where rows end."""
        self.running()
        self._write()
        lengths = [length or self.made for length in self.lengths]
        longest, ends = max(lengths), torch.tensor(lengths, device=self.ids.device)
        after = torch.arange(longest, device=self.ids.device) >= ends[:, None]
        ids = self.ids[:, :longest].masked_fill(after, self.fill)
        log_probs = None if self.log_probs is None else self.log_probs[:, :longest].masked_fill(after, 0.0)
        return Generated(ids, log_probs, ends)


def decode(
    scores: Tensor,
    state: State,
    choose: Choose,
    *,
    max_new_tokens: int,
    eos_id: int | tuple[int, ...] | None,
    fill: int = 0,
    compact_below: float = COMPACT_BELOW,
) -> Generated:
    """Choose, step, choose, ... until every row has ended or has `max_new_tokens`.

    `scores` (B, V) and `state` come from `begin`, `eos_id` is that of `GenerationOptions`; log-probabilities are of the
    scores that `choose` returns. Ended rows are dropped when the share of running rows is under `compact_below`; 0
    drops none.
    """
    record = _Record(len(scores), max_new_tokens, end_ids(eos_id), fill, scores.device)
    ask_every = ASK_EVERY.get(scores.device.type, 1)
    while True:
        tokens, chosen_by = choose(scores, record.live, record.made)
        record.add(tokens, chosen_by)
        if record.made == max_new_tokens:
            break
        if record.ends and record.made % ask_every == 0:
            running = record.running()
            if not running:
                break
            if len(running) < compact_below * len(record.rows):
                kept = torch.tensor(running, device=scores.device)
                state.keep(kept)
                record.keep(kept)
                tokens = tokens[kept]
        scores = state.step(tokens)
    return record.generated()
