"""Attention: four implementations with one result, the choice between them, and the module for self and cross.

Vaswani et al. 2017, "Attention Is All You Need", equation 1: softmax(q k^T / sqrt(d) + bias) v. "fused" is torch's
scaled_dot_product_attention (FlashAttention, Dao et al. 2022), "kernel" our Triton kernel on a GPU; the other two are
in `nn/scores.py`. A query that may look at nothing gets zeros in all of them.

Shapes: B rows, H heads, T (Tq, Tk) tokens, d head size, D width; a memory has M entries of N tokens, R rows each.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vqa_scratch import kernels
from vqa_scratch.nn import taps
from vqa_scratch.nn.cache import KVCache
from vqa_scratch.nn.memory import KeyValue, Memory, check_rows
from vqa_scratch.nn.memory_parts import concatenate, of_tokens
from vqa_scratch.nn.relative_bias import ScoreBias
from vqa_scratch.nn.scores import Products, allowed, attention_scores, hide, masked_softmax

BACKENDS = ("fused", "products", "explicit")  # these take any mask and bias; "kernel" takes neither as a tensor


def choose(q: Tensor, *, bias: bool = False, kernel: bool = False, dropout: float = 0.0, shown: bool = False) -> str:
    """Which attention runs for queries like q (B, H, Tq, d). Only this function decides.

    "explicit"  a trace reads or replaces the scores or the weights (`shown`)
    "kernel"    Triton supports q, and the caller can use it (`kernel`): for a bias by distance, or several parts
    "products"  on a CPU in bf16 or with a bias: torch's operator has no fast backward pass there
    "fused"     everywhere else

    Gradients make no difference: the result is the same bits with and without them, so that the first ratio of PPO is
    exactly 1.
    """
    if shown:
        return "explicit"
    if kernel and q.device.type in kernels.DEVICES and kernels.takes_attention(q, dropout=dropout):
        return "kernel"
    return "products" if q.device.type == "cpu" and (bias or q.dtype == torch.bfloat16) else "fused"


def masked_safely(device: torch.device) -> AbstractContextManager:
    """Inside this context torch's fused operator does not use cuDNN, which is wrong with some masks.

    Up to torch 2.10 cuDNN ignores the mask of a row that may look at nothing (pytorch issue 177842), and from 2.11 to
    2.13 the gradient of a query can be NaN on an H100 (pytorch issue 196678).
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """The attention output, (B, H, Tq, d).

    q (B, H, Tq, d); k, v (B, H, Tk, d); key_mask (B, Tk), True = may look; bias is added to the scores and broadcasts
    to (B, H, Tq, Tk), -inf allowed; causal is aligned to the end of the keys; scale defaults to d**-0.5; dropout is the
    probability that a weight is dropped; backend None means the result of `choose`. Raises ValueError on an unknown
    backend or a misshapen mask.
    """
    backend = backend or choose(q, bias=bias is not None)
    if backend == "explicit":
        pattern = masked_softmax(attention_scores(q, k, key_mask=key_mask, bias=bias, causal=causal, scale=scale))
        return F.dropout(pattern, dropout).to(v.dtype) @ v  # a bias in fp32 makes the weights fp32
    if backend == "products":
        keep = allowed(key_mask, causal, q.shape[-2], k.shape[-2], q.device)
        return Products.apply(q, k, v, bias, keep, q.shape[-1] ** -0.5 if scale is None else scale, dropout)
    if backend != "fused":
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if causal and key_mask is None and bias is None and q.shape[-2] == k.shape[-2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, dropout_p=dropout)
    keep = allowed(key_mask, causal, q.shape[-2], k.shape[-2], q.device)
    mask = keep if bias is None else hide(bias.to(q.dtype), keep)
    with nullcontext() if mask is None else masked_safely(q.device):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, dropout_p=dropout)


