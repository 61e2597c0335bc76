"""The trace: names, patterns, certificate, edits, and that it leaves no mark when it is not there."""

import math

import pytest
import torch
from helpers import use_backend
from study_helpers import SUBJECTS, tiny_vqa, tiny_vqa_subject

from vqa_scratch.errors import UserError
from vqa_scratch.models import ViT, ViTConfig
from vqa_scratch.nn import taps
from vqa_scratch.study import trace
from vqa_scratch.study.analysis import every_attention
from vqa_scratch.study.certificate import rebuilt_pattern, row_lse


@pytest.fixture(params=SUBJECTS)
def subject(request):
    return SUBJECTS[request.param]()


# ---------------------------------------------------------------------------------------------- rebuilt weights


def test_log_sum_exp_is_that_of_torch_for_any_number_of_blocks():
    for keys in (1, 63, 64, 65, 200):
        q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, keys, 8)
        mask = torch.zeros(2, 1, 5, keys).masked_fill(torch.rand(2, 1, 5, keys) < 0.3, -math.inf)
        expected = (0.4 * q.double() @ k.double().mT + mask).logsumexp(-1)
        torch.testing.assert_close(row_lse(q, k, mask, 0.4).double(), expected, atol=2e-6, rtol=0)


def test_log_sum_exp_is_the_one_the_fused_kernel_returns():
    q, k, v = (torch.randn(1, 2, n, 16) for n in (7, 70, 70))
    _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=0.25)
    torch.testing.assert_close(row_lse(q, k, None, 0.25), lse, atol=2e-6, rtol=0)


def test_a_row_that_sees_nothing_has_no_weights_and_no_nan():
    q, k = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4)
    mask = torch.tensor([[0.0, 0.0, 0.0], [-math.inf] * 3])[None, None]
    pattern = rebuilt_pattern(q, k, mask, 0.5)
    assert pattern[0, 0, 1].tolist() == [0, 0, 0] and float(pattern[0, 0, 0].sum()) == pytest.approx(1)


@pytest.mark.parametrize("backend", ["fused", "explicit"])
def test_certificate_of_every_attention_of_a_cached_generation(subject, backend, monkeypatch):
    use_backend(monkeypatch, backend)
    with trace(subject.model) as t:
        subject.generate(6)
    certificate = t.certificate()
    assert certificate.attentions == len(every_attention(subject))
    assert certificate.worst <= 1e-5, certificate
    assert certificate.rows == sum(t.pattern(name).shape[:3].numel() for name in every_attention(subject)) > 70


def test_certificate_finds_wrong_weights(subject):
    with trace(subject.model) as t:
        subject.generate(3)
    first, *_, last = subject.self_attentions or every_attention(subject)
    t._calls[f"{last}.q"][-1] = t._calls[f"{last}.q"][-1] + 0.1
    assert t.certificate().output > 1e-4
    assert t.certificate(first).worst <= 1e-5


def test_patterns_of_a_cached_generation_are_those_of_one_pass(subject):
    with trace(subject.model) as cached:
        answer = subject.generate(6)
    with trace(subject.model) as whole, torch.no_grad():
        subject.logits(subject.prompt + answer[:-1])
    for name in every_attention(subject):
        torch.testing.assert_close(cached.pattern(name), whole.pattern(name), atol=1e-5, rtol=0)


def test_keys_behind_a_cache_are_kept_once():
    subject = SUBJECTS["llava"]()
    with trace(subject.model, "decoder.*.self") as t:
        said = subject.generate(4)
    for label in ("k", "v"):
        calls = t.calls(f"decoder.1.self.{label}")
        assert [call.shape[2] for call in calls] == [subject.prefix + 1 + i for i in range(len(said))]
        assert len({call.untyped_storage().data_ptr() for call in calls}) == 1


def test_the_pattern_on_request_is_the_explicit_one(subject):
    """One attention explicit at a time, so that its states went through the same kernels both times."""
    with trace(subject.model) as t, torch.no_grad():
        subject.logits(subject.prompt)
    for name in every_attention(subject):
        seen = []
        with trace(subject.model, record=False) as other, torch.no_grad():
            other.replace(f"{name}.pattern", lambda p, call, seen=seen: seen.append(p) or p)
            subject.logits(subject.prompt)
        torch.testing.assert_close(t.pattern(name), seen[0], atol=1e-6, rtol=0)


