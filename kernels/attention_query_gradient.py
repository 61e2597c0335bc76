"""The gradient of attention's queries, and of its bias, in Triton: one program a block of queries.

dS = P (dO V^T - D), dQ = scale dS K. The bias of a distance gets the sum of dS along its diagonal; diagonals are added
up into buckets here, one row of sums a program, so that no addition is atomic and every run gives the same bits.

Shapes as in `attention_forward`; R buckets, padded to a power of two.
"""

import triton
import triton.language as tl

from vqa_scratch.kernels.attention_tiles import LENGTHS, key_stretches, load_rows, tile_scores


@triton.jit
def diagonal_sums(ds, buckets, BUCKETS, corner, count, R: tl.constexpr):
    """Adds to `buckets` (R,) a tile ds whose element (i, j) has its bucket at index corner + j - i of BUCKETS (count,).

    Row i is turned by i places, so that a diagonal becomes a column; what wrapped around w times belongs to the
    diagonal w * N further down. Where the index lies outside, ds is 0.
    """
    M: tl.constexpr = ds.shape[0]
    N: tl.constexpr = ds.shape[1]
    column = tl.arange(0, N)
    turned = column[None, :] + tl.arange(0, M)[:, None]
    ds = tl.gather(ds, turned % N, 1)
    for wrapped in tl.static_range((M + N - 1) // N + 1):
        along = tl.sum(tl.where(turned // N == wrapped, ds, 0.0), 0)  # (N,) sums of diagonals
        index = corner + column - wrapped * N
        bucket = tl.load(BUCKETS + index, mask=(index >= 0) & (index < count), other=-1)
        buckets += tl.sum(tl.where(bucket[:, None] == tl.arange(0, R)[None, :], along[:, None], 0.0), 0)
    return buckets


@triton.jit
def query_gradient_tiles(
    dq, buckets, far_sum, q, do, delta, lse2, K, V, KEEP, BIAS, BUCKETS, far, lo, hi, places, origin,
    stride_k, stride_v, tq, tk, scale2,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
    HAS_KEEP: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_GRAD: tl.constexpr, CAUSAL: tl.constexpr,
    NEAR: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Keys lo ... hi: dq, and the sums of dS, by bucket if NEAR, else in `far_sum`.

    NEAR, CUT and `far` as in `tile_scores`; `origin` is the index of BUCKETS at which key 0 meets the first query.
    """
    columns = tl.arange(0, BLOCK_D)
    for start in range(lo, hi, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        keys = start + tl.arange(0, BLOCK_N)
        k = load_rows(K, stride_k, keys, columns, tk, HEAD, BLOCK_D, CUT)
        v = load_rows(V, stride_v, keys, columns, tk, HEAD, BLOCK_D, CUT)
        scores = tile_scores(
            q, k, KEEP, BIAS, far, keys, places, tk, scale2, PRECISION, HAS_KEEP, HAS_BIAS, CAUSAL, NEAR, CUT
        )
        weights = tl.exp2(scores - lse2[:, None])
        ds = weights * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        if BIAS_GRAD:
            if NEAR:
                buckets = diagonal_sums(ds, buckets, BUCKETS, start + origin, tq + tk - 1, R)
            else:
                far_sum += tl.sum(ds, 1)
    return dq, buckets, far_sum


@triton.jit(do_not_specialize=LENGTHS)
def attention_query_gradient(
    Q, K, V, KEEP, BIAS, BUCKETS, DO, DELTA, LSE2, DQ, DBIAS,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_db, stride_dh, stride_dt, stride_gb, stride_gh, stride_gt, stride_keep,
    heads, tq, tk, scale, scale2, reach,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, R: tl.constexpr,
    PRECISION: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_GRAD: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """dQ of one block of queries; with BIAS_GRAD its sums of dS by bucket go to its own row of DBIAS (programs, R)."""
    blocks = tl.cdiv(tq, BLOCK_M)
    first = (tl.program_id(0) % blocks) * BLOCK_M
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = pair // heads, pair % heads
    rows, columns = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    behind = tk - tq
    places = rows + behind
    q = load_rows(Q + b * stride_qb + h * stride_qh, stride_qt, rows, columns, tq, HEAD, BLOCK_D, True)
    do = load_rows(DO + b * stride_db + h * stride_dh, stride_dt, rows, columns, tq, HEAD, BLOCK_D, True)
    delta = tl.load(DELTA + pair * tq + rows, mask=rows < tq, other=0.0)
    lse2 = tl.load(LSE2 + pair * tq + rows, mask=rows < tq, other=float("inf"))
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    KEEP += b * stride_keep
    BIAS += h * (tq + tk - 1)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    buckets = tl.zeros([R], tl.float32)
    nothing = tl.zeros([BLOCK_M], tl.float32)

    before, near, after, end = key_stretches(first, behind, tk, reach, BLOCK_M, BLOCK_N, HAS_BIAS, CAUSAL)
    left, right = 0.0, 0.0
    if HAS_BIAS:
        left, right = tl.load(BIAS), tl.load(BIAS + tq + tk - 2)
    origin = tk - 1 - first - behind
    dq, buckets, left_sum = query_gradient_tiles(
        dq, buckets, nothing, q, do, delta, lse2, K, V, KEEP, BIAS, BUCKETS, left, 0, before, places, origin,
        stride_kt, stride_vt, tq, tk, scale2,
        HEAD, BLOCK_D, BLOCK_N, R, PRECISION, HAS_KEEP, HAS_BIAS, BIAS_GRAD, CAUSAL, False, False,
    )  # fmt: skip
    dq, buckets, right_sum = query_gradient_tiles(
        dq, buckets, nothing, q, do, delta, lse2, K, V, KEEP, BIAS, BUCKETS, left, before, near, places, origin,
        stride_kt, stride_vt, tq, tk, scale2,
        HEAD, BLOCK_D, BLOCK_N, R, PRECISION, HAS_KEEP, HAS_BIAS, BIAS_GRAD, CAUSAL, True, True,
    )  # fmt: skip
    if HAS_BIAS and not CAUSAL:
        dq, buckets, right_sum = query_gradient_tiles(
            dq, buckets, right_sum, q, do, delta, lse2, K, V, KEEP, BIAS, BUCKETS, right, near, after, places, origin,
            stride_kt, stride_vt, tq, tk, scale2,
            HEAD, BLOCK_D, BLOCK_N, R, PRECISION, HAS_KEEP, HAS_BIAS, BIAS_GRAD, CAUSAL, False, False,
        )  # fmt: skip
        dq, buckets, right_sum = query_gradient_tiles(
            dq, buckets, right_sum, q, do, delta, lse2, K, V, KEEP, BIAS, BUCKETS, right, after, end, places, origin,
            stride_kt, stride_vt, tq, tk, scale2,
            HEAD, BLOCK_D, BLOCK_N, R, PRECISION, HAS_KEEP, HAS_BIAS, BIAS_GRAD, CAUSAL, False, True,
        )  # fmt: skip

    at = DQ + b * stride_gb + h * stride_gh + rows[:, None].to(tl.int64) * stride_gt + columns[None, :]
    tl.store(at, (dq * scale).to(DQ.dtype.element_ty), mask=(rows[:, None] < tq) & (columns[None, :] < HEAD))
    if BIAS_GRAD:
        bucket = tl.arange(0, R)
        buckets += tl.where(bucket == tl.load(BUCKETS), tl.sum(left_sum, 0), 0.0)
        buckets += tl.where(bucket == tl.load(BUCKETS + tq + tk - 2), tl.sum(right_sum, 0), 0.0)
        tl.store(DBIAS + tl.program_id(0).to(tl.int64) * R + bucket, buckets)
