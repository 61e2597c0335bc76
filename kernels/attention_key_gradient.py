"""The gradients of attention's keys and values in Triton: one program a block of keys, over the queries that see it.

With P = exp(S - LSE) and D_i = dO_i . O_i - dLSE_i, dS = P (dO V^T - D), dK = scale dS^T Q, dV = P^T dO (Dao 2023,
2307.08691; the gradient of LSE enters as dS_ij += P_ij dLSE_i, hence its place in D). No addition is atomic.

Shapes as in `attention_forward`; tiles here are keys by queries.
"""

import triton
import triton.language as tl

from vqa_scratch.kernels.attention_tiles import LENGTHS, load_rows


@triton.jit(do_not_specialize=["heads", "tq"])
def attention_delta(
    OUT, DO, LSE, DLSE, DELTA, LSE2, stride_ob, stride_oh, stride_ot, stride_db, stride_dh, stride_dt, heads, tq,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """DELTA = D, and LSE2 = LSE in powers of two, +inf for a row without a key: its weights become exp2(-inf) = 0."""
    blocks = tl.cdiv(tq, BLOCK_M)
    rows = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = pair // heads, pair % heads
    columns = tl.arange(0, BLOCK_D)
    o = load_rows(OUT + b * stride_ob + h * stride_oh, stride_ot, rows, columns, tq, HEAD, BLOCK_D, True)
    do = load_rows(DO + b * stride_db + h * stride_dh, stride_dt, rows, columns, tq, HEAD, BLOCK_D, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    inside = rows < tq
    if HAS_DLSE:
        delta -= tl.load(DLSE + pair * tq + rows, mask=inside, other=0.0)
    lse = tl.load(LSE + pair * tq + rows, mask=inside, other=0.0)
    empty = lse == float("-inf")
    tl.store(DELTA + pair * tq + rows, tl.where(empty, 0.0, delta), mask=inside)
    tl.store(LSE2 + pair * tq + rows, tl.where(empty, float("inf"), lse * 1.4426950408889634), mask=inside)


@triton.jit
def key_gradient_tiles(
    dk, dv, k, v, keep, Q, DO, DELTA, LSE2, BIAS, far, lo, hi, keys, behind, stride_q, stride_d, tq, tk, scale2,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
    HAS_KEEP: tl.constexpr, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr, NEAR: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Queries lo ... hi: dk and dv of the keys at `keys`. CUT: some queries may lie outside or, if CAUSAL, earlier."""
    columns = tl.arange(0, BLOCK_D)
    for start in range(lo, hi, BLOCK_M):
        start = tl.multiple_of(start, BLOCK_M)
        rows = start + tl.arange(0, BLOCK_M)
        q = load_rows(Q, stride_q, rows, columns, tq, HEAD, BLOCK_D, CUT)
        do = load_rows(DO, stride_d, rows, columns, tq, HEAD, BLOCK_D, CUT)
        if CUT:
            delta = tl.load(DELTA + rows, mask=rows < tq, other=0.0)
            lse2 = tl.load(LSE2 + rows, mask=rows < tq, other=float("inf"))
        else:
            delta, lse2 = tl.load(DELTA + rows), tl.load(LSE2 + rows)
        places = rows + behind
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2  # (keys, queries)
        if HAS_BIAS:
            if NEAR:
                index = keys[:, None] - places[None, :] + tk - 1
                scores += tl.load(BIAS + index, mask=(index >= 0) & (keys[:, None] < tk), other=0.0)
            else:
                scores += far
        if CUT and CAUSAL:
            scores = tl.where(keys[:, None] <= places[None, :], scores, float("-inf"))
        if HAS_KEEP:
            scores = tl.where(keep[:, None], scores, float("-inf"))
        weights = tl.exp2(scores - lse2[None, :])
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = weights * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=LENGTHS)
def attention_key_gradients(
    Q, K, V, KEEP, BIAS, DO, DELTA, LSE2, DK, DV,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_db, stride_dh, stride_dt, stride_gb, stride_gh, stride_gt, stride_keep,
    heads, tq, tk, scale, scale2, reach,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """dK and dV, of one shape and one set of strides, of one block of keys, over all queries that see it."""
    blocks = tl.cdiv(tk, BLOCK_N)
    first = (tl.program_id(0) % blocks) * BLOCK_N
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = pair // heads, pair % heads
    keys, columns = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    behind = tk - tq
    k = load_rows(K + b * stride_kb + h * stride_kh, stride_kt, keys, columns, tk, HEAD, BLOCK_D, True)
    v = load_rows(V + b * stride_vb + h * stride_vh, stride_vt, keys, columns, tk, HEAD, BLOCK_D, True)
    keep = keys < tk
    if HAS_KEEP:
        keep = tl.load(KEEP + b * stride_keep + keys, mask=keys < tk, other=0) != 0
    Q += b * stride_qb + h * stride_qh
    DO += b * stride_db + h * stride_dh
    DELTA += pair * tq
    LSE2 += pair * tq
    BIAS += h * (tq + tk - 1)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    # Queries far before the keys, near them, far after them, and a last cut tile.
    whole = tq // BLOCK_M * BLOCK_M
    before, near = 0, 0
    left, right = 0.0, 0.0
    if HAS_BIAS:
        left, right = tl.load(BIAS), tl.load(BIAS + tq + tk - 2)
        before = tl.minimum(whole, tl.maximum(first - reach - behind + 1, 0) // BLOCK_M * BLOCK_M)
        near = tl.cdiv(tl.maximum(first + BLOCK_N - 1 + reach - behind, 0), BLOCK_M) * BLOCK_M
    if CAUSAL:
        before = tl.minimum(whole, tl.maximum(first - behind, 0) // BLOCK_M * BLOCK_M)
        near = tl.maximum(near, tl.cdiv(tl.maximum(first + BLOCK_N - 1 - behind, 0), BLOCK_M) * BLOCK_M)
    near = tl.maximum(before, tl.minimum(near, tl.cdiv(tq, BLOCK_M) * BLOCK_M))
    after = tl.maximum(near, whole)
    if HAS_BIAS and not CAUSAL:
        dk, dv = key_gradient_tiles(
            dk, dv, k, v, keep, Q, DO, DELTA, LSE2, BIAS, right, 0, before, keys, behind, stride_qt, stride_dt,
            tq, tk, scale2, HEAD, BLOCK_D, BLOCK_M, PRECISION, HAS_KEEP, HAS_BIAS, CAUSAL, False, False,
        )  # fmt: skip
    if HAS_BIAS or CAUSAL:
        dk, dv = key_gradient_tiles(
            dk, dv, k, v, keep, Q, DO, DELTA, LSE2, BIAS, left, before, near, keys, behind, stride_qt, stride_dt,
            tq, tk, scale2, HEAD, BLOCK_D, BLOCK_M, PRECISION, HAS_KEEP, HAS_BIAS, CAUSAL, True, True,
        )  # fmt: skip
    dk, dv = key_gradient_tiles(
        dk, dv, k, v, keep, Q, DO, DELTA, LSE2, BIAS, left, near, after, keys, behind, stride_qt, stride_dt,
        tq, tk, scale2, HEAD, BLOCK_D, BLOCK_M, PRECISION, HAS_KEEP, HAS_BIAS, CAUSAL, False, False,
    )  # fmt: skip
    dk, dv = key_gradient_tiles(
        dk, dv, k, v, keep, Q, DO, DELTA, LSE2, BIAS, left, after, tq, keys, behind, stride_qt, stride_dt,
        tq, tk, scale2, HEAD, BLOCK_D, BLOCK_M, PRECISION, HAS_KEEP, HAS_BIAS, CAUSAL, False, True,
    )  # fmt: skip

    place = b * stride_gb + h * stride_gh + keys[:, None].to(tl.int64) * stride_gt + columns[None, :]
    inside = (keys[:, None] < tk) & (columns[None, :] < HEAD)
    tl.store(DK + place, (dk * scale).to(DK.dtype.element_ty), mask=inside)
    tl.store(DV + place, dv.to(DV.dtype.element_ty), mask=inside)