def attention_over_parts(
    q: Tensor, parts: Sequence[KeyValue], *, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Attention of q (B, H, T, d) over the union of the parts' keys: one softmax. Returns (B, H, T, d).

    With Triton each part is attended to separately, and the results are merged by their log-sum-exps; not if tokens of
    one row read different keys.
    """
    if len(parts) == 1:
        (k, v, mask, sharing, _), bias = parts[0], unseen(parts[0], q)
        return sharing.unfold(attention(sharing.fold(q), k, v, key_mask=mask, bias=bias, scale=scale, dropout=dropout))
    if choose(q, kernel=all(part.seen is None for part in parts), dropout=dropout) == "kernel":
        ran = [kernels.flash_attention(p.sharing.fold(q), p.k, p.v, key_mask=p.mask, scale=scale) for p in parts]
        apart = [(p.sharing.unfold, z, lse.unsqueeze(-1)) for p, (z, lse) in zip(parts, ran, strict=True)]
        return kernels.merge([(unfold(z), unfold(lse).squeeze(-1)) for unfold, z, lse in apart])[0]
    apart_scores = [
        attention_scores(p.sharing.fold(q), p.k, key_mask=p.mask, bias=unseen(p, q), scale=scale) for p in parts
    ]
    scores = torch.cat([p.sharing.unfold(s) for p, s in zip(parts, apart_scores, strict=True)], -1)  # (B, H, T, N1 ...)
    never_empty = any(part.mask is None and part.seen is None for part in parts)
    pattern = F.dropout(torch.softmax(scores, -1) if never_empty else masked_softmax(scores), dropout)
    pieces = pattern.split([part.k.shape[2] for part in parts], -1)
    reads = [part.sharing.unfold(part.sharing.fold(piece) @ part.v) for piece, part in zip(pieces, parts, strict=True)]
    return sum(reads[1:], start=reads[0])


def unseen(part: KeyValue, q: Tensor) -> Tensor | None:
    """(B, 1, T, N) to add to the scores: -inf where a token may not read a key; None where every token reads all."""
    return None if part.seen is None else hide(q.new_zeros(part.seen.shape), part.seen)[:, None]


class MultiHeadAttention(taps.Tapped):
    """Self-attention with one fused `qkv`, or cross-attention (`context_dim` given) with `q` and a fused `kv`.

    `dropout` is the probability of dropping a weight while training; `scale` None means head_dim**-0.5; each of fewer
    `kv_heads` serves heads / kv_heads queries (Ainslie et al. 2023, 2305.13245); `before` are modules that change
    q, k and v (..., their heads, T, d), before q and k turn.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        kv_heads: int | None = None,
        context_dim: int | None = None,
        bias: bool = True,
        out_bias: bool = True,
        scale: float | None = None,
        dropout: float = 0.0,
        before: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        if head_dim is None and dim % heads:
            raise ValueError(f"width {dim} does not divide into {heads} heads; give head_dim")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads or heads, head_dim or dim // heads
        self.scale, self.dropout = self.head_dim**-0.5 if scale is None else scale, dropout
        inner = heads * self.head_dim
        if context_dim is None:
            self.qkv = nn.Linear(dim, inner + 2 * self.kv_heads * self.head_dim, bias=bias)
        else:
            self.q = nn.Linear(dim, inner, bias=bias)
            self.kv = nn.Linear(context_dim, 2 * inner, bias=bias)
        self.q_norm, self.k_norm, self.v_norm = before or (nn.Identity(), nn.Identity(), nn.Identity())
        self.is_cross = context_dim is not None
        self.out = nn.Linear(inner, dim, bias=out_bias)

    @property
    def stacked(self) -> dict[Tensor, tuple[int, ...]]:
        """The weight of the fused projection, and the rows of each matrix in it: q, k and v, or k and v."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {self.qkv.weight: (q, kv, kv)} if hasattr(self, "qkv") else {self.kv.weight: (kv, kv)}

    def forward(
        self,
        x: Tensor,
        context: Tensor | Memory | Sequence[Memory] | None = None,
        key_mask: Tensor | None = None,
        bias: ScoreBias | None = None,
        causal: bool = False,
        cache: KVCache | None = None,
        rotate: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D).

        context: (B, N, context_dim) with key_mask (B, N), or memories, which have their own masks. With a cache
        self-attention needs key_mask and bias for all keys, old and new; cross-attention projects its context once. A
        bias includes the mask and the causal order. `rotate` changes q and k (B, heads, T, d), which are cached so.
        """
        name, scale, dropout = self.tap_prefix, self.scale, self.dropout if self.training else 0.0
        added: Tensor | None = None
        if self.is_cross:
            assert bias is None and not causal, "cross-attention takes no bias and has no order"
            (q,), parts = self._split(self.q(x), self.heads), self.project(context, key_mask, cache)
            q = self.q_norm(q)
            check_rows(parts, *x.shape[:2])
            if not taps.wanted(name, "k", "v", "mask", "scores", "pattern"):
                q = taps.tap(name, "q", q)
                return self._join(attention_over_parts(q, parts, scale=scale, dropout=dropout))
            whole = concatenate(parts)
            k, v, key_mask, added = whole.k, whole.v, whole.mask, unseen(whole, q)
        else:
            assert context is None, "this is self-attention: it was built without context_dim"
            q, k, v = self._split(self.qkv(x), self.heads, self.kv_heads, self.kv_heads)
            q, k, v = self.q_norm(q), self.k_norm(k), self.v_norm(v)
            if rotate is not None:
                q, k = rotate(q), rotate(k)
            if cache is not None:
                k, v = cache.append(k, v)
            if self.kv_heads < self.heads:
                k, v = (x[:, :, None].expand(-1, -1, self.heads // self.kv_heads, -1, -1).flatten(1, 2) for x in (k, v))
        q, k, v = taps.tap(name, "q", q), taps.tap(name, "k", k), taps.tap(name, "v", v)
        shown = taps.wanted(name, "scores", "pattern")
        by_distance = bias is not None and bias.by_distance and not taps.wanted(name, "mask")
        biased = bias is not None or added is not None
        backend = choose(q, bias=biased, kernel=by_distance, dropout=dropout, shown=shown)
        if bias is not None:
            assert key_mask is None and not causal, "the bias of a pass includes the mask and the order"
            if backend == "kernel":
                return self._join(bias.look_up(q, k, v, scale))
            added, key_mask = bias.written_out(q, scale)
        if taps.wanted(name, "mask"):
            size = q.shape[-2], k.shape[-2]
            keep = allowed(key_mask, causal, *size, q.device)
            taps.tap(name, "mask", hide(q.new_zeros(1, 1, *size) if added is None else added.to(q.dtype), keep))
        if not shown:
            masks = {"key_mask": key_mask, "bias": added}
            return self._join(attention(q, k, v, **masks, causal=causal, scale=scale, dropout=dropout, backend=backend))
        scores = attention_scores(q, k, key_mask=key_mask, bias=added, causal=causal, scale=scale)
        pattern = taps.tap(name, "pattern", masked_softmax(taps.tap(name, "scores", scores)))
        return self._join(F.dropout(pattern, dropout).to(v.dtype) @ v)

    def _split(self, x: Tensor, *heads: int) -> tuple[Tensor, ...]:
        """(B, T, sum(heads)*d) -> a view (B, H, T, d) for each number of heads."""
        # Pieces of the last axis: their gradients are joined in one pass, in the layout of the product before them.
        pieces = x.split([number * self.head_dim for number in heads], -1)
        return tuple(piece.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for piece in pieces)

    def _join(self, z: Tensor) -> Tensor:
        """The output projection: the outputs of the heads (B, H, T, d) -> (B, T, D)."""
        z = taps.tap(self.tap_prefix, "z", z)
        if taps.wanted(self.tap_prefix, "head_out"):
            weight = self.out.weight.unflatten(1, (self.heads, self.head_dim))  # (D, H, d)
            per_head = taps.tap(self.tap_prefix, "head_out", torch.einsum("bhtd,ehd->bhte", z, weight))
            out = per_head.sum(1) if self.out.bias is None else per_head.sum(1) + self.out.bias
        else:
            out = self.out(z.transpose(1, 2).flatten(2))  # (B, T, H*d)
        return taps.tap(self.tap_prefix, "out", out)

    def project(
        self,
        context: Tensor | Memory | Sequence[Memory] | None,
        key_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> list[KeyValue]:
        """Keys and values that cross-attention reads, kept in the cache; arguments as in `forward`.

        Of memories whose keys the cache has, only what each token may read is taken.
        """
        if isinstance(context, Tensor):
            context = Memory(context, key_mask)
        elif key_mask is not None:
            raise ValueError("key_mask goes with a plain context tensor; a Memory has its own mask")
        memories = [context] if isinstance(context, Memory) else context
        if cache is not None and cache.cross is not None:
            if memories is None or all(memory.seen is None for memory in memories):
                return cache.cross
            parts = of_tokens(memories, cache.cross)
        elif memories is None:
            raise ValueError("cross-attention needs a context")
        else:
            apart = [self._split(self.kv(memory.states), self.heads, self.heads) for memory in memories]
            parts = [m.project(self.k_norm(k), self.v_norm(v)) for m, (k, v) in zip(memories, apart, strict=True)]
        if cache is not None:
            cache.fill_cross(parts)
        return parts
