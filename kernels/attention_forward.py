"""The forward kernel of attention in Triton: one program for each block of queries, with an online softmax.

FlashAttention-2 (Dao 2023, 2307.08691) with the online softmax of Milakov and Gimelshein 2018 (1805.02867), in powers
of two. `docs/kernels.md` has the arithmetic.

Keys are visited in up to four ranges (`key_stretches`), so that a tile only does the work it needs.

Shapes: H heads, Tq queries, Tk keys, d head size; a tile is BLOCK_M queries by BLOCK_N keys.
"""

import triton
import triton.language as tl

from vqa_scratch.kernels.attention_tiles import LENGTHS, key_stretches, load_rows, tile_scores


@triton.jit
def key_tiles(
    acc, total, top, q, K, V, KEEP, BIAS, far, lo, hi, places, stride_k, stride_v, tk, scale2,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    HAS_KEEP: tl.constexpr, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr, NEAR: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Keys lo ... hi: (acc, total, top) of the rows at `places` brought up to date.

    NEAR, CUT and `far` as in `tile_scores`.
    """
    columns = tl.arange(0, BLOCK_D)
    for start in range(lo, hi, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        keys = start + tl.arange(0, BLOCK_N)
        k = load_rows(K, stride_k, keys, columns, tk, HEAD, BLOCK_D, CUT)
        scores = tile_scores(
            q, k, KEEP, BIAS, far, keys, places, tk, scale2, PRECISION, HAS_KEEP, HAS_BIAS, CAUSAL, NEAR, CUT
        )
        higher = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: exp2(-inf - 0) = 0, not NaN
        weights = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(top - finite)
        total = total * shrink + tl.sum(weights, 1)
        v = load_rows(V, stride_v, keys, columns, tk, HEAD, BLOCK_D, CUT)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = higher
    return acc, total, top


@triton.jit(do_not_specialize=LENGTHS)
def attention_forward(
    Q, K, V, KEEP, BIAS, OUT, LSE,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_keep, heads, tq, tk, scale2, reach,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    HAS_KEEP: tl.constexpr, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """OUT (B, H, Tq, d) and LSE (B, H, Tq) contiguous, in nats.

    BIAS (H, Tq + Tk - 1) holds the bias of each distance times log2(e), the same at all distances of `reach` and
    beyond, on either side; KEEP (B, Tk) is 0 where a key is hidden; scale2 is the scale times log2(e).
    """
    blocks = tl.cdiv(tq, BLOCK_M)
    first = (tl.program_id(0) % blocks) * BLOCK_M
    pair = (tl.program_id(0) // blocks).to(tl.int64)  # of batch and head
    b, h = pair // heads, pair % heads
    rows, columns = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    behind = tk - tq  # keys before the first query's own
    places = rows + behind
    q = load_rows(Q + b * stride_qb + h * stride_qh, stride_qt, rows, columns, tq, HEAD, BLOCK_D, True)
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    KEEP += b * stride_keep
    BIAS += h * (tq + tk - 1)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)

    before, near, after, end = key_stretches(first, behind, tk, reach, BLOCK_M, BLOCK_N, HAS_BIAS, CAUSAL)
    left, right = 0.0, 0.0
    if HAS_BIAS:
        left, right = tl.load(BIAS), tl.load(BIAS + tq + tk - 2)
    acc, total, top = key_tiles(
        acc, total, top, q, K, V, KEEP, BIAS, left, 0, before, places, stride_kt, stride_vt, tk, scale2,
        HEAD, BLOCK_D, BLOCK_N, PRECISION, HAS_KEEP, HAS_BIAS, CAUSAL, False, False,
    )  # fmt: skip
    acc, total, top = key_tiles(
        acc, total, top, q, K, V, KEEP, BIAS, left, before, near, places, stride_kt, stride_vt, tk, scale2,
        HEAD, BLOCK_D, BLOCK_N, PRECISION, HAS_KEEP, HAS_BIAS, CAUSAL, True, True,
    )  # fmt: skip
    if HAS_BIAS and not CAUSAL:
        acc, total, top = key_tiles(
            acc, total, top, q, K, V, KEEP, BIAS, right, near, after, places, stride_kt, stride_vt, tk, scale2,
            HEAD, BLOCK_D, BLOCK_N, PRECISION, HAS_KEEP, HAS_BIAS, CAUSAL, False, False,
        )  # fmt: skip
        acc, total, top = key_tiles(
            acc, total, top, q, K, V, KEEP, BIAS, right, after, end, places, stride_kt, stride_vt, tk, scale2,
            HEAD, BLOCK_D, BLOCK_N, PRECISION, HAS_KEEP, HAS_BIAS, CAUSAL, False, True,
        )  # fmt: skip

    empty = total == 0.0
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)
    tl.store(LSE + pair * tq + rows, lse, mask=rows < tq)
    out = (acc / tl.where(empty, 1.0, total)[:, None]).to(OUT.dtype.element_ty)
    at = OUT + b * stride_ob + h * stride_oh + rows[:, None].to(tl.int64) * stride_ot + columns[None, :]
    tl.store(at, out, mask=(rows[:, None] < tq) & (columns[None, :] < HEAD))
