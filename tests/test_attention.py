"""Attention against brute force in float64, and its ways against each other."""

import importlib
import math
from contextlib import nullcontext

import pytest
import torch
from helpers import brute_force_attention, use_backend

from vqa_scratch.models.bert import positions_from_ids
from vqa_scratch.nn import Memory, MultiHeadAttention, attention, attention_weights
from vqa_scratch.nn.attention import BACKENDS, choose
from vqa_scratch.nn.layers import decoder_positions
from vqa_scratch.nn.scores import causal_mask

# Differences of fp32 sums over a few keys; outputs are of size 1.
CLOSE = {"atol": 2e-6, "rtol": 0.0}
GRADIENTS_CLOSE = {"atol": 2e-5, "rtol": 0.0}


def inputs(batch=3, heads=2, queries=5, keys=7, head_dim=6):
    """q, k, v that take gradients, for a row with a hole, a row of nothing, and a full row."""
    q = torch.randn(batch, heads, queries, head_dim, requires_grad=True)
    k, v = (torch.randn(batch, heads, keys, head_dim, requires_grad=True) for _ in range(2))
    key_mask = torch.ones(batch, keys, dtype=torch.bool)
    key_mask[0, ::2] = False
    key_mask[1] = False
    return q, k, v, key_mask


def bias_of(kind, queries=5, keys=7):
    """No bias, one for each head, or one that blocks keys by -inf, all keys for the first query."""
    if kind == "none":
        return None
    bias = torch.randn(1, 2, queries, keys)
    if kind == "blocking":
        bias[:, :, 0] = -math.inf
        bias[:, :, 1:, 2] = -math.inf
    return bias


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias_kind", ["none", "each head", "blocking"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(5, 7), (7, 7), (1, 7), (2, 7), (7, 5)])
def test_attention_is_the_definition(backend, bias_kind, causal, masked, queries, keys):
    q, k, v, key_mask = inputs(queries=queries, keys=keys)
    bias = bias_of(bias_kind, queries, keys)
    allowed = torch.ones(3, 2, queries, keys, dtype=torch.bool)
    if masked:
        allowed &= key_mask[:, None, None]
    if causal:  # the last query sees the last key
        for i in range(queries):
            allowed[:, :, i, max(0, keys - queries + i + 1) :] = False
    if bias is not None:
        allowed &= bias > -math.inf
    expected = brute_force_attention(q, k, v, allowed, bias, scale=0.3)
    got = attention(
        q, k, v, key_mask=key_mask if masked else None, bias=bias, causal=causal, scale=0.3, backend=backend
    )
    torch.testing.assert_close(got.double(), expected, **CLOSE)
    empty = ~allowed.any(-1)
    assert torch.equal(got[empty], torch.zeros_like(got[empty]))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias_kind", ["none", "each head", "blocking"])
