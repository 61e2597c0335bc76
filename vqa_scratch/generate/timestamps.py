"""The rules of Whisper's timestamps: when a time may come, when it must, and which (Radford et al. 2022, 2212.04356).

What is said is a row of segments, each between two times: time, words, time, time, words, time. The rules are those of
OpenAI's `decoding.py`, and of `transformers`.

Shapes: R rows, V vocabulary.
"""

import math
from typing import Self

import torch
from torch import Tensor

from vqa_scratch.generation_options import GenerationOptions, end_ids


class Timestamps:
    """Bars what must not come next, for rows whose new tokens it is told one by one."""

    def __init__(self, no_timestamps: int, end: int, latest_first: int | None, rows: int, device: torch.device) -> None:
        """Times are ids above `no_timestamps`, words those below `end`; the first time is at most `latest_first`."""
        self.no_timestamps, self.end, self.latest_first = no_timestamps, end, latest_first
        self.last = torch.ones(rows, dtype=torch.bool, device=device)  # whether the last token is a time; of none it is
        self.before = self.last  # and the one before it
        self.latest = torch.full((rows,), no_timestamps, device=device)  # (R,) the last time

    @classmethod
    def of(cls, options: GenerationOptions, rows: int, device: torch.device) -> Self | None:
        """The rules, if the options ask for them."""
        if options.no_timestamps_token_id is None:
            return None
        end = min(end_ids(options.eos_id))
        return cls(options.no_timestamps_token_id, end, options.max_initial_timestamp_index, rows, device)

    def __call__(self, scores: Tensor, made: int) -> Tensor:
        """The scores (R, V) of all rows after `made` new tokens, those of barred tokens -inf."""
        scores, first = scores.clone(), self.no_timestamps + 1
        words, times = scores[:, :first], scores[:, first:]  # views
        if made == 0:
            words.fill_(-math.inf)
            if self.latest_first is not None:
                times[:, self.latest_first + 1 :] = -math.inf
            return scores
        closed, two = self.last & ~self.before, self.last & self.before
        # A segment ends after it has begun; the next one may begin when it ends.
        lowest = self.latest + 1 - closed.long()
        places = torch.arange(first, scores.shape[1], device=scores.device)
        times.masked_fill_(two[:, None] | (places < lowest[:, None]), -math.inf)
        words[:, self.no_timestamps] = -math.inf
        words[:, : self.end].masked_fill_(closed[:, None], -math.inf)
        surer = times.float().logsumexp(-1) > words.amax(-1)  # all times together than any other token
        words.masked_fill_(surer[:, None], -math.inf)
        return scores

    def add(self, tokens: Tensor) -> None:
        """The chosen tokens (R,)."""
        time = tokens > self.no_timestamps
        self.latest = torch.where(time, tokens, self.latest)
        self.before, self.last = self.last, time

    def keep(self, rows: Tensor) -> None:
        """Row r becomes what row `rows[r]` was."""
        self.last, self.before, self.latest = self.last[rows], self.before[rows], self.latest[rows]