def test_heads_sum_to_the_output(subject):
    with trace(subject.model) as t, torch.no_grad():
        subject.logits(subject.prompt)
    for name in every_attention(subject):
        bias = t.modules[name].out.bias
        expected = t[f"{name}.head_out"].sum(1) + (0 if bias is None else bias)
        torch.testing.assert_close(t[f"{name}.out"], expected, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------- no trace, no mark


def test_outputs_are_bit_identical_before_during_and_after_a_trace(subject):
    ids = subject.prompt + [5, 6]
    before = subject.logits(ids)
    with trace(subject.model):
        during = subject.logits(ids)
    after = subject.logits(ids)
    assert torch.equal(before, after)
    torch.testing.assert_close(before, during, atol=1e-5, rtol=0)  # one softmax over joined parts: same, reordered


def test_an_inactive_tap_hands_back_the_very_tensor():
    x = torch.randn(2)
    assert taps.tap("image.0", "resid_pre", x) is x and not taps.active()


def test_a_trace_ends_with_its_block_even_on_an_error():
    model = tiny_vqa()
    with pytest.raises(ZeroDivisionError), trace(model):
        raise ZeroDivisionError
    with trace(model), pytest.raises(RuntimeError, match="already active"), trace(model):
        pass
    assert not taps.active()


def test_entering_again_starts_afresh():
    subject = tiny_vqa_subject()
    t = trace(subject.model)
    for _ in range(2):
        with t:
            subject.generate(2)
        assert len(t.calls("image.0.self.q")) == 1


# ---------------------------------------------------------------------------------------------- edits


@pytest.mark.parametrize("head", [0, 3, None])
def test_ablating_a_head_is_zeroing_its_slice_of_the_output_projection(subject, head):
    ids = subject.prompt + [5, 6]
    name = "encoder.1.self" if subject.sources[0].name == "encoder" else subject.reading[-1]
    with trace(subject.model, record=False) as t, torch.no_grad():
        t.ablate(name, head=head)
        ablated = subject.logits(ids)
    weight = t.modules[name].out.weight
    size = t.modules[name].head_dim
    kept = weight.detach().clone()
    with torch.no_grad():
        before = subject.logits(ids)
        weight[:, slice(None) if head is None else slice(head * size, (head + 1) * size)] = 0
        expected = subject.logits(ids)
        weight.copy_(kept)
    torch.testing.assert_close(ablated, expected, atol=1e-6, rtol=0)
    assert (ablated - before).abs().max() > 1e-3


def test_ablating_an_mlp_leaves_its_bias():
    subject = tiny_vqa_subject()
    with trace(subject.model, "decoder.1.mlp.out") as t, torch.no_grad():
        t.ablate("decoder.1.mlp")
        subject.logits([1, 5])
    bias = subject.model.decoder.blocks[1].mlp.down.bias
    torch.testing.assert_close(t["decoder.1.mlp.out"][0], bias.expand(2, -1), atol=1e-6, rtol=0)


def test_an_edited_attention_still_has_its_certificate():
    subject = tiny_vqa_subject()
    with trace(subject.model) as t:
        t.ablate("decoder.*.cross", head=1)
        subject.generate(3)
    assert t["decoder.0.cross.z"][:, 1].abs().max() == 0
    assert t.certificate().worst <= 1e-5


def test_patching_the_last_state_brings_the_other_runs_answer():
    model = tiny_vqa()
    one, other = tiny_vqa_subject(model=model), tiny_vqa_subject(model=model)
    with trace(model, "decoder.*", "image.1.self") as source, torch.no_grad():
        wanted = other.logits([1, 4, 5])
    with torch.no_grad():
        assert (one.logits([1, 4, 5]) - wanted).abs().max() > 1e-2
    with trace(model, record=False) as t, torch.no_grad():
        t.patch(source, "decoder.1.resid_post")
        torch.testing.assert_close(one.logits([1, 4, 5]), wanted, atol=1e-5, rtol=0)
    with trace(model, "decoder.0.cross") as t, torch.no_grad():
        t.patch(source, "decoder.0.cross.pattern", head=2)
        one.logits([1, 4, 5])
    assert torch.equal(t.pattern("decoder.0.cross")[:, 2], source.pattern("decoder.0.cross")[:, 2])
    assert not torch.allclose(t.pattern("decoder.0.cross")[:, 1], source.pattern("decoder.0.cross")[:, 1])
    with pytest.raises(UserError, match="nothing to certify"):
        t.certificate()


def test_patching_works_through_a_cache():
    model = tiny_vqa()
    one, other = tiny_vqa_subject(model=model), tiny_vqa_subject(model=model)
    with trace(model, "decoder.1.resid_post") as source:
        wanted = other.generate(4)
    with trace(model, record=False) as t:
        t.patch(source, "decoder.1.resid_post")
        assert one.generate(len(wanted)) == wanted


def test_grad_reaches_z_of_a_frozen_model():
    subject = tiny_vqa_subject()
    subject.model.requires_grad_(False)
    with trace(subject.model, "image.0.self", grad=True) as t:
        logits = subject.logits([1])
    (gradient,) = torch.autograd.grad(logits[0, 3], t["image.0.self.z"])
    assert gradient.abs().max() > 0


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("decoder.*.croos", r"no tap matches 'decoder.\*.croos'; did you mean 'decoder.\*.cross"),
        ("decoder.9.cross", "decoder has layers 0 to 1"),
        ("image.0.self.quary", "did you mean"),
        ("decodr.0.self", "did you mean 'decoder"),
        ("", "no tap matches"),
        ("xyz", "names begin with decoder, image, text"),
    ],
)
def test_a_pattern_that_matches_nothing_names_near_misses(pattern, message):
    with pytest.raises(UserError, match=message) as error:
        trace(tiny_vqa(), pattern)
    assert "\n" not in str(error.value)


