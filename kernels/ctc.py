"""Connectionist temporal classification (Graves et al. 2006): loss with its gradient, posteriors, the best alignment.

A row of T frames says S labels by a path through 2 S + 1 states: blank, first label, blank, ..., last label, blank. A
step stays, goes on by one, or passes over a blank between two different labels. The loss is -log of the sum over all
paths. With gamma_t(s) the share of those that are in state s at frame t, which sums over all paths to t and from t on
give, its gradient is d loss / d logit_tk = softmax(logits)_tk - sum of gamma_t(s) over the states of symbol k (equation
16 there), and the forward pass knows all of it.

Shapes: B rows, T frames, V symbols with the blank, S labels, L = 2 S + 1 states.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqa_scratch.kernels.cross_entropy import check_ids


def frames_needed(labels: Tensor) -> Tensor:
    """(B,) the fewest frames that can say `labels` (B, S): one each, and a blank between equal neighbours."""
    return (labels >= 0).sum(1) + ((labels[:, 1:] == labels[:, :-1]) & (labels[:, 1:] >= 0)).sum(1)


def check_alignable(labels: Tensor, lengths: Tensor) -> None:
    """Raises ValueError, with the first row in question, where `lengths` (B,) frames cannot say `labels` (B, S)."""
    needed = frames_needed(labels)
    if (bad := needed > lengths.to(needed.device)).any():
        row = int(bad.nonzero()[0])
        said, take, have = int((labels[row] >= 0).sum()), int(needed[row]), int(lengths[row])
        raise ValueError(f"row {row}: its {said} labels take {take} frames (equal neighbours need a blank), not {have}")


class Lattice:
    """The states of each row, and the log-probability of each at each frame; checks the arguments of all functions."""

    def __init__(self, logits: Tensor, labels: Tensor, lengths: Tensor | None, blank: int) -> None:
        if logits.ndim != 3 or labels.ndim != 2 or len(labels) != len(logits) or not logits.shape[1]:
            shapes = f"{tuple(logits.shape)}, {tuple(labels.shape)}"
            raise ValueError(f"logits (B, T, V) and labels (B, S) do not fit: {shapes}")
        rows, frames, vocabulary = logits.shape
        check_ids(labels, vocabulary)
        self.lengths = labels.new_full((rows,), frames) if lengths is None else lengths.to(labels)
        on_cpu = labels.device.type == "cpu"  # elsewhere a look at the numbers would have to wait for them
        if self.lengths.shape != (rows,) or on_cpu and not ((self.lengths > 0) & (self.lengths <= frames)).all():
            raise ValueError(f"lengths must hold {rows} numbers from 1 to {frames}, not {lengths}")
        said = labels >= 0
        if on_cpu and ((labels == blank).any() or (said[:, 1:] & ~said[:, :-1]).any()):
            raise ValueError(f"labels must not hold the blank, {blank}, and negative numbers must stand behind others")
        self.blank, self.ends = blank, 2 * said.sum(1)  # (B,) the last state of each row
        self.states = labels.new_full((rows, 2 * labels.shape[1] + 1), blank)
        self.states[:, 1::2] = labels.masked_fill(~said, blank)
        self.log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        self.index = self.states[:, None].expand(-1, frames, -1)  # (B, T, L)
        self.emissions = self.log_probs.gather(2, self.index).transpose(0, 1)  # (T, B, L)

    def closed(self, states: Tensor) -> Tensor:
        """(B, L): 0 where a step may come from the state but one before, -inf elsewhere."""
        open_ = states != self.blank
        open_[:, 2:] &= states[:, 2:] != states[:, :-2]
        return torch.zeros_like(states, dtype=self.log_probs.dtype).masked_fill_(~open_, -math.inf)

    def last_two(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of values (T, B, L) at the last frame of each row those of its last state and the one before, each (B,)."""
        end = values[self.lengths - 1, torch.arange(len(self.ends), device=values.device)]
        last, before = (end.gather(1, at.clamp(min=0)[:, None])[:, 0] for at in (self.ends, self.ends - 1))
        return last, before.masked_fill(self.ends == 0, -math.inf)

    def turned(self, values: Tensor) -> Tensor:
        """Values (T, B, L) with the frames and states of each row in opposite order; what lies behind turns too."""
        frame = torch.arange(len(values), device=values.device)[:, None]
        row = torch.arange(len(self.ends), device=values.device)[:, None]
        frames = (self.lengths - 1 - frame) % len(values)  # (T, B)
        states = (self.ends[:, None] - torch.arange(values.shape[2], device=values.device)) % values.shape[2]
        return values[frames[..., None], row, states]

    def loss(self) -> Tensor:
        """(B,) in nats; inf for a row that no path can say."""
        return -torch.logaddexp(*self.last_two(path_sums(self.emissions, self.closed(self.states))))

    def loss_and_posteriors(self) -> tuple[Tensor, Tensor]:
        """(loss (B,), gamma (B, T, L)); gamma is 0 behind the frames and states of a row, and in a row of loss inf.

        What follows a state is what precedes it in the turned lattice, so one pass over the frames gives both.
        """
        back = self.turned(self.states.expand(len(self.emissions), -1, -1))[0]
        closed = torch.cat((self.closed(self.states), self.closed(back)))
        sums = path_sums(torch.cat((self.emissions, self.turned(self.emissions)), 1), closed)
        before, after = sums.chunk(2, 1)
        loss = -torch.logaddexp(*self.last_two(before))
        paths = before + self.turned(after) - self.emissions
        frame = torch.arange(len(paths), device=loss.device)[:, None]
        state = torch.arange(paths.shape[2], device=loss.device)
        real = (frame < self.lengths)[..., None] & (state <= self.ends[:, None]) & (loss < math.inf)[:, None]
        real &= self.emissions > -math.inf  # where it is not, paths is -inf + inf
        # Each frame sums to the probability of the labels; divided by its own sum, rounding of long rows cancels.
        gamma = paths.masked_fill(~real, -math.inf).softmax(-1).masked_fill(~real, 0.0)
        return loss, gamma.transpose(0, 1)


