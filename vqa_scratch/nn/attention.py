"""Attention, written out: one function in ways that agree, and one module for self- and cross-attention.

Vaswani et al. 2017, "Attention Is All You Need", equation 1: softmax(q k^T / sqrt(d) + bias) v. The fused way is
torch's scaled_dot_product_attention (FlashAttention, Dao et al. 2022), or on a CPU products with a backward pass of
their own; the explicit way has the scores and the weights in the open (`nn/scores.py`). On a GPU our own kernel joins
parts and looks biases up. A query that may attend to nothing reads zeros in all of them.

Shapes: B rows, H heads, T (Tq, Tk) tokens, d head size, D width; a memory has M entries of N tokens, R rows each.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vqa_scratch import kernels
from vqa_scratch.nn import masks, taps
from vqa_scratch.nn.cache import KVCache
from vqa_scratch.nn.memory import KeyValue, Memory, check_rows, concatenate
from vqa_scratch.nn.products import products_attention
from vqa_scratch.nn.relative_bias import PassBias
from vqa_scratch.nn.scores import attention_mask, attention_scores, attention_weights, masked_softmax

BACKENDS = ("fused", "products", "explicit")


def _slow_backward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    """Whether gradients are needed where torch's fused operator has no fast way to them: see `nn/products.py`."""
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        return False
    learned = bias is not None and bias.requires_grad
    return learned or (q.dtype == torch.bfloat16 and (q.requires_grad or k.requires_grad or v.requires_grad))


def masked_safely(device: torch.device) -> AbstractContextManager:
    """Inside, torch's fused operator leaves cuDNN out, which is not to be trusted with a mask.

    Up to torch 2.10 a row that may attend to nothing reads there as if nothing were masked (pytorch issue 177842), and
    from 2.11 to 2.13 the gradient of a query can be NaN on an H100 (pytorch issue 196678).
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
    backend: str = "fused",
) -> Tensor:
    """What each query reads, (B, H, Tq, d).

    q (B, H, Tq, d); k, v (B, H, Tk, d); key_mask (B, Tk), True = may attend; bias is added to the scores and
    broadcasts to (B, H, Tq, Tk), -inf allowed; causal is aligned to the end of the keys; scale defaults to d**-0.5;
    dropout is the probability that a weight is dropped. "fused" is torch's operator, or "products" where its backward
    pass is slow. Raises ValueError on an unknown backend or a misshapen mask.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "explicit":
        _, pattern = attention_weights(q, k, key_mask=key_mask, bias=bias, causal=causal, scale=scale)
        return F.dropout(pattern, dropout).to(v.dtype) @ v  # a bias in fp32 makes the weights fp32
    if backend == "products" or _slow_backward(q, k, v, bias):
        keep = masks.allowed(key_mask, causal, q.shape[-2], k.shape[-2], q.device)
        return products_attention(q, k, v, keep=keep, bias=bias, scale=scale, dropout=dropout)
    if causal and key_mask is None and bias is None and q.shape[-2] == k.shape[-2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, dropout_p=dropout)
    mask = attention_mask(q, k, key_mask=key_mask, bias=bias, causal=causal)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, dropout_p=dropout)
    with masked_safely(q.device):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, dropout_p=dropout)


def attention_over_parts(
    q: Tensor, parts: Sequence[KeyValue], *, scale: float | None = None, dropout: float = 0.0, backend: str = "fused"
) -> Tensor:
    """Attention of q (B, H, T, d) over the union of the parts' keys: one softmax. Returns (B, H, T, d).

    Where Triton runs, each part is attended to by itself and the parts are merged by their log-sum-exps.
    """
    if len(parts) == 1:
        k, v, mask, readers = parts[0]
        z = attention(readers.fold(q), k, v, key_mask=mask, scale=scale, dropout=dropout, backend=backend)
        return readers.unfold(z)
    if backend == "fused" and kernels.takes_attention(q, dropout=dropout):
        return kernels.merge([_read_part(q, part, scale) for part in parts])[0]
    scores = [
        part.readers.unfold(attention_scores(part.readers.fold(q), part.k, key_mask=part.mask, scale=scale))
        for part in parts
    ]
    never_empty = any(part.mask is None for part in parts)
    softmax = partial(torch.softmax, dim=-1) if never_empty else masked_softmax
    pattern = F.dropout(softmax(torch.cat(scores, -1)), dropout)  # (B, H, T, N1 + N2 + ...)
    pieces = pattern.split([part.k.shape[2] for part in parts], -1)
    reads = [part.readers.unfold(part.readers.fold(piece) @ part.v) for piece, part in zip(pieces, parts, strict=True)]
    return sum(reads[1:], start=reads[0])


def _read_part(q: Tensor, part: KeyValue, scale: float | None) -> tuple[Tensor, Tensor]:
    """What q (B, H, T, d) reads from one part, (B, H, T, d), and the log-sum-exp of its scores, (B, H, T)."""
    fold, unfold = part.readers.fold, part.readers.unfold
    z, lse = kernels.flash_attention(fold(q), part.k, part.v, key_mask=part.mask, scale=scale)
    return unfold(z), unfold(lse.unsqueeze(-1)).squeeze(-1)


