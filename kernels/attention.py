"""Attention that returns (O, LSE) and never stores its weights: FlashAttention-2 in Triton, with every gradient.

LSE has a gradient too, so that parts of a set of keys can be attended to separately and merged (`merge`). The gradient
of T5's relative bias is summed directly into buckets x heads.

Shapes: B batch, H heads, Tq queries, Tk keys, d head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from vqa_scratch.kernels import choice, reference
from vqa_scratch.kernels.reference import DistanceBias

LOG2_E = 1.4426950408889634
LARGEST_HEAD = 128


@dataclass(frozen=True)
class Tile:
    """Rows of a program, rows it reads at a time, warps, and reads in flight."""

    rows: int
    step: int
    warps: int
    stages: int

    def options(self, rows: str, step: str) -> dict[str, int]:
        return {rows: self.rows, step: self.step, "num_warps": self.warps, "num_stages": self.stages}


def tiles(kernel: str, head: int, dtype: torch.dtype, bias: bool, device: torch.device) -> Tile:
    """The tile of "forward", "query" (its gradient) or "key" (theirs) for a head size padded to `head`.

    Chosen from the compiler's reports for each architecture, so that registers and shared memory suffice.
    """
    if dtype == torch.float32:  # exact fp32 products do not use the tensor cores and need registers
        return Tile(32, 16, 4, 1)
    if not 9 <= torch.cuda.get_device_capability(device)[0] < 12:  # no wgmma; 12.x has as little shared memory as 8.6
        return Tile(64, 32, 4, 2)
    if head > 64:
        return Tile(64, 64, 4, 2) if bias or kernel == "key" else Tile(128, 64, 8, 2)
    if bias:
        return Tile(128, 64, 8, 2) if kernel == "forward" else Tile(64, 64, 4, 2)
    return Tile(128, 64, 4 if kernel == "forward" else 8, 3)


def _padded(size: int, least: int = 16) -> int:
    """The next power of two, at least the smallest size of a matrix product in Triton."""
    return max(least, 1 << (size - 1).bit_length())


def _like(x: Tensor) -> Tensor:
    """An empty (B, H, T, d) with adjacent heads, so that joining them is a view."""
    b, h, t, d = x.shape
    return x.new_empty(b, t, h, d).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """`x` with the numbers of a head adjacent."""
    return x if x.stride(-1) == 1 else x.contiguous()


class TritonAttention(torch.autograd.Function):
    """(q, k, v, keep, table, buckets, causal, scale, reach) -> (O, LSE); keep, table and buckets may be None.

    keep (B, Tk) uint8, table (buckets, H), buckets (Tq + Tk - 1,) int32 of each distance from -(Tk - 1) on.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keep: Tensor | None,
        table: Tensor | None,
        buckets: Tensor | None,
        causal: bool,
        scale: float,
        reach: int,
    ) -> tuple[Tensor, Tensor]:
        from vqa_scratch.kernels.attention_forward import attention_forward

        q, k, v = _rows(q), _rows(k), _rows(v)
        line = None  # (H, Tq + Tk - 1)
        if table is not None and buckets is not None:
            line = (table.float() * LOG2_E)[buckets.long()].T.contiguous()
        ctx.set_materialize_grads(False)
        ctx.causal, ctx.scale, ctx.reach = causal, scale, reach
        (batch, heads, tq, head), tk = q.shape, k.shape[2]
        out, lse = _like(q), q.new_empty(batch, heads, tq, dtype=torch.float32)
        tile = tiles("forward", _padded(head), q.dtype, table is not None, q.device)
        with torch.cuda.device_of(q):
            attention_forward[(-(-tq // tile.rows) * batch * heads,)](
                *(q, k, v, q if keep is None else keep, q if line is None else line, out, lse),
                *(x.stride(axis) for x in (q, k, v, out) for axis in range(3)),
                *(0 if keep is None else keep.stride(0), heads, tq, tk, scale * LOG2_E, reach),
                **TritonAttention.constants(ctx, q, keep, table),
                **tile.options("BLOCK_M", "BLOCK_N"),
            )
        ctx.save_for_backward(q, k, v, keep, table, buckets, line, out, lse)
        return out, lse

    @staticmethod
    def constants(ctx: Any, q: Tensor, keep: Tensor | None, table: Tensor | None) -> dict[str, Any]:
        """What the three kernels are compiled for."""
        head = q.shape[-1]
        return {
            "HEAD": head,
            "BLOCK_D": _padded(head),
            "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",  # ignored below fp32
            "HAS_KEEP": keep is not None,
            "HAS_BIAS": table is not None,
            "CAUSAL": ctx.causal,
        }

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        from vqa_scratch.kernels.attention_key_gradient import attention_delta, attention_key_gradients
        from vqa_scratch.kernels.attention_query_gradient import attention_query_gradient

        q, k, v, keep, table, buckets, line, out, lse = ctx.saved_tensors
        do = torch.zeros_like(out) if do is None else _rows(do.to(out.dtype))
        (batch, heads, tq, head), tk, pairs = q.shape, k.shape[2], q.shape[0] * q.shape[1]
        constants = TritonAttention.constants(ctx, q, keep, table)
        query, key = (tiles(n, _padded(head), q.dtype, table is not None, q.device) for n in ("query", "key"))
        delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
        dq, dk, dv = _like(q), _like(k), _like(v)
        programs, bias_grad = -(-tq // query.rows), table is not None and ctx.needs_input_grad[4]
        size = _padded(1 if table is None else len(table))
        partial = q.new_empty(batch, heads, programs, size, dtype=torch.float32) if bias_grad else lse
        bias = q if line is None else line
        shared = (q, k, v, q if keep is None else keep, bias)
        strides = [x.stride(axis) for x in (q, k, v, do) for axis in range(3)]
        sizes = (0 if keep is None else keep.stride(0), heads, tq, tk, ctx.scale, ctx.scale * LOG2_E, ctx.reach)
        with torch.cuda.device_of(q):
            attention_delta[(-(-tq // 64) * pairs,)](
                *(out, do, lse, lse if dlse is None else dlse.float().contiguous(), delta, lse2),
                *(*out.stride()[:3], *do.stride()[:3], heads, tq),
                **{"HEAD": head, "BLOCK_D": _padded(head), "BLOCK_M": 64, "HAS_DLSE": dlse is not None},
            )
            attention_query_gradient[(programs * pairs,)](
                *(*shared, q if buckets is None else buckets, do, delta, lse2, dq, partial),
                *(*strides, *dq.stride()[:3], *sizes),
                **{"R": size, "BIAS_GRAD": bias_grad, **constants, **query.options("BLOCK_M", "BLOCK_N")},
            )
            attention_key_gradients[(-(-tk // key.rows) * pairs,)](
                *(*shared, do, delta, lse2, dk, dv, *strides, *dk.stride()[:3], *sizes),
                **{**constants, **key.options("BLOCK_N", "BLOCK_M")},
            )
        dtable = None
        if bias_grad:  # programs, then batch, in a fixed order
            dtable = partial.sum((0, 2)).T[: len(table)].to(table.dtype)
        return dq, dk, dv, None, dtable, None, None, None, None


# torch.compile cannot trace this autograd function. torch.compiler.disable does the same, but costs a second and 100 MB
# to import the compiler.
@_disable_dynamo
def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    bias: DistanceBias | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.attention` through the kernels; on CPU tensors only under Triton's interpreter."""
    keep = None if key_mask is None else key_mask.bool().contiguous().view(torch.uint8)
    table, buckets, reach = None, None, 0
    if bias is not None:
        table, reach = bias.table, bias.max_distance
        buckets = bias.buckets(q.shape[2], k.shape[2]).to(torch.int32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return TritonAttention.apply(q, k, v, keep, table, buckets, causal, scale, reach)


def takes_attention(q: Tensor, *, dropout: float = 0.0) -> bool:
    """Whether `flash_attention` runs in Triton for queries like q (B, H, Tq, d); warns if not for a CUDA tensor.

    For callers with another implementation, which they must use with dropout.
    """
    return choice.takes("attention", q, "the kernel drops no weights" if dropout else _problem(q))


def _problem(q: Tensor) -> str | None:
    """What the kernels do not support, in words."""
    if q.shape[-1] > LARGEST_HEAD:
        return f"head size {q.shape[-1]} is above {LARGEST_HEAD}"
    return "there is no query" if 0 in q.shape else None


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    bias: DistanceBias | None = None,
) -> tuple[Tensor, Tensor]:
    """(O, LSE): the attention output, (B, H, Tq, d), and the log-sum-exp of its scores, (B, H, Tq) fp32, in nats.

    q (B, H, Tq, d); k, v (B, H, Tk, d); key_mask (B, Tk), True = may attend; causal is aligned to the end of the keys;
    scale defaults to d**-0.5. A query without a key has O = 0 and LSE = -inf. Both outputs have gradients, and the
    bias's table too. In Triton on a GPU, otherwise in torch (`reference.attention`, which stores the weights). Raises
    ValueError on shapes that do not fit.
    """
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q, k, v do not fit: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if k.shape[2] == 0:
        raise ValueError("attention needs a key: k has none")
    if key_mask is not None and key_mask.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"key_mask must be {(k.shape[0], k.shape[2])}, got {tuple(key_mask.shape)}")
    if bias is not None and bias.table.shape[1] != q.shape[1]:
        raise ValueError(f"the bias has {bias.table.shape[1]} heads, q has {q.shape[1]}")
    problem = _problem(q) if q.dtype == k.dtype == v.dtype else "q, k and v are of different dtypes"
    run = triton_attention if choice.triton_runs("attention", q, problem) else reference.attention
    return run(q, k, v, key_mask=key_mask, causal=causal, scale=scale, bias=bias)
