"""The kernels' torch side: definitions against torch's own operators, chunks against the whole, and who runs when."""

import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vqa_scratch import kernels
from vqa_scratch.kernels import attention, choice, cross_entropy, reference
from vqa_scratch.nn.relative_bias import RelativeBias

close = torch.testing.assert_close


@pytest.mark.parametrize(("queries", "keys", "causal"), [(7, 7, True), (3, 9, True), (9, 3, True), (5, 8, False)])
def test_attention_is_that_of_torch(queries, keys, causal):
    q, k, v = (torch.randn(2, 3, t, 8, dtype=torch.float64) for t in (queries, keys, keys))
    mask = torch.rand(2, keys) > 0.3
    mask[1] = False
    allowed = mask[:, None, None, :] & (torch.ones(queries, keys).tril(keys - queries) > 0 if causal else True)
    out, lse = kernels.flash_attention(q, k, v, key_mask=mask, causal=causal, scale=0.4)
    close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=0.4).masked_fill(out == 0, 0.0))
    close(lse, (q @ k.mT * 0.4).masked_fill(~allowed, -torch.inf).logsumexp(-1))
    assert not out[1].any() and (lse[1] == -torch.inf).all() and torch.isfinite(lse[0, :, -1]).all()


def test_gradients_of_attention_and_of_merging_are_true():
    q, k, v = (torch.randn(1, 1, t, 3, dtype=torch.float64, requires_grad=True) for t in (4, 6, 6))
    table = torch.randn(4, 1, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[False, False, True, False, True, True]])

    def whole(q, k, v, table):
        bias = reference.DistanceBias(table, 4, True)
        return tuple(x[:, :, 1:] for x in reference.attention(q, k, v, key_mask=mask, causal=True, bias=bias))

    def parts(q, k, v):
        pieces = [slice(0, 2), slice(2, 6)]
        return reference.merge([reference.attention(q, k[:, :, p], v[:, :, p], key_mask=mask[:, p]) for p in pieces])

    assert torch.autograd.gradcheck(whole, (q, k, v, table))  # from row 1 on: row 0 sees nothing, its LSE is -inf
    assert torch.autograd.gradcheck(parts, (q, k, v))
    close(parts(q, k, v), reference.attention(q, k, v, key_mask=mask))


def test_a_row_without_a_key_has_zeros_and_no_gradient():
    q, k, v = (torch.randn(1, 1, 3, 4, requires_grad=True) for _ in range(3))
    hidden = torch.zeros(1, 3, dtype=torch.bool)
    one = kernels.flash_attention(q, k, v, key_mask=hidden)
    for out, lse in (one, kernels.merge([one, one])):
        grads = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
        assert not out.any() and (lse == -torch.inf).all() and not any(g.any() for g in grads)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (1, 33), (9, 40)])
def test_the_bias_by_distance_is_that_of_a_tower(bidirectional, queries, keys):
    ours = RelativeBias(32, 3, 24, bidirectional)
    bias = ours.lookup()
    close(bias.dense(queries, keys), ours(queries, keys), rtol=0, atol=0)
    line = bias.buckets(queries, keys)
    far = torch.arange(1 - keys, queries).abs() >= 24  # what the kernels take for granted
    assert len(line) == queries + keys - 1
    assert all(len(line[far & side].unique()) <= 1 for side in (line == line[0], line != line[0]))


