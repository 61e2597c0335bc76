"""What the kernels compute, in plain torch: the reference of every kernel, which also runs where no kernel does.

Attention is equation 1 of Vaswani et al. 2017 with the log-sum-exp of each row beside the output (Dao et al. 2022,
2205.14135); its relative bias is that of T5 (Raffel et al. 2020, 1910.10683, section 2.1).

Shapes: B batch, H heads, Tq queries, Tk keys, d head size, N rows of logits, D width, V vocabulary.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def distance_buckets(distance: Tensor, buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """T5's bucket of each relative distance (key position - query position), long, in the shape of `distance`.

    Half of the buckets hold one distance each, the rest grow logarithmically up to `max_distance`. An encoder
    (bidirectional) uses half of all buckets for keys after the query; a decoder sees only keys before it.
    """
    offset = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = (distance > 0) * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    scale = (buckets - exact) / math.log(max_distance / exact)
    far = exact + ((distance.clamp(min=1).float() / exact).log() * scale).long()
    return offset + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # the cached tensor may take part in gradients later
def _line(
    queries: int, keys: int, buckets: int, max_distance: int, bidirectional: bool, device: torch.device
) -> Tensor:
    """The buckets of all distances, cached: every layer and every step needs the same few."""
    return distance_buckets(torch.arange(1 - keys, queries), buckets, max_distance, bidirectional).to(device)


@dataclass(frozen=True, eq=False)
class DistanceBias:
    """A learned bias on the scores: one number for each head and bucket of relative distances."""

    table: Tensor  # (buckets, H)
    max_distance: int
    bidirectional: bool

    def buckets(self, queries: int, keys: int) -> Tensor:
        """(Tq + Tk - 1,) long: the bucket of each distance from -(Tk - 1) to Tq - 1, queries at the end of the keys."""
        sizes = (len(self.table), self.max_distance, self.bidirectional)
        return _line(queries, keys, *sizes, self.table.device)

    def pairs(self, queries: int, keys: int) -> Tensor:
        """(Tq, Tk) long: the bucket of each query and key."""
        device = self.table.device
        row, column = torch.arange(queries, device=device), torch.arange(keys, device=device)
        place = column[None, :] - row[:, None] + queries - 1  # distance + Tk - 1
        return self.buckets(queries, keys)[place]

    def dense(self, queries: int, keys: int) -> Tensor:
        """(1, H, Tq, Tk): the bias as one tensor."""
        return self.table[self.pairs(queries, keys)].permute(2, 0, 1).unsqueeze(0)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    bias: DistanceBias | None = None,
) -> tuple[Tensor, Tensor]:
    """(O, LSE): O (B, H, Tq, d) = softmax(S) v, LSE (B, H, Tq) = log sum exp S, in nats, at least fp32.

    S = scale * q k^T + bias, q (B, H, Tq, d), k and v (B, H, Tk, d). key_mask (B, Tk), True = may attend; causal is
    aligned to the end of the keys: query i sees keys 0 ... Tk - Tq + i; scale defaults to d**-0.5. A query without a
    key has O = 0 and LSE = -inf, and no gradient. Mixed dtypes are promoted.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    kind = functools.reduce(torch.promote_types, (q.dtype, k.dtype, v.dtype))
    q, k, v = q.to(kind), k.to(kind), v.to(kind)
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if bias is not None:
        scores = scores + bias.dense(queries, keys)
    if causal:
        order = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        scores = scores.masked_fill(~order, -math.inf)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask.bool()[:, None, None, :], -math.inf)
    top = scores.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)  # exp(-inf - 0) = 0 where exp(-inf + inf) is NaN
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    out = (weights / total.masked_fill(empty, 1.0)).to(v.dtype) @ v
    lse = total.masked_fill(empty, 1.0).log() + top
    return out, lse.masked_fill(empty, -math.inf).squeeze(-1)


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of several sets of keys, from the (O, LSE) of each: (B, H, Tq, d), (B, H, Tq).

    O = sum_p exp(LSE_p - LSE) O_p with LSE = log sum_p exp LSE_p: one softmax over all keys, exactly.
    """
    each = torch.stack([lse for _, lse in parts])  # (parts, B, H, Tq)
    top = each.detach().amax(0)
    weights = (each - top.masked_fill(top == -math.inf, 0.0)).exp()
    total = weights.sum(0)
    empty = total == 0
    share = weights / total.masked_fill(empty, 1.0)
    out = sum(part[..., None] * out.to(part.dtype) for part, (out, _) in zip(share, parts, strict=True))
    lse = total.masked_fill(empty, 1.0).log() + top.masked_fill(empty, 0.0)
    return out.to(parts[0][0].dtype), lse.masked_fill(empty, -math.inf)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of the cross-entropy in nats, how many labels are the argmax), both scalars, over rows with label >= 0.

    hidden (N, D), weight (V, D), labels (N,); logits are hidden weight^T.
    """
    keep = labels >= 0
    logits, wanted = F.linear(hidden[keep], weight), labels[keep]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, wanted, reduction="sum"), (logits.detach().argmax(-1) == wanted).sum()


def chosen_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability of `ids`, entropy), both (N,), in nats, at least fp32. logits (N, V); -inf has probability 0."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logprobs = logits.log_softmax(-1)
    inside = logprobs.masked_fill(logprobs == -math.inf, 0.0)  # 0 * log 0 = 0
    return logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(inside.exp() * inside).masked_fill(
        logprobs == -math.inf, 0.0
    ).sum(-1)


def ctc_loss(logits: Tensor, labels: Tensor, lengths: Tensor, blank: int = 0) -> Tensor:
    """(B,) nats: -log p(labels), the sum over paths by the recursion of Graves et al. 2006, equations 6 and 7.

    logits (B, T, V), lengths (B,) frames that count, labels (B, S) with negative numbers behind the last one of a row.
    """
    least, losses = -1e30, []  # in place of -inf, whose differences are NaN in gradients
    for row, wanted, frames in zip(logits, labels, lengths.tolist(), strict=True):
        states = F.pad(
            torch.stack((torch.full_like(wanted, blank), wanted), 1)[wanted >= 0].flatten(), (0, 1), value=blank
        )
        emissions = row[:frames].log_softmax(-1)[:, states]
        skips = (states != blank) & (states != F.pad(states, (2, 0), value=blank)[:-2])
        alpha = F.pad(emissions[0, :2], (0, max(0, len(states) - 2)), value=least)
        for emission in emissions[1:]:
            by_one, by_two = (F.pad(alpha, (n, 0), value=least)[:-n] for n in (1, 2))
            alpha = torch.stack((alpha, by_one, by_two.masked_fill(~skips, least))).logsumexp(0) + emission
        total = alpha[-2:].logsumexp(0)
        losses.append(-total if total > least / 2 else total.new_tensor(math.inf))
    return torch.stack(losses)
