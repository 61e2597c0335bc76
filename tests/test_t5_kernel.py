"""T5 with its bias looked up by the Triton kernel against the bias written out: logits, every gradient, decoding.

On a GPU where there is one, else in Triton's interpreter. In fp32 both ways differ by the rounding of a few hundred
additions: 1e-5 of numbers of size 1, gradients relative to the largest of their tensor.
"""

import math
from contextlib import contextmanager

import pytest
import torch

from vqa_scratch.generate import Conditioning, GenerationOptions, generate
from vqa_scratch.kernels import attention, choice
from vqa_scratch.models.t5 import T5, T5Config
from vqa_scratch.nn import taps
from vqa_scratch.nn.memory import Memory
from vqa_scratch.nn.relative_bias import PassBias, RelativeBias
from vqa_scratch.study import trace

pytest.importorskip("triton")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SIZES = {"vocab_size": 31, "dim": 24, "head_dim": 16, "hidden": 32, "heads": 2, "buckets": 8, "max_distance": 6}
LAYERS = 3  # with self-attention: two of the encoder, one of the decoder


def one_line(self, queries, keys, forward=RelativeBias.forward):
    """A step of `generate` asks for the line of its one query; more than that is dense."""
    assert queries == 1, "a dense bias was made"
    return forward(self, queries, keys)


@pytest.fixture
def way(monkeypatch):
    """Inside `way("kernel")` T5 takes the kernel alone, in "mixed" where it can, in "dense" never. Yields its calls."""
    if not GPU:
        monkeypatch.setattr(attention, "tiles", lambda kernel, *_: attention.Tile(16, 16, 4, 2))
    run = attention.triton_attention

    @contextmanager
    def chosen(name):
        calls = []
        with monkeypatch.context() as patch:
            patch.setattr("vqa_scratch.kernels.DEVICES", {DEVICE})
            patch.setattr(choice, "takes", lambda kernel, q, problem=None: name != "dense" and problem is None)
            patch.setattr(attention, "triton_attention", lambda *a, **b: calls.append(b["bias"]) or run(*a, **b))
            if name == "kernel":
                patch.setattr(RelativeBias, "forward", one_line)
            yield calls

    return chosen


@pytest.fixture
def model():
    """Biases larger than at initialisation, so that a wrong bucket shows."""
    made = T5(T5Config(**SIZES, encoder_layers=2, decoder_layers=1)).eval()
    for tower in (made.encoder, made.decoder):
        torch.nn.init.normal_(tower.bias.table.weight)
    return made.to(DEVICE)


def batch(padded):
    """26 input tokens, 20 of the decoder; `padded`: inputs ragged on the right, the decoder on the left."""
    ids, decoder_ids = torch.randint(2, 31, (2, 26)), torch.randint(2, 31, (2, 20))
    mask = decoder_mask = None
    if padded:
        mask = torch.arange(26) < torch.tensor([[19], [1]])
        decoder_mask = torch.arange(20) >= torch.tensor([[0], [6]])  # pads there see nothing at all
    return [None if x is None else x.to(DEVICE) for x in (ids, mask, decoder_ids, decoder_mask)]


def results(model, inputs, real):
    model.zero_grad()
    logits = model(*inputs)
    loss = (logits.float().log_softmax(-1) * real)[..., 3].sum()
    loss.backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def agree(model, inputs, way, kinds=("kernel", "dense"), tolerance=1e-5):
    real = torch.ones(2, 20, 1, device=DEVICE) if inputs[3] is None else inputs[3][..., None].float()
    found = []
    for kind in kinds:
        with way(kind) as calls:
            found.append(results(model, inputs, real))
        assert len(calls) == (LAYERS if kind == "kernel" else 0)
    (ours, our_grads), (theirs, their_grads) = found
    torch.testing.assert_close(ours * real, theirs * real, rtol=0, atol=tolerance * float(theirs.abs().max()))
    for name, grad in their_grads.items():
        assert our_grads[name].dtype == torch.float32
        torch.testing.assert_close(
            our_grads[name], grad, rtol=0, atol=tolerance * float(grad.abs().max()), msg=lambda m, n=name: f"{n}: {m}"
        )
    return their_grads


@pytest.mark.parametrize("padded", [False, True])
def test_logits_and_every_gradient(model, way, padded):
    grads = agree(model, batch(padded), way)
    assert all(grads[f"{tower}.bias.table.weight"].abs().sum() > 0 for tower in ("encoder", "decoder"))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("padded", [False, True])
def test_the_same_at_real_sizes_on_a_gpu(way, padded):
    """Flan-t5-small's heads, 300 and 200 tokens; 3e-5: ten times the additions."""
    model = T5(T5Config(vocab_size=31, encoder_layers=2, decoder_layers=1)).eval().to(DEVICE)
    inputs = [torch.randint(2, 31, (2, 300)), torch.arange(300) < torch.tensor([[300], [170]])]
    inputs = [x.to(DEVICE) for x in inputs] + [torch.randint(2, 31, (2, 20)).to(DEVICE), None]
    agree(model, inputs if padded else [inputs[0], None, inputs[2], None], way, tolerance=3e-5)