def path_sums(emissions: Tensor, closed: Tensor) -> Tensor:
    """(T, B, L): the log of the sum over all paths from the start to each state, with its own emission (T, B, L)."""
    sums = emissions.new_full((*emissions.shape[:2], emissions.shape[2] + 2), -math.inf)  # two states before the first
    sums[0, :, 2:4] = emissions[0, :, :2]
    for t in range(1, len(sums)):
        before, now = sums[t - 1], sums[t, :, 2:]
        torch.logaddexp(before[:, 2:], before[:, 1:-1], out=now)
        torch.logaddexp(now, before[:, :-2] + closed, out=now)
        now += emissions[t]
    return sums[..., 2:]


class CTC(torch.autograd.Function):
    """(logits, labels, lengths, blank) -> losses (B,)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, lengths: Tensor | None, blank: int) -> Tensor:
        lattice = Lattice(logits, labels, lengths, blank)
        if not ctx.needs_input_grad[0]:
            return lattice.loss()
        loss, gamma = lattice.loss_and_posteriors()
        frame = torch.arange(logits.shape[1], device=logits.device)
        counted = (frame < lattice.lengths[:, None]) & (loss < math.inf)[:, None]
        gradient = lattice.log_probs.exp().scatter_add_(2, lattice.index, gamma.neg())
        ctx.save_for_backward(gradient.masked_fill_(~counted[..., None], 0.0))
        ctx.dtype = logits.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * dloss[:, None, None]).to(ctx.dtype), None, None, None


def ctc_loss(
    logits: Tensor,
    labels: Tensor,
    lengths: Tensor | None = None,
    *,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """-log p(labels | logits) in nats, at least fp32: (B,) with reduction="none", a scalar with "sum" and "mean".

    logits (B, T, V), of which the first `lengths` (B,) frames count, all by default; labels (B, S), negative behind the
    last one of a row. "mean" divides each row by its number of labels first, as torch.nn.functional.ctc_loss does. A
    row with too few frames has a loss of inf, or with `zero_infinity` of 0, and no gradient. Raises ValueError on
    arguments that do not fit.
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be none, sum or mean, not {reduction!r}")
    loss: Tensor = CTC.apply(logits, labels, lengths, blank)
    if zero_infinity:
        loss = loss.masked_fill(loss == math.inf, 0.0)
    if reduction == "mean":
        return (loss / (labels >= 0).sum(1).clamp(min=1)).mean()
    return loss.sum() if reduction == "sum" else loss


@torch.no_grad()
def ctc_posteriors(logits: Tensor, labels: Tensor, lengths: Tensor | None = None, *, blank: int = 0) -> Tensor:
    """(B, T, 2 S + 1): the probability of each state at each frame, given the labels. Arguments as of `ctc_loss`."""
    return Lattice(logits, labels, lengths, blank).loss_and_posteriors()[1]


@torch.no_grad()
def ctc_align(logits: Tensor, labels: Tensor, lengths: Tensor | None = None, *, blank: int = 0) -> Tensor:
    """(B, T) long: which label, counted from 0, the likeliest path says at each frame; -1 in a blank and after the end.

    Arguments as of `ctc_loss`. Raises ValueError for labels that the frames of their row cannot say.
    """
    lattice = Lattice(logits, labels, lengths, blank)
    check_alignable(labels, lattice.lengths)
    emissions, closed = lattice.emissions, lattice.closed(lattice.states)
    best = emissions.new_full((*emissions.shape[:2], emissions.shape[2] + 2), -math.inf)
    best[0, :, 2:4] = emissions[0, :, :2]
    steps = torch.zeros_like(emissions, dtype=torch.long)  # how many states the best step into each one goes on
    for t in range(1, len(best)):
        before = best[t - 1]
        ways = torch.stack((before[:, 2:], before[:, 1:-1], before[:, :-2] + closed))
        value, steps[t] = ways.max(0)
        best[t, :, 2:] = value + emissions[t]
    last, before_last = lattice.last_two(best[..., 2:])
    state = lattice.ends - (before_last > last).long()
    path = torch.full_like(lattice.index[..., 0], -1)
    for t in range(len(best) - 1, -1, -1):
        inside = t < lattice.lengths
        path[:, t] = torch.where(inside & (state % 2 == 1), state // 2, -1)
        state = torch.where(inside, state - steps[t].gather(1, state[:, None])[:, 0], state)
    return path
