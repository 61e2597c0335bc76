"""The Triton kernels against their definitions in fp64: on a GPU where there is one, else in Triton's interpreter.

The budget: at most twice the error of the plain-torch definition in the same precision, plus a few roundings of the
largest number, since at these sizes either error can be near zero by luck. The interpreter multiplies bf16 wrongly
(triton issue 11584), so bf16 is for the GPU.
"""

import functools
import math
from dataclasses import dataclass

import pytest
import torch

from vqa_scratch.kernels import attention, choice, cross_entropy, logprob, reference
from vqa_scratch.kernels.reference import DistanceBias

pytest.importorskip("triton")
from vqa_scratch.kernels import rows  # noqa: E402  (only where Triton is)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
on_gpu = (pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device"))


@dataclass(frozen=True)
class Case:
    queries: int
    keys: int
    causal: bool = False
    masked: bool = False  # a third of the keys hidden, and all of the last row of the batch
    bias: str | None = None  # "both" directions or "past"
    head: int = 32
    batch: int = 1
    heads: int = 2
    max_distance: int = 8  # small, so that some tiles lie beyond it on either side

    def tensors(self) -> list[torch.Tensor]:
        shapes = [(self.batch, self.heads, t, self.head) for t in (self.queries, self.keys, self.keys)]
        shapes += [(8, self.heads)] * (self.bias is not None)  # the table of the bias
        return [torch.randn(shape, dtype=torch.float64) for shape in shapes]

    def downstream(self) -> list[torch.Tensor]:
        """Gradients of O and LSE; that of LSE does not lie in order."""
        shape = (self.batch, self.heads, self.queries)
        return [torch.randn(*shape, self.head), torch.randn(shape).mT.contiguous().mT]

    def mask(self) -> torch.Tensor | None:
        if not self.masked:
            return None
        mask = torch.rand(self.batch, self.keys) > 0.3
        mask[-1] = False
        return mask.T.contiguous().T.to(DEVICE)  # what a program reads must not depend on how the mask lies

    def check(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Hold the kernels in `dtype` to their budget; returns what they gave."""
        inputs, downstream = ([x.to(dtype).double() for x in some] for some in (self.tensors(), self.downstream()))
        mask = self.mask()
        ours, plain, exact = (
            results(run, inputs, kind, downstream, self, mask)
            for run, kind in (
                (attention.triton_attention, dtype),
                (reference.attention, dtype),
                (reference.attention, torch.float64),
            )
        )
        names = ("O", "LSE", "dq", "dk", "dv", "dtable")[: len(ours)]
        within_budget(names, ours, plain, exact, dtype)
        return ours


CASES = {
    "self": Case(37, 37),
    "causal, masked, a row of nothing": Case(21, 21, causal=True, masked=True, batch=3),
    "the last key of a tile is seen by one query": Case(33, 34, causal=True),
    "the first key after a tile is seen by none": Case(36, 50, causal=True),
    "T5 encoder, masked": Case(70, 70, masked=True, bias="both", batch=2, heads=1),
    "T5 decoder": Case(70, 70, causal=True, bias="past", heads=1),
    "behind a cache": Case(20, 50, causal=True, bias="past"),
    "queries before the first key": Case(41, 20, causal=True, bias="both"),
    "one query, odd head size": Case(1, 33, causal=True, head=24),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles even at these sizes, of unequal sides; on a GPU the tiles that are used."""
    if not GPU:
        monkeypatch.setattr(attention, "tiles", lambda kernel, *_: attention.Tile(32, 16, 4, 2))
        monkeypatch.setattr(rows, "BLOCK", 32)


def results(run, inputs, dtype, downstream, case, mask):
    """O, LSE and the gradient of every input, from gradients of both outputs."""
    leaves = [x.to(DEVICE, dtype).requires_grad_() for x in inputs]
    bias = DistanceBias(leaves[3], case.max_distance, case.bias == "both") if case.bias else None
    out, lse = run(*leaves[:3], key_mask=mask, causal=case.causal, bias=bias)
    do, dlse = (x.to(DEVICE, kind.dtype) for x, kind in zip(downstream, (out, lse), strict=True))
    dlse = dlse.clone()
    dlse[lse == -math.inf] = math.nan  # a row of nothing has no gradient, whatever comes down
    return [out, lse, *torch.autograd.grad((out, lse), leaves, (do, dlse))]


def within_budget(names, ours, plain, exact, dtype):
    for name, a, b, truth in zip(names, ours, plain, exact, strict=True):
        infinite = torch.isinf(truth)
        assert torch.equal(infinite, torch.isinf(a)), name
        truth = truth.masked_fill(infinite, 0.0)
        ours_off, plain_off = ((x.double().masked_fill(infinite, 0.0) - truth).abs().max() for x in (a, b))
        floor = 8 * torch.finfo(dtype).eps * truth.abs().max()
        assert ours_off <= 2 * plain_off + floor, f"{name}: off by {ours_off:.2e}, torch by {plain_off:.2e}"


PRECISIONS = [(name, FP32) for name in CASES] + [("T5 encoder, masked", FP16), ("behind a cache", FP16)]
PRECISIONS += [
    pytest.param(name, BF16, marks=on_gpu) for name in ("T5 encoder, masked", "causal, masked, a row of nothing")
]


def in_words(given) -> str | None:
    """The name of a dtype in the name of a test, so that `-k fp32` finds its tests."""
    return {FP32: "fp32", FP16: "fp16", BF16: "bf16"}.get(given) if isinstance(given, torch.dtype) else None


@pytest.mark.parametrize(("name", "dtype"), PRECISIONS, ids=in_words)
def test_attention_and_every_gradient(name, dtype):
    case = CASES[name]
    out, lse, *_ = case.check(dtype)
    if case.masked:
        assert not out[-1].any() and (lse[-1] == -math.inf).all()


@pytest.mark.parametrize(
    ("dtype", "head", "bias"), [(FP32, 64, "both"), (BF16, 64, None), (BF16, 80, "both")], ids=in_words
)
@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_attention_at_real_sizes(dtype, head, bias):
    for sizes in ((197, 197), (1100, 1100), (64, 1500)):
        Case(*sizes, bias=bias, head=head, masked=True, batch=2, max_distance=128).check(dtype)


def test_the_trial_before_the_first_kernel_passes():
    assert choice._try_out(torch.device(DEVICE)) is None


def test_attention_gives_the_same_bits_twice_and_stores_no_matrix():
    case = Case(40, 40, bias="both")
    inputs, downstream = case.tensors(), case.downstream()
    one, two = (results(attention.triton_attention, inputs, FP32, downstream, case, None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    q, k, v, _ = (x.to(DEVICE, FP32).requires_grad_() for x in inputs)
    saved = attention.triton_attention(q, k, v)[0].grad_fn.saved_tensors
    assert max(x.numel() for x in saved if x is not None) == 2 * 40 * 32  # one of q, k, v, O; the weights would be 3200


def test_attention_takes_slices_of_one_projection_and_expanded_gradients():
    """What MultiHeadAttention hands over: three slices of a product, and a gradient with a stride of zero."""
    qkv = torch.randn(1, 17, 3, 2, 16, requires_grad=True)
    grads = []
    for run in (attention.triton_attention, reference.attention):
        q, k, v = qkv.to(DEVICE).permute(2, 0, 3, 1, 4)
        out, _ = run(q, k, v)
        grads.append(torch.autograd.grad(out.sum(), qkv)[0])
        assert out.shape == (1, 2, 17, 16)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_attention_reads_nothing_beyond_its_rows_and_heads():
    """q, k, v, the mask and the gradient of O are cut out of larger tensors, full of NaN wherever they do not lie."""

    def cut_out(x):
        around = x.new_full((*x.shape[:-2], x.shape[-2] + 20, x.shape[-1] + 9), math.nan)
        inside = around[..., : x.shape[-2], : x.shape[-1]]
        inside.copy_(x.detach())
        return inside.requires_grad_(x.requires_grad)

    tensors = [torch.randn(1, 2, t, 24, device=DEVICE) for t in (37, 41, 41, 37)]
    ours = []
    for made in (tensors, [cut_out(x) for x in tensors]):
        *leaves, do = made
        out, lse = attention.triton_attention(*(x.requires_grad_() for x in leaves))
        ours.append([out, lse, *torch.autograd.grad(out, leaves, do)])
    torch.testing.assert_close(*ours, rtol=1e-5, atol=1e-5)  # rows at other addresses may be summed in another order


def test_parts_merge_into_one_softmax():
    """Attention over two sets of keys, merged by LSE, is attention over their union, gradients included."""
    q, k, v = (torch.randn(1, 2, t, 16, device=DEVICE, requires_grad=True) for t in (9, 30, 30))
    mask = torch.rand(1, 30, device=DEVICE) > 0.4
    mask[:, :11] = False  # the first part holds nothing
    out, lse = reference.attention(q, k, v, key_mask=mask)
    pieces = [slice(0, 11), slice(11, 30)]
    merged = reference.merge(
        [attention.triton_attention(q, k[:, :, p], v[:, :, p], key_mask=mask[:, p]) for p in pieces]
    )
    torch.testing.assert_close(merged, (out, lse))
    weight = torch.randn_like(out)
    ours, exact = (torch.autograd.grad((o * weight).sum() + row.sum(), (q, k, v)) for o, row in (merged, (out, lse)))
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


HEAD_DTYPES = [FP32, FP16, pytest.param(BF16, marks=on_gpu)]


def head_inputs(rows_count, width, vocabulary, dtype):
    hidden, weight = torch.randn(rows_count, width), torch.randn(vocabulary, width) * 0.5
    ids = torch.randint(vocabulary, (rows_count,))
    return hidden.to(dtype).double(), weight.to(dtype).double(), ids.to(DEVICE)


@pytest.mark.parametrize("dtype", HEAD_DTYPES, ids=in_words)
def test_linear_cross_entropy_and_its_gradients(dtype, monkeypatch):
    monkeypatch.setattr(cross_entropy, "FEWEST_LOGITS", 1)
    monkeypatch.setattr(cross_entropy, "FEWEST_ROWS", 8)
    hidden, weight, labels = head_inputs(21, 8, 77, dtype)  # three chunks of rows, three blocks of a row
    labels[::5] = -100

    def figures(run, kind):
        leaves = [x.to(DEVICE, kind).requires_grad_() for x in (hidden, weight)]
        loss, right = run(*leaves, labels)
        return [loss, right.double(), *torch.autograd.grad(loss * 0.5, leaves)]

    def ours(h, w, ids):
        return cross_entropy.LinearCrossEntropy.apply(h, w, ids, rows.cross_entropy_, h.dtype)

    plain = figures(reference.linear_cross_entropy, dtype)
    exact = figures(reference.linear_cross_entropy, torch.float64)
    within_budget(("loss", "right", "dhidden", "dweight"), figures(ours, dtype), plain, exact, dtype)


def test_the_first_of_equal_maxima_is_the_argmax():
    logits = torch.zeros(3, 40, device=DEVICE)
    logits[:, [2, 5, 35]] = 1.0  # the interpreter's blocks have 32 columns
    _, right = rows.cross_entropy_(logits, torch.tensor([2, 5, 35], device=DEVICE), False)
    assert right.tolist() == [1, 0, 0]


@pytest.mark.parametrize("dtype", HEAD_DTYPES, ids=in_words)
def test_chosen_logprobs_and_their_gradients(dtype):
    logits = (torch.randn(6, 77) * 3).to(dtype).double()
    logits[1, 5:70] = -math.inf
    logits[2, 5:] = -1e9 if dtype == FP32 else -6e4  # barred; 16 bits hold no more
    ids, weights = torch.randint(5, (6,), device=DEVICE), torch.randn(2, 6, dtype=torch.float64, device=DEVICE)

    def figures(run, kind):
        x = logits.to(DEVICE, kind).requires_grad_()
        pair = run(x, ids)
        return [*pair, *torch.autograd.grad((torch.stack(pair) * weights.to(pair[0].dtype)).sum(), x)]

    def ours(x, ids):
        return logprob.ChosenLogprobs.apply(x, ids, rows)

    plain, exact = (figures(reference.chosen_logprobs, kind) for kind in (dtype, torch.float64))
    within_budget(("logprob", "entropy", "dlogits"), figures(ours, dtype), plain, exact, dtype)


def test_rows_of_logits_may_lie_apart():
    """On a GPU the rows of a chunk begin at multiples of 64 numbers: what stands between them is not read."""
    logits, ids = torch.randn(5, 77, device=DEVICE), torch.tensor([0, 76, 33, 32, 5], device=DEVICE)
    padded = torch.full((5, 128), math.nan, device=DEVICE)
    apart = padded[:, :77].copy_(logits)
    same = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)  # sums may be in another order
    figures = rows.logprobs(logits, ids)
    same(rows.logprobs(apart, ids), figures)
    _, entropy, lse = figures
    given, together, between = (ids, lse, entropy, lse, entropy), torch.empty_like(logits), torch.zeros_like(padded)
    rows.logprobs_gradient(apart, *given, together)  # from rows that lie apart to rows that do not, and back
    rows.logprobs_gradient(logits, *given, between[:, :77])
    same(together, between[:, :77])
    assert not between[:, 77:].any()
    same(rows.cross_entropy_(logits, ids, True), rows.cross_entropy_(apart, ids, True))
    same(logits, apart)
    assert padded[:, 77:].isnan().all()


def test_every_launch_names_its_device(monkeypatch):
    """Triton launches on the current GPU, which need not be the one that the tensors are on."""
    entered, device_of = [], torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: entered.append(tensor.shape) or device_of(tensor))
    q = torch.randn(1, 1, 5, 16, device=DEVICE, requires_grad=True)
    out, _ = attention.triton_attention(q, q, q)
    assert len(entered) == 1
    out.sum().backward()
    assert len(entered) == 2
    logits, ids = torch.randn(3, 8, device=DEVICE), torch.zeros(3, dtype=torch.long, device=DEVICE)
    _, entropy, lse = rows.logprobs(logits, ids)
    rows.logprobs_gradient(logits, ids, lse, entropy, lse, lse, torch.empty_like(logits))
    rows.cross_entropy_(logits, ids, True)
    assert len(entered) == 5


def test_an_id_beyond_the_vocabulary_reads_nothing():
    logits, ids = torch.randn(3, 5, device=DEVICE), torch.tensor([5, 2, -1], device=DEVICE)
    assert rows.logprobs(logits, ids)[0].isnan().tolist() == [True, False, True]
    assert rows.cross_entropy_(logits, ids.clamp(min=0), False)[0].isnan().tolist() == [True, False, False]
