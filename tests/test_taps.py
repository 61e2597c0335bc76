"""Taps: nothing without a trace, every intermediate with one, and what a trace returns is what is used."""

import math

import pytest
import torch

from vqa_scratch.models import GPT2, Bert, BertConfig, GPT2Config, ViT, ViTConfig
from vqa_scratch.nn import MLP, Memory, MultiHeadAttention, attention, attention_weights, taps

ATTENTION = ("q", "k", "v", "mask", "scores", "pattern", "z", "head_out", "out")
CLOSE = {"atol": 2e-6, "rtol": 0.0}


class Recorder:
    """Keeps what it sees of the names it was asked for; may replace some."""

    def __init__(self, wants=None, replace=None):
        self.names, self.replace, self.seen = wants, replace or {}, {}

    def wants(self, name):
        return self.names is None or name in self.names or name in self.replace

    def __call__(self, name, tensor):
        assert name not in self.seen, f"{name} tapped twice"
        self.seen[name] = tensor
        return self.replace[name](tensor) if name in self.replace else tensor


def with_biases(model):
    """Biases and norms start at 0 and 1, which would hide a tap that forgets them."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def vit():
    return with_biases(ViT(ViTConfig(8, 4, 3, 12, 2, 2, 10, init_std=0.2)))


def bert():
    return with_biases(Bert(BertConfig("bert", 20, 12, 2, 2, 10, 16, init_std=0.2)))


def gpt2():
    return with_biases(GPT2(GPT2Config(20, 16, 12, 2, 2, hidden=10, init_std=0.2, add_cross_attention=True)))


IDS = torch.randint(0, 20, (4, 5), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0]])
STATES = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(2))
MEMORY = [Memory(STATES, torch.tensor([[1, 0, 1], [1, 1, 1]]), repeat=2), Memory(STATES.repeat(2, 1, 1))]
RUNS = {
    "image": (vit, lambda m: m(torch.linspace(-1, 1, 4 * 3 * 64).view(4, 3, 8, 8)), ("self", "mlp")),
    "text": (bert, lambda m: m(IDS, MASK), ("self", "mlp")),
    "decoder": (gpt2, lambda m: m.hidden(m.embed(IDS), MASK, memory=MEMORY), ("self", "cross", "mlp")),
}


@pytest.mark.parametrize("tower", RUNS)
def test_a_trace_sees_every_intermediate_and_changes_nothing(tower):
    build, run, parts = RUNS[tower]
    model, trace = build(), Recorder()
    plain = run(model)
    with taps.activate(trace):
        traced = run(model)
    torch.testing.assert_close(traced, plain, **CLOSE)
    expected = {f"{tower}.{layer}.resid_{place}" for layer in range(2) for place in ("pre", "mid", "post")}
    for part in parts:
        labels = ("pre", "post", "out") if part == "mlp" else ATTENTION
        expected |= {f"{tower}.{layer}.{part}.{label}" for layer in range(2) for label in labels}
    assert set(trace.seen) == expected
    assert torch.equal(trace.seen[f"{tower}.0.resid_post"], trace.seen[f"{tower}.1.resid_pre"])


@pytest.mark.parametrize("tower", RUNS)
def test_what_is_seen_fits_together(tower):
    """Each tensor follows from those before it; the pattern can be rebuilt from q, k and the mask."""
    build, run, parts = RUNS[tower]
    model, trace = build(), Recorder()
    with taps.activate(trace):
        run(model)
    for layer, block in enumerate(model.blocks):
        for part in set(parts) - {"mlp"}:
            module = block.attn if part == "self" else block.cross
            q, k, v, mask, scores, pattern, z, head_out, out = (
                trace.seen[f"{tower}.{layer}.{part}.{label}"] for label in ATTENTION
            )
            rebuilt_scores, rebuilt = attention_weights(q, k, bias=mask, scale=module.scale)
            torch.testing.assert_close(rebuilt_scores, scores)
            torch.testing.assert_close(rebuilt, pattern)
            torch.testing.assert_close(pattern @ v, z)
            torch.testing.assert_close(attention(q, k, v, bias=mask, scale=module.scale), z, **CLOSE)
            torch.testing.assert_close(head_out.sum(1) + module.out.bias, out, **CLOSE)
            torch.testing.assert_close(module.out(z.transpose(1, 2).flatten(2)), out, **CLOSE)
    if tower == "decoder":  # three shared keys then three own ones; the second shared key of entry 0 is masked
        blocked = trace.seen["decoder.0.cross.mask"] == -math.inf
        assert blocked.shape == (4, 1, 5, 6) and blocked[:2, :, :, 1].all() and blocked.sum() == 2 * 5


@pytest.mark.parametrize("part", ["self", "cross"])
def test_replacing_scores_or_pattern_takes_effect(part):
    """Even while the module is told to be fused: the explicit way runs where a trace needs it."""
    model = gpt2()
    run = RUNS["decoder"][1]
    uniform = Recorder([], {f"decoder.1.{part}.scores": torch.zeros_like})
    ablated = Recorder([f"decoder.1.{part}.v"], {f"decoder.1.{part}.pattern": torch.zeros_like})
    seen = Recorder([f"decoder.1.{part}.{label}" for label in ("v", "z")])
    with taps.activate(uniform):
        one = run(model)
    with taps.activate(ablated):
        two = run(model)
    plain = run(model)
    assert (one - plain).abs().max() > 1e-3 and (two - plain).abs().max() > 1e-3
    seen.replace = uniform.replace
    with taps.activate(seen):
        run(model)
    v, z = (seen.seen[f"decoder.1.{part}.{label}"] for label in ("v", "z"))
    torch.testing.assert_close(z, v.mean(2, keepdim=True).expand_as(z))


@pytest.mark.parametrize("label", ["q", "k", "v", "z", "head_out", "out"])
@pytest.mark.parametrize("part", ["self", "cross"])
def test_replacing_any_other_takes_effect(part, label):
    model, run = gpt2(), RUNS["decoder"][1]
    plain = run(model)
    with taps.activate(Recorder([], {f"decoder.1.{part}.{label}": lambda tensor: tensor.roll(1, -1) + 0.5})):
        assert (run(model) - plain).abs().max() > 1e-3
    torch.testing.assert_close(run(model), plain, rtol=0, atol=0)


def test_the_fused_way_stays_where_it_can(monkeypatch):
    """q, k, v, z of self-attention come without giving up the fused operator; scores cost it, in that module only."""
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kw: calls.append(1) or fused(*args, **kw)
    )
    model, run = bert(), RUNS["text"][1]
    run(model)
    assert len(calls) == 2
    with taps.activate(
        Recorder([f"text.{layer}.self.{label}" for layer in range(2) for label in ("q", "k", "v", "z")])
    ):
        run(model)
    assert len(calls) == 4
    with taps.activate(Recorder(["text.0.self.scores"])):
        run(model)
    assert len(calls) == 5


def test_traces_leave_nothing_behind():
    model, run = vit(), RUNS["image"][1]
    with pytest.raises(ZeroDivisionError), taps.activate(Recorder([], {"image.0.resid_mid": lambda tensor: 1 / 0})):
        run(model)
    assert not taps.wanted("image.0", "resid_mid")
    run(model)
    second = taps.activate(Recorder())
    with taps.activate(Recorder()), pytest.raises(RuntimeError, match="a trace is already active"), second:
        pass
    with taps.activate(Recorder()):
        assert taps.wanted("image.0", "resid_mid")


def test_towers_can_be_renamed():
    model = vit()
    taps.name_modules(model.blocks, "eye")
    trace = Recorder(["eye.1.self.pattern", "image.1.self.pattern"])
    with taps.activate(trace):
        RUNS["image"][1](model)
    assert list(trace.seen) == ["eye.1.self.pattern"]
    names = [m.tap_prefix for m in model.modules() if isinstance(m, (MLP, MultiHeadAttention))]
    assert names == ["eye.0.self", "eye.0.mlp", "eye.1.self", "eye.1.mlp"]


@torch.no_grad()
def test_a_trace_follows_cached_decoding():
    """With a cache the last step's pattern is the last row of the whole pattern."""
    model = gpt2()
    whole, last = Recorder(), Recorder()
    with taps.activate(whole):
        model(IDS, memory=MEMORY)
    cache = model.new_cache()
    model(IDS[:, :-1], memory=MEMORY, cache=cache)
    with taps.activate(last):
        model(IDS[:, -1:], cache=cache)
    for part in ("self", "cross"):
        name = f"decoder.1.{part}.pattern"
        torch.testing.assert_close(last.seen[name], whole.seen[name][:, :, -1:], **CLOSE)


class Silence:
    """Puts zeros in place of what heads read."""

    def wants(self, name):
        return name.endswith(".z")

    def __call__(self, name, tensor):
        return torch.zeros_like(tensor)


def test_a_compiled_model_notices_a_trace():
    """Without a break in its graph: torch knows how to guard a variable of a thread, but no context variable."""
    attention = MultiHeadAttention(8, 2)
    attention.tap_prefix = "decoder.0.self"
    compiled, x = torch.compile(attention, backend="eager", fullgraph=True), torch.randn(1, 3, 8)
    torch.testing.assert_close(compiled(x), attention(x))
    with taps.activate(Silence()):
        torch.testing.assert_close(compiled(x), attention.out.bias.expand(1, 3, 8))
    torch.testing.assert_close(compiled(x), attention(x))