def test_the_gradient_of_the_table_is_the_sum_over_its_layers(model, way):
    """Each layer's share, from a copy of the table of its own, against the gradient of the one table."""
    x, tower = torch.randn(1, 20, 24, device=DEVICE), model.encoder
    with way("kernel"):
        tower(x)[0, :, 0].sum().backward()
        copies = []

        class Apart:
            training = False

            def lookup(self):
                copies.append(tower.bias.table.weight.detach().clone().requires_grad_())
                return attention.DistanceBias(copies[-1], 6, True)

        bias = PassBias(Apart(), 20, 20, causal=False)
        y = x
        for block in tower.blocks:
            y = block(y, bias)
        tower.norm(y)[0, :, 0].sum().backward()
    assert len(copies) == 2
    torch.testing.assert_close(tower.bias.table.weight.grad, sum(c.grad for c in copies))


@pytest.mark.parametrize("kind", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_under_autocast(model, way, kind):
    """q, k, v in 16 bits beside a table in fp32; one rounding in 2^-11 or 2^-8 in each of some ten products."""
    if kind == torch.bfloat16 and not GPU:
        pytest.skip("the interpreter multiplies bf16 wrongly")
    with torch.autocast(DEVICE, kind):
        agree(model, batch(True), way, tolerance=20 * torch.finfo(kind).eps)


def test_cached_decoding_has_its_queries_at_the_end_of_the_keys(model, way):
    """Token by token and several at once, rows dropped on the way, against a full pass of the dense way."""
    ids, mask, decoder_ids, decoder_mask = batch(True)
    with torch.no_grad():
        with way("dense"):
            memory = Memory(model.encode(ids, mask), mask)
            full = model.hidden(model.embed(decoder_ids), decoder_mask, memory=[memory])
        with way("kernel") as calls:
            cache, start = model.new_cache(), 0
            for end in (9, 10, 11, 18, 20):
                new_embeddings = model.embed(decoder_ids[:, start:end])
                new = model.hidden(new_embeddings, decoder_mask[:, :end], memory=[memory], cache=cache)
                for row in range(len(ids)):
                    seen = decoder_mask[row, start:end]
                    torch.testing.assert_close(new[row, seen], full[row, start:end][seen], rtol=0, atol=1e-5)
                start = end
                if end == 11:
                    keep = torch.tensor([1], device=DEVICE)
                    cache.select(keep)
                    ids, mask, decoder_ids, decoder_mask, full = (
                        x[keep] for x in (ids, mask, decoder_ids, decoder_mask, full)
                    )
                    memory = Memory(memory.states[keep], memory.mask[keep])
    assert len(calls) == 5  # of one layer


@pytest.mark.parametrize("beams", [1, 3])
def test_generation(model, way, beams):
    ids, mask, decoder_ids, decoder_mask = batch(True)
    made = []
    for kind in ("kernel", "dense"):
        with way(kind) as calls, torch.no_grad():
            memory = Conditioning([Memory(model.encode(ids, mask), mask)])
            options = GenerationOptions(8, 1, num_beams=beams)
            made.append(generate(model, decoder_ids, decoder_mask, memory, options=options).ids)
            assert len(calls) == (LAYERS if kind == "kernel" else 0)
    assert torch.equal(*made)


def test_one_mask_for_all_rows(model, way):
    ids, _, decoder_ids, _ = batch(False)
    mask = (torch.arange(26) < 20)[None].to(DEVICE)
    outs = []
    for kind in ("kernel", "dense"):
        with way(kind), torch.no_grad():
            outs.append(model.encode(ids, mask))
    torch.testing.assert_close(*outs, rtol=0, atol=1e-5)


def test_dropped_weights_and_a_look_at_them_take_the_other_way(model, way):
    ids, mask, decoder_ids, _ = batch(True)
    with way("dense"), torch.no_grad():
        expected = model(ids, mask, decoder_ids)
    with way("kernel") as calls, pytest.raises(AssertionError, match="a dense bias was made"):
        model.train()(ids, mask, decoder_ids)
    assert not calls
    model.eval()
    seen = []

    class Handler:
        def wants(self, name):
            return name == "encoder.1.self.pattern"

        def __call__(self, name, tensor):
            seen.append(tensor)
            return tensor

    with way("mixed") as calls, torch.no_grad(), taps.activate(Handler()):
        out = model(ids, mask, decoder_ids)
    assert len(calls) == LAYERS - 1  # every layer but the one that is looked at
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    (pattern,) = seen
    torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))
    assert not pattern[0, :, :, 19:].any()


def test_a_trace_reads_the_same_scores(model, way):
    ids, mask, decoder_ids, _ = batch(True)
    found = []
    for kind in ("dense", "mixed"):
        with way(kind), torch.no_grad(), trace(model, "encoder.*.self", "decoder.*.self") as seen:
            model(ids, mask, decoder_ids)
        found.append([seen["encoder.1.self.scores"], seen["decoder.0.self.scores"]])
    for ours, theirs in zip(*found, strict=True):
        finite = torch.isfinite(theirs)
        assert torch.equal(finite, torch.isfinite(ours)) and (theirs[~finite] == -math.inf).all()
        torch.testing.assert_close(ours[finite], theirs[finite], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_torch_compile_leaves_the_kernel_as_it_is(model, way):
    """The kernel runs between two compiled pieces, at any length, and gradients pass through it."""
    ids, mask, _, _ = batch(True)
    with way("kernel") as calls:
        encode = torch.compile(model.encode, backend="eager", dynamic=True)
        for length in (12, 9):
            out = encode(ids[:, :length], mask[:, :length])
            torch.testing.assert_close(out, model.encode(ids[:, :length], mask[:, :length]))
        out.sum().backward()
    assert len(calls) == 8 and model.encoder.bias.table.weight.grad.abs().sum() > 0