class MultiHeadAttention(nn.Module):
    """Self-attention with one fused `qkv`, or cross-attention (`context_dim` given) with `q` and a fused `kv`.

    `dropout` is the probability of dropping an attention weight while training; `scale` None means head_dim**-0.5.
    A trace that wants `scores` or `pattern` gets them from the explicit way, whatever `backend` says.
    """

    tap_prefix: str | None = None

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = True,
        out_bias: bool = True,
        scale: float | None = None,
        dropout: float = 0.0,
        backend: str = "fused",
    ) -> None:
        super().__init__()
        if head_dim is None and dim % heads:
            raise ValueError(f"width {dim} does not divide into {heads} heads; give head_dim")
        self.heads, self.head_dim = heads, head_dim or dim // heads
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.dropout, self.backend = dropout, backend
        inner = heads * self.head_dim
        if context_dim is None:
            self.qkv = nn.Linear(dim, 3 * inner, bias=bias)
        else:
            self.q = nn.Linear(dim, inner, bias=bias)
            self.kv = nn.Linear(context_dim, 2 * inner, bias=bias)
        self.is_cross = context_dim is not None
        self.out = nn.Linear(inner, dim, bias=out_bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor | Memory | Sequence[Memory] | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | PassBias | None = None,
        causal: bool = False,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D).

        context: (B, N, context_dim) read through key_mask (B, N), or memories that bring their own masks. With a cache
        self-attention needs key_mask and bias for all keys, old and new; cross-attention projects its context once. A
        `PassBias` brings the mask and the order with it.
        """
        if self.is_cross:
            assert bias is None and not causal, "cross-attention takes no bias and has no order"
            z = self._cross(x, context, key_mask, cache)
        else:
            assert context is None, "this is self-attention: it was built without context_dim"
            z = self._self(x, key_mask, bias, causal, cache)
        z = taps.tap(self.tap_prefix, "z", z)
        if taps.wanted(self.tap_prefix, "head_out"):
            weight = self.out.weight.unflatten(1, (self.heads, self.head_dim))  # (D, H, d)
            per_head = taps.tap(self.tap_prefix, "head_out", torch.einsum("bhtd,ehd->bhte", z, weight))
            out = per_head.sum(1) if self.out.bias is None else per_head.sum(1) + self.out.bias
        else:
            out = self.out(z.transpose(1, 2).flatten(2))  # (B, T, H*d)
        return taps.tap(self.tap_prefix, "out", out)

    def _split(self, x: Tensor, pieces: int) -> tuple[Tensor, ...]:
        """(B, T, pieces*H*d) -> `pieces` views of (B, H, T, d)."""
        # Chunks of the last axis: their gradients are joined in one pass, in the layout the product before them wants.
        heads = (self.heads, self.head_dim)
        return tuple(piece.unflatten(-1, heads).transpose(1, 2) for piece in x.chunk(pieces, -1))

    def _self(
        self, x: Tensor, key_mask: Tensor | None, bias: Tensor | PassBias | None, causal: bool, cache: KVCache | None
    ) -> Tensor:
        q, k, v = self._split(self.qkv(x), 3)
        if cache is not None:
            k, v = cache.append(k, v)
        return self._attend(q, k, v, key_mask, bias, causal)

    def _cross(
        self,
        x: Tensor,
        context: Tensor | Memory | Sequence[Memory] | None,
        key_mask: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        (q,) = self._split(self.q(x), 1)
        if cache is not None and cache.cross is not None:
            parts = cache.cross
        else:
            parts = self.project(context, key_mask)
            if cache is not None:
                cache.fill_cross(parts)
        check_rows(parts, len(x))
        if taps.wanted(self.tap_prefix, "k", "v", "mask", "scores", "pattern"):
            k, v, mask, _ = concatenate(parts)
            return self._attend(q, k, v, mask, None, False)
        q = taps.tap(self.tap_prefix, "q", q)
        dropout = self.dropout if self.training else 0.0
        return attention_over_parts(q, parts, scale=self.scale, dropout=dropout, backend=self.backend)

    def project(
        self, context: Tensor | Memory | Sequence[Memory] | None, key_mask: Tensor | None = None
    ) -> list[KeyValue]:
        """Keys and values of what cross-attention reads; arguments as in `forward`."""
        if isinstance(context, Tensor):
            context = Memory(context, key_mask)
        elif key_mask is not None:
            raise ValueError("key_mask goes with a plain context tensor; a Memory has its own mask")
        if context is None:
            raise ValueError("cross-attention needs a context")
        parts = []
        for memory in [context] if isinstance(context, Memory) else context:
            k, v = self._split(self.kv(memory.states), 2)
            parts.append(memory.project(k, v))
        return parts

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | PassBias | None, causal: bool
    ) -> Tensor:
        """Attention with every tap on the way; q, k, v (B, H, T, d)."""
        name, dropout = self.tap_prefix, self.dropout if self.training else 0.0
        q, k, v = taps.tap(name, "q", q), taps.tap(name, "k", k), taps.tap(name, "v", v)
        if isinstance(bias, PassBias):
            assert key_mask is None and not causal, "the bias of a pass brings mask and order with it"
            shown = self.backend != "fused" or taps.wanted(name, "mask", "scores", "pattern")
            if not shown and kernels.takes_attention(q, dropout=dropout):
                return bias.look_up(q, k, v, self.scale)
            bias, key_mask = bias.written_out()
        if taps.wanted(name, "mask"):
            added = q.new_zeros(1, 1, q.shape[-2], k.shape[-2]) if bias is None else bias
            taps.tap(name, "mask", attention_mask(q, k, key_mask=key_mask, bias=added, causal=causal))
        options = {"key_mask": key_mask, "bias": bias, "causal": causal, "scale": self.scale}
        if not taps.wanted(name, "scores", "pattern"):
            return attention(q, k, v, **options, dropout=dropout, backend=self.backend)
        scores = attention_scores(q, k, **options)
        pattern = masked_softmax(taps.tap(name, "scores", scores))
        pattern = taps.tap(name, "pattern", pattern)
        return F.dropout(pattern, dropout).to(v.dtype) @ v  # a bias in fp32 makes the weights fp32