def test_all_ways_have_the_same_gradients(causal, masked, bias_kind):
    q, k, v, key_mask = inputs()
    bias = bias_of(bias_kind)
    leaves = [q, k, v] if bias is None else [q, k, v, bias.requires_grad_()]
    weight = torch.randn(3, 2, 5, 6)
    gradients = {}
    for backend in BACKENDS:
        z = attention(q, k, v, key_mask=key_mask if masked else None, bias=bias, causal=causal, backend=backend)
        gradients[backend] = torch.autograd.grad((z * weight).sum(), leaves)
    for fused, written_out, explicit in zip(*(gradients[name] for name in BACKENDS), strict=True):
        assert fused.isfinite().all() and written_out.isfinite().all() and explicit.isfinite().all()
        torch.testing.assert_close(fused, explicit, **GRADIENTS_CLOSE)
        torch.testing.assert_close(written_out, explicit, **GRADIENTS_CLOSE)
    if masked:
        assert gradients["products"][0][1].abs().max() == 0
        assert gradients["fused"][0][1].abs().max() == 0  # the row that reads nothing


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("rows_of_bias", [1, 3])
def test_products_in_groups_of_rows(monkeypatch, dropout, rows_of_bias):
    """One row at a time or all at once; with dropout all at once, so that both ways draw the same numbers."""
    q, k, v, key_mask = inputs()
    bias = torch.randn(rows_of_bias, 2, 5, 7, requires_grad=True)
    leaves, weight = [q, k, v, bias], torch.randn(3, 2, 5, 6)
    if not dropout:
        monkeypatch.setattr("vqa_scratch.nn.scores.SCORES_AT_ONCE", 2 * 5 * 7)
    results = []
    for backend in ("products", "explicit"):
        torch.manual_seed(0)
        z = attention(q, k, v, key_mask=key_mask, bias=bias, dropout=dropout, backend=backend)
        results.append([z, *torch.autograd.grad((z * weight).sum(), leaves)])
    for ours, explicit in zip(*results, strict=True):
        torch.testing.assert_close(ours, explicit, **GRADIENTS_CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_change_nothing_to_the_bit(dtype, biased, masked, monkeypatch):
    """A bias and bf16 are never left to the fused operator on a CPU, whose backward pass is slow there."""
    *leaves, key_mask = inputs(queries=20, keys=33, head_dim=16)
    q, k, v = (x.to(dtype) for x in leaves)
    bias = torch.randn(1, 2, 20, 33, requires_grad=True) if biased else None
    if biased or dtype == torch.bfloat16:
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    options = {"key_mask": key_mask if masked else None, "bias": bias}
    with_gradients = attention(q, k, v, **options)
    with_gradients.float().sum().backward()
    with torch.no_grad():
        assert torch.equal(attention(q, k, v, **options), with_gradients)


def test_the_judge(monkeypatch):
    """Device, number format, bias and who is looking, each alone and the first that counts; gradients do not."""
    asked = []
    monkeypatch.setattr("vqa_scratch.kernels.takes_attention", lambda q, dropout: asked.append(dropout) or not dropout)
    for requires_grad in (False, True):
        fp32, bf16 = (
            torch.zeros(1, 2, 3, 4, dtype=t, requires_grad=requires_grad) for t in (torch.float32, torch.bfloat16)
        )
        assert choose(fp32) == "fused" and choose(fp32.double()) == "fused" and choose(fp32, kernel=True) == "fused"
        assert choose(bf16) == choose(fp32, bias=True) == choose(bf16, bias=True, kernel=True) == "products"
        assert choose(fp32, shown=True) == choose(bf16, bias=True, kernel=True, shown=True) == "explicit"
    assert not asked  # on a CPU nobody asks for Triton
    on_gpu = torch.zeros(1, 2, 3, 4, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr("vqa_scratch.kernels.DEVICES", {"meta"})
    assert choose(on_gpu) == choose(on_gpu, bias=True) == choose(on_gpu, kernel=True, dropout=0.1) == "fused"
    assert choose(on_gpu, kernel=True) == choose(on_gpu, bias=True, kernel=True) == "kernel"
    assert choose(on_gpu, kernel=True, shown=True) == "explicit"
    assert asked == [0.1, 0.0, 0.0]


def test_weights_are_a_distribution_over_allowed_keys():
    q, k, _, key_mask = inputs()
    scores, pattern = attention_weights(q, k, key_mask=key_mask, causal=True)
    allowed = (key_mask[:, None] & causal_mask(5, 7))[:, None].expand_as(scores)
    assert torch.equal(scores == -math.inf, ~allowed)
    assert torch.equal(pattern > 0, allowed)
    torch.testing.assert_close(pattern.sum(-1), allowed.any(-1).float())


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias_kind", ["none", "each head", "blocking"])
def test_fused_in_low_precision(device, dtype, masked, causal, bias_kind):
    """Whatever kernel runs is as good as the explicit way in the same precision, empty rows and gradients included."""
    q, k, v, key_mask = (x.detach().to(device) for x in inputs(head_dim=16))
    bias = bias_of(bias_kind)
    options = {"key_mask": key_mask if masked else None, "causal": causal}
    options["bias"] = None if bias is None else bias.to(device)
    weight = torch.randn(3, 2, 5, 16, device=device)

    def run(backend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        z = attention(*leaves, **options, backend=backend)
        return [x.double() for x in (z, *torch.autograd.grad((z * weight).sum(), leaves))]

    exact = run("explicit", torch.float64)
    for fused, explicit, right in zip(run("fused", dtype), run("explicit", dtype), exact, strict=True):
        assert fused.isfinite().all()
        assert (fused - right).abs().max() <= 2 * (explicit - right).abs().max() + 10 * torch.finfo(dtype).eps


def test_nan_is_not_taken_for_a_mask():
    q, k, v, _ = inputs()
    k = k.detach().clone()
    k[0, 0, 0, 0] = math.nan
    for backend in BACKENDS:
        assert attention(q, k, v, backend=backend)[0, 0].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_drops_weights_and_scales_the_rest(backend, monkeypatch):
    # With v = identity the output is the dropped pattern itself: each weight is gone or divided by 1 - p.
    q, k, _, _ = inputs(keys=6)
    eye = torch.eye(6).expand(3, 2, 6, 6)
    ratio = attention(q, k, eye, dropout=0.25, backend=backend) / attention(q, k, eye, backend=backend)
    dropped = ratio.abs() < 1e-6
    torch.testing.assert_close(ratio[~dropped], torch.full_like(ratio[~dropped], 4 / 3))
    assert 0.1 < dropped.float().mean() < 0.4  # 180 draws at 0.25: four standard deviations are 0.13

    use_backend(monkeypatch, backend)
    module = MultiHeadAttention(8, 2, dropout=0.5)
    x = torch.randn(2, 5, 8)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_wrong_arguments_are_named():
    q, k, v, key_mask = inputs()
    with pytest.raises(ValueError, match="backend must be one of fused, products, explicit, got 'flash'"):
        attention(q, k, v, backend="flash")
    with pytest.raises(ValueError, match=r"key_mask must be \(batch, 7 keys\), got \(3, 6\)"):
        attention(q, k, v, key_mask=key_mask[:, :6])
    with pytest.raises(ValueError, match="width 10 does not divide into 4 heads"):
        MultiHeadAttention(10, 4)
    cross = MultiHeadAttention(8, 2, context_dim=8)
    with pytest.raises(ValueError, match="needs a context"):
        cross(torch.randn(2, 3, 8))
    with pytest.raises(ValueError, match="a Memory has its own mask"):
        cross(torch.randn(2, 3, 8), Memory(torch.randn(2, 3, 8)), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"memory mask must be \(2, 3\), got \(2, 4\)"):
        Memory(torch.randn(2, 3, 8), torch.ones(2, 4))
    with pytest.raises(ValueError, match="2 rows, but the memory serves 3"):
        cross(torch.randn(2, 3, 8), torch.randn(3, 3, 8))
    with pytest.raises(ValueError, match="an index or a repeat"):
        Memory(torch.randn(2, 3, 8), index=torch.tensor([0, 1]), repeat=2)


def test_module_projects_splits_and_joins():
    """Self and cross modules against the definition, with a head size that is not width / heads."""
    x, context = torch.randn(2, 4, 10), torch.randn(2, 3, 6)
    for module, source in (
        (MultiHeadAttention(10, 3, head_dim=4, scale=0.7), x),
        (MultiHeadAttention(10, 3, head_dim=4, scale=0.7, context_dim=6, bias=False, out_bias=False), context),
    ):
        if module.is_cross:
            q, kv = module.q(x), module.kv(source)
            k, v = kv[..., :12], kv[..., 12:]
            got = module(x, source)
        else:
            q, k, v = module.qkv(x).split(12, -1)
            got = module(x)
        heads = [t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (q, k, v)]
        allowed = torch.ones(2, 3, 4, source.shape[1], dtype=torch.bool)
        z = brute_force_attention(*heads, allowed, None, 0.7)
        torch.testing.assert_close(got, module.out(z.transpose(1, 2).flatten(2).float()), **CLOSE)


def test_a_mask_keeps_cudnn_away_on_a_gpu(monkeypatch):
    """With a mask cuDNN reads where there is nothing to read, or has a gradient of NaN; see masked_safely."""
    module, entered = importlib.import_module("vqa_scratch.nn.attention"), []
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    assert enabled()
    with module.masked_safely(torch.device("cpu")):
        assert enabled()
    with module.masked_safely(torch.device("cuda")):
        assert not enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    assert enabled()
    monkeypatch.setattr(module, "masked_safely", lambda device: entered.append(device) or nullcontext())
    q, k, v, key_mask = (x.detach() for x in inputs())
    attention(q, k, v)
    assert not entered
    attention(q, k, v, key_mask=key_mask)
    attention(q, k, v, bias=torch.zeros(1, 2, 5, 7), backend="fused")
    attention(q, k, v, causal=True)  # more keys than queries: a mask
    assert len(entered) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_masked_attention_on_a_gpu_gives_zeros_for_nothing_and_gradients_that_are_numbers():
    """64 tokens and scores near -120: where cuDNN's gradient of the queries is NaN on an H100."""
    q, k, v = (torch.randn(2, 1, 64, 64, device="cuda", dtype=torch.bfloat16) * 0.1 for _ in range(3))
    q[..., 0], k[..., 0] = 1.0, -120 * 8
    key_mask = torch.ones(2, 64, dtype=torch.bool, device="cuda")
    key_mask[1] = False
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, key_mask=key_mask)
    assert not out[1].any() and out[0].any()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), leaves))


# --- positions --------------------------------------------------------------------------------------------------------


def test_positions_skip_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert decoder_positions(torch.zeros(2, 5, 1), mask, None, 5).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]
    ids = torch.tensor([[5, 6, 7, 1, 1], [1, 5, 6, 7, 8]])
    assert positions_from_ids(ids, 1).tolist() == [[2, 3, 4, 1, 1], [1, 2, 3, 4, 5]]