def test_misuse_has_one_clear_line_each():
    model = tiny_vqa()
    subject = tiny_vqa_subject(model=model)
    with trace(model, "decoder.0.cross") as t:
        with pytest.raises(UserError, match="decoder.0.cross has heads 0 to 3, not 4"):
            t.ablate("decoder.0.cross", head=4)
        with pytest.raises(UserError, match="decoder.0.mlp is no attention: it has no heads"):
            t.ablate("decoder.0.mlp", head=0)
        with pytest.raises(UserError, match="no heads and no neurons"):
            t.ablate("decoder.0.resid_pre")
        with pytest.raises(UserError, match="no heads and no neurons"):
            t.ablate("decoder.0")
        with pytest.raises(UserError, match="decoder has layers 0 to 1"):
            t.ablate("decoder.7.cross")
        with pytest.raises(UserError, match="nothing ran through it"):
            t.pattern("decoder.0.cross")
        subject.generate(2)
    with pytest.raises(UserError, match="'decoder.1.cross.pattern' was not traced"):
        t.pattern("decoder.1.cross")
    with pytest.raises(UserError, match="is not an attention"):
        t.pattern("decoder.0.mlp")
    with pytest.raises(UserError, match="did you mean"):
        t.pattern("decoder.0.crss")
    with pytest.raises(UserError, match="can be read, not replaced"):
        t.replace("decoder.0.cross.mask", lambda x, call: x)
    with pytest.raises(UserError, match="has no taps"):
        trace(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="both named 'image.0'"):
        sizes = ViTConfig(image_size=16, patch_size=8, dim=8, layers=1, heads=2, hidden=8)
        trace(torch.nn.ModuleList([ViT(sizes), ViT(sizes)]))


def test_a_patch_that_does_not_fit_is_refused():
    small, large = tiny_vqa(heads=2), tiny_vqa(heads=4)
    with trace(large) as source, torch.no_grad():
        tiny_vqa_subject(model=large).logits([1])
    with trace(small, record=False) as t, pytest.raises(UserError) as error:
        t.patch(source, "decoder.0.cross")
        tiny_vqa_subject(model=small).logits([1])
    assert str(error.value) == "patch of decoder.0.cross.z: the other run has (1, 4, 1, 4), this one (1, 2, 1, 8)"
    with trace(large, record=False) as t, pytest.raises(UserError, match="must keep its shape"), torch.no_grad():
        t.replace("decoder.0.resid_mid", lambda x, call: x[..., :3])
        tiny_vqa_subject(model=large).logits([1])
    with trace(large, record=False) as t, pytest.raises(UserError, match="made 1 calls, this one makes more"):
        t.patch(source, "decoder.0.cross")
        tiny_vqa_subject(model=large).generate(5)
    with pytest.raises(UserError, match="has no heads; patch z"):
        t.patch(source, "decoder.0.resid_pre", head=1)


def test_separate_passes_are_not_mixed_up():
    subject = tiny_vqa_subject()
    with trace(subject.model) as t, torch.no_grad():
        subject.logits([1])
        subject.logits([1, 2])
    with pytest.raises(ValueError, match="several separate passes"):
        t.pattern("decoder.0.self")
    assert [len(call[0, 0]) for call in t.calls("decoder.0.self.pattern")] == [1, 2]


def test_dropout_shows_in_the_certificate():
    model = ViT(ViTConfig(image_size=16, patch_size=8, dim=8, layers=1, heads=2, hidden=8, attention_dropout=0.5))
    with trace(model.train()) as t:
        model(torch.randn(1, 3, 16, 16))
    assert t.certificate().output > 1e-3 and t.certificate().mass <= 1e-5