class Largest(TorchDispatchMode):
    """The most numbers that any result held."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, tuple | list) else (out,)
        self.most = max([self.most, *(x.numel() for x in results if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("kept", ["all", "some", "none"])
@pytest.mark.parametrize("one_chunk", [True, False])
def test_linear_cross_entropy_is_that_of_torch(kept, one_chunk, monkeypatch):
    if not one_chunk:
        monkeypatch.setattr(cross_entropy, "FEWEST_LOGITS", 1)
    hidden, weight = torch.randn(50, 6, dtype=torch.float64), torch.randn(31, 6, dtype=torch.float64)
    labels = torch.randint(31, (50,))
    if kept != "all":
        labels[:: 3 if kept == "some" else 1] = -100
    hidden.requires_grad_(), weight.requires_grad_()
    logits = hidden @ weight.T
    expected = F.cross_entropy(logits, labels, reduction="sum")
    seen = Largest()
    with seen:
        loss, right = kernels.linear_cross_entropy(hidden, weight, labels)
        ours = torch.autograd.grad(loss * 0.25, (hidden, weight))
    close(loss, expected, check_dtype=False)
    close(ours, torch.autograd.grad(expected * 0.25, (hidden, weight)))
    assert int(right) == int((logits.argmax(-1) == labels).sum())
    assert one_chunk or seen.most <= 50 * 6  # 6 rows of logits at a time, never 50 x 31
    with pytest.raises(RuntimeError, match="can be taken once"):
        loss.backward()


def test_linear_cross_entropy_under_autocast_and_without_gradients():
    hidden, weight, labels = torch.randn(9, 16), torch.randn(40, 16, requires_grad=True), torch.randint(40, (9,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = kernels.linear_cross_entropy(hidden, weight, labels)
        plain = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")
    close(loss, plain, rtol=1e-6, atol=0)  # the same rounded logits
    ours, theirs = (torch.autograd.grad(x, weight)[0] for x in (loss, plain))
    assert ours.dtype == torch.float32
    close(ours, theirs, rtol=2**-7, atol=1e-2)  # one rounding to bf16 of dlogits, one of the product
    with torch.no_grad():
        close(kernels.linear_cross_entropy(hidden, weight, labels)[0], F.cross_entropy(hidden @ weight.T, labels) * 9)


def test_rows_without_a_label_meet_no_product():
    hidden, weight = torch.randn(50, 6, requires_grad=True), torch.randn(31, 6, requires_grad=True)
    labels = torch.full((50,), -100)
    labels[::5] = torch.arange(10)
    seen = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "mm" in str(func):
                seen.append(sorted({*args[0].shape, *args[1].shape}))
            return func(*args, **(kwargs or {}))

    with Products():
        kernels.linear_cross_entropy(hidden, weight, labels)[0].backward()
    assert seen == [[6, 10, 31]] * 3  # logits and both gradients, of ten rows


def test_gradients_of_chunks_are_summed_in_fp32():
    """In bf16 a sum of ones ends at 256."""
    total, one = cross_entropy.WeightGradient(600), torch.ones(1, 1, dtype=torch.bfloat16)
    for _ in range(600):
        total.add(one, one)
    assert total.total.item() == 600


def test_chosen_logprobs_are_those_of_torch(monkeypatch):
    monkeypatch.setattr("vqa_scratch.kernels.logprob.CACHED", 100)  # three rows at a time
    logits = torch.randn(20, 33, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(33, (20,))
    spread = torch.distributions.Categorical(logits=logits)
    close(kernels.chosen_logprobs(logits, ids), (spread.log_prob(ids), spread.entropy()))
    assert torch.autograd.gradcheck(lambda x: kernels.chosen_logprobs(x, ids), logits)


def test_large_logits_are_no_trouble():
    """exp(1000) is no number in fp32; a distribution does not change when its logits rise together."""
    logits, ids = torch.randn(4, 9).mul(8).round(), torch.tensor([0, 3, 8, 5])  # whole numbers: the sum is exact
    close(kernels.chosen_logprobs(logits + 1000, ids), kernels.chosen_logprobs(logits, ids), rtol=0, atol=1e-4)


def test_chosen_logprobs_of_bf16_logits():
    """The figures are in fp32, the gradients in the type of the logits."""
    logits, ids = torch.randn(9, 40).bfloat16().requires_grad_(), torch.randint(40, (9,))
    ours, plain = kernels.chosen_logprobs(logits, ids), kernels.reference.chosen_logprobs(logits, ids)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    close(ours, plain, rtol=1e-5, atol=1e-5)  # the same rounded logits
    one, two = (torch.autograd.grad(sum(x.sum() for x in pair), logits)[0] for pair in (ours, plain))
    assert one.dtype == torch.bfloat16
    close(one, two, rtol=2**-7, atol=2e-2)  # roundings to bf16


def test_barred_tokens_have_no_weight_in_the_entropy():
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, -1e9, 0.0]], requires_grad=True)
    logprobs, entropy = kernels.chosen_logprobs(logits, torch.tensor([0, 2]))
    half = torch.tensor(0.5).log()
    close(logprobs, half.expand(2))
    close(entropy, -half.expand(2))
    (gradient,) = torch.autograd.grad((logprobs + entropy).sum(), logits)
    close(gradient, torch.tensor([[0.5, -0.5, 0.0], [-0.5, 0.0, 0.5]]))


def test_what_does_not_fit_is_said():
    x, w, ids = torch.randn(4, 8), torch.randn(10, 8), torch.randint(10, (4,))
    q = torch.randn(1, 2, 3, 8)
    for wrong, message in [
        (lambda: kernels.linear_cross_entropy(x, w.T, ids), "do not fit"),
        (lambda: kernels.linear_cross_entropy(x, w, ids + 10), "beyond the vocabulary of 10"),
        (lambda: kernels.linear_cross_entropy(x, w.double(), ids), "must be of one dtype"),
        (lambda: kernels.linear_cross_entropy(x, w, ids[:3]), "do not fit"),
        (lambda: kernels.chosen_logprobs(x, ids[:3]), "do not fit"),
        (lambda: kernels.chosen_logprobs(x, ids + 10), "beyond the vocabulary of 8"),
        (lambda: kernels.flash_attention(q, q[:, :1], q), "q, k, v do not fit"),
        (lambda: kernels.flash_attention(q, q[:, :, :0], q[:, :, :0]), "needs a key"),
        (lambda: kernels.flash_attention(q, q, q, key_mask=torch.ones(1, 4)), "key_mask must be"),
        (lambda: kernels.flash_attention(q, q, q, bias=kernels.DistanceBias(w, 8, True)), "the bias has 8 heads"),
    ]:
        with pytest.raises(ValueError, match=message):
            wrong()


def test_what_a_kernel_does_not_take_is_said_once(monkeypatch):
    monkeypatch.setattr(choice, "missing", lambda device: None)
    choice.say_once.cache_clear()
    on_gpu = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.float16)
    assert choice.triton_runs("attention", on_gpu) and kernels.backend() == "triton"
    with pytest.warns(UserWarning, match="attention runs in torch, not Triton: head size 256 is above 128"):
        assert not choice.triton_runs("attention", on_gpu, "head size 256 is above 128")
    assert kernels.backend() == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not choice.triton_runs("attention", on_gpu, "head size 256 is above 128")
    on_gpu.dtype = torch.float64
    with pytest.warns(UserWarning, match="float64 is none of float16, bfloat16 and float32"):
        assert not choice.triton_runs("attention", on_gpu)


def test_several_dtypes_are_computed_in_the_widest():
    q, k, v = (torch.randn(1, 2, 5, 8, dtype=kind) for kind in (torch.float32, torch.bfloat16, torch.float16))
    close(kernels.flash_attention(q, k, v), kernels.flash_attention(q, k.float(), v.float()), rtol=0, atol=0)


def test_an_old_gpu_and_no_triton_are_reasons(monkeypatch):
    choice.missing.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old card")
    monkeypatch.setattr(choice, "_try_out", lambda device: None)
    for capability, backend in (((7, 5), "torch"), ((8, 0), "triton")):
        choice.missing.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, seen=capability: seen)
        pytest.importorskip("triton")
        assert kernels.backend("cuda") == backend
    choice.missing.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choice.missing(torch.device("cuda")) == "Triton is not installed" and kernels.backend("cpu") == "torch"
    choice.missing.cache_clear()


def test_a_triton_that_cannot_compile_is_a_reason(monkeypatch):
    """As on a machine without a C compiler: torch runs, and what Triton said is in the warning."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **options: torch.empty(*shape, **options))
    said = []

    def fails(logits, ids):
        said.append((logits.shape, ids.dtype))
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr("vqa_scratch.kernels.rows.logprobs", fails)
    for _ in range(2):
        reason = choice.missing(torch.device("cuda", 3))
        assert reason == "Triton does not work here (Failed to find C compiler.)"
    assert said == [((1, 16), torch.long)]
    monkeypatch.setattr("vqa_scratch.kernels.rows.logprobs", lambda logits, ids: None)
    assert choice.missing(torch.device("cuda", 4)) is None
    choice.missing.cache_clear()


def test_without_triton_torch_runs():
    program = """
import sys
sys.modules["triton"] = None
import torch, kernels
q = torch.randn(1, 2, 5, 8)
assert kernels.backend() == "none"
assert kernels.flash_attention(q, q, q)[0].shape == q.shape
kernels.linear_cross_entropy(q[0, 0], torch.randn(9, 8), torch.arange(5))
kernels.chosen_logprobs(torch.randn(5, 9), torch.arange(5))
assert kernels.backend() == "torch"
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent.parent)


def test_programs_do_not_load_the_compiler():
    """It costs a second and 100 MB, whoever compiles nothing."""
    code = "import sys, train, rlhf; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


def test_only_gpus_with_products_of_warp_groups_get_their_tiles(monkeypatch):
    def tile(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return attention.tiles("forward", 64, torch.bfloat16, False, torch.device("cuda"))

    assert tile(8, 0) == tile(8, 9) == tile(12, 0) != tile(9, 0)
