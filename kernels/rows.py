"""Triton kernels over rows of logits, one program a row: cross-entropy; log-probability with entropy; their gradients.

All keep a running maximum and a sum relative to it (Milakov and Gimelshein 2018, 1805.02867), so that a row is read
once. The cross-entropy reads it again, from cache, and overwrites it with the gradient, as Liger does (Hsu et al. 2024,
2410.10989).

Shapes: N rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8


@triton.jit
def cross_entropy_rows(LOGITS, stride, LABELS, LOSS, RIGHT, vocabulary, BLOCK: tl.constexpr, GRAD: tl.constexpr):
    """LOSS in nats and RIGHT, 1 where the label is the argmax; with GRAD the logits become the gradient of the loss."""
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * stride
    label = tl.load(LABELS + row)
    chosen = tl.load(LOGITS + label, mask=label < vocabulary, other=float("nan")).to(tl.float32)
    top, total, best = float("-inf"), 0.0, 0
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(LOGITS + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        high, place = tl.max(x, 0, return_indices=True)
        best = tl.where(high > top, start + place, best)
        higher = tl.maximum(top, high)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - finite) + tl.sum(tl.exp(x - finite), 0)
        top = higher
    lse = top + tl.log(total)
    tl.store(LOSS + row, lse - chosen)
    tl.store(RIGHT + row, (best == label).to(tl.int32))
    if GRAD:
        tl.debug_barrier()  # no thread writes before all have read
        for start in range(0, vocabulary, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(LOGITS + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(x - lse) - tl.where(at == label, 1.0, 0.0)
            tl.store(LOGITS + at, gradient.to(LOGITS.dtype.element_ty), mask=at < vocabulary)


@triton.jit
def logprob_rows(LOGITS, stride, IDS, LOGPROBS, ENTROPY, LSE, vocabulary, BLOCK: tl.constexpr):
    """LOGPROBS of IDS, ENTROPY and LSE of each row, in nats, in one pass."""
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * stride
    chosen = tl.load(IDS + row)
    inside = (chosen >= 0) & (chosen < vocabulary)
    chosen = tl.load(LOGITS + chosen, mask=inside, other=float("nan")).to(tl.float32)
    top, total, moment = float("-inf"), 0.0, 0.0  # sums of exp(x - top) and of exp(x - top) (x - top)
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(LOGITS + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        shift = tl.where(top == float("-inf"), 0.0, top - finite)
        x = tl.maximum(x - finite, -1e30)  # not -inf: exp(-1e30) = 0 and 0 * -1e30 = 0
        weights = tl.exp(x)
        moment = tl.exp(shift) * (moment + total * shift) + tl.sum(weights * x, 0)
        total = total * tl.exp(shift) + tl.sum(weights, 0)
        top = higher
    log_total = tl.log(total)
    tl.store(LOGPROBS + row, chosen - top - log_total)
    tl.store(ENTROPY + row, log_total - moment / total)
    tl.store(LSE + row, top + log_total)


@triton.jit
def logprob_rows_gradient(
    LOGITS, stride, IDS, LSE, ENTROPY, DLOGPROBS, DENTROPY, OUT, stride_out, vocabulary, BLOCK: tl.constexpr
):  # fmt: skip
    """OUT = DLOGPROBS (onehot - p) - DENTROPY p (log p + ENTROPY). OUT may be LOGITS."""
    row = tl.program_id(0).to(tl.int64)
    chosen, lse, entropy = tl.load(IDS + row), tl.load(LSE + row), tl.load(ENTROPY + row)
    of_logprob, of_entropy = tl.load(DLOGPROBS + row), tl.load(DENTROPY + row)
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(LOGITS + row * stride + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        log_p = tl.maximum(x - lse, -1e30)
        slope = of_logprob + of_entropy * (log_p + entropy)
        gradient = tl.where(at == chosen, of_logprob, 0.0) - tl.exp(log_p) * slope
        tl.store(OUT + row * stride_out + at, gradient.to(OUT.dtype.element_ty), mask=at < vocabulary)


def _options(vocabulary: int) -> dict[str, int]:
    return {"BLOCK": min(BLOCK, triton.next_power_of_2(vocabulary)), "num_warps": WARPS}


def cross_entropy_(logits: Tensor, labels: Tensor, grad: bool) -> tuple[Tensor, Tensor]:
    """(loss, right), both (N,); with `grad` the logits (N, V) become the gradient of each row's loss."""
    loss = logits.new_empty(len(logits), dtype=torch.float32)
    right = torch.empty_like(loss, dtype=torch.int32)
    with torch.cuda.device_of(logits):
        cross_entropy_rows[(len(logits),)](
            logits, logits.stride(0), labels, loss, right, logits.shape[1], GRAD=grad, **_options(logits.shape[1])
        )
    return loss, right


def logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probability of ids, entropy, log-sum-exp), each (N,) fp32."""
    chosen, entropy, lse = out = logits.new_empty(3, len(logits), dtype=torch.float32).unbind()
    with torch.cuda.device_of(logits):
        logprob_rows[(len(logits),)](logits, logits.stride(0), ids, *out, logits.shape[1], **_options(logits.shape[1]))
    return chosen, entropy, lse


def logprobs_gradient(
    logits: Tensor, ids: Tensor, lse: Tensor, entropy: Tensor, dlogprobs: Tensor, dentropy: Tensor, out: Tensor
) -> None:
    """`out` (N, V), which may be the logits, becomes their gradient."""
    with torch.cuda.device_of(logits):
        logprob_rows_gradient[(len(logits),)](
            *(logits, logits.stride(0), ids, lse, entropy, dlogprobs, dentropy, out, out.stride(0), logits.shape[1]),
            **_options(logits.shape[1]),
        )
