"""Functions of all attention kernels: read a block of rows, and compute the scores of one tile.

Shapes: Tq queries, Tk keys, d head size (HEAD), padded to BLOCK_D, a power of two.
"""

import triton
import triton.language as tl

# Arguments that change from call to call: compiling again for lengths divisible by 16 gains nothing.
LENGTHS = ["heads", "tq", "tk", "reach", "stride_keep"]


@triton.jit
def load_rows(base, stride, rows, columns, count, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, CUT: tl.constexpr):
    """(rows, BLOCK_D) of a (count, HEAD) matrix, zeros outside; CUT says that some rows may lie outside."""
    at = base + rows[:, None].to(tl.int64) * stride + columns[None, :]
    if CUT and HEAD != BLOCK_D:
        return tl.load(at, mask=(rows[:, None] < count) & (columns[None, :] < HEAD), other=0.0)
    elif CUT:
        return tl.load(at, mask=rows[:, None] < count, other=0.0)
    elif HEAD != BLOCK_D:
        return tl.load(at, mask=columns[None, :] < HEAD, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def tile_scores(
    q, k, KEEP, BIAS, far, keys, places, tk, scale2,
    PRECISION: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    NEAR: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Scores in powers of two of the queries at `places` by `keys`, -inf where a query may not look.

    NEAR gathers the bias by distance, else `far` is that of all; CUT: some keys may lie outside or, if CAUSAL, later.
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
    if HAS_BIAS:
        if NEAR:
            index = keys[None, :] - places[:, None] + tk - 1
            scores += tl.load(BIAS + index, mask=(index >= 0) & (keys[None, :] < tk), other=0.0)
        else:
            scores += far
    if CUT:
        seen = keys[None, :] < tk
        if CAUSAL:
            seen = seen & (keys[None, :] <= places[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    if HAS_KEEP:
        keep = tl.load(KEEP + keys, mask=keys < tk, other=0)
        scores = tl.where(keep[None, :] != 0, scores, float("-inf"))
    return scores


@triton.jit
def key_stretches(
    first, behind, tk, reach, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr
):
    """(before, near, after, end): where the stretches end in which BLOCK_M queries from `first` on visit the keys.

    Far before the queries, near them (bias gathered by distance, causal order), far after them, a last cut tile.
    """
    end, whole = tk, tk // BLOCK_N * BLOCK_N  # keys up to `whole` lie in whole tiles that every row sees
    if CAUSAL:
        end = tl.minimum(tk, tl.maximum(first + BLOCK_M + behind, 0))
        whole = tl.minimum(whole, tl.maximum(first + behind + 1, 0) // BLOCK_N * BLOCK_N)
    before, near = whole, end
    if HAS_BIAS:
        before = tl.minimum(whole, tl.maximum(first + behind - reach + 1, 0) // BLOCK_N * BLOCK_N)
        if not CAUSAL:
            near = tl.minimum(end, tl.cdiv(tl.maximum(first + BLOCK_M - 1 + behind + reach, 0), BLOCK_N) * BLOCK_N)
    return before, near, tl.maximum(near, whole), end
