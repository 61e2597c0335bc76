"""Rollout, relevancy, head statistics and lenses against autograd, closed forms and invariants."""

import math

import pytest
import torch
from study_helpers import tiny_t5_subject, tiny_vqa_subject

from vqa_scratch.study import trace
from vqa_scratch.study.analysis import (
    HeadStatistics,
    attention_names,
    cross_maps,
    every_attention,
    head_statistics,
    mean_distance,
    normalised_entropy,
    relevancy,
    rollout,
    weighted_patterns,
)
from vqa_scratch.study.lens import ATTRIBUTION_TAPS, logit_attribution, logit_lens
from vqa_scratch.study.subject import Source

SUBJECTS = {
    "tokens": lambda: tiny_vqa_subject("tokens"),
    "mean": lambda: tiny_vqa_subject("mean"),
    "t5": tiny_t5_subject,
}


@pytest.fixture(params=SUBJECTS)
def subject(request):
    return SUBJECTS[request.param]()


def traced(subject, answer, *patterns):
    with trace(subject.model, *patterns) as t, torch.no_grad():
        subject.logits(subject.prompt + answer[:-1])
    return t


# ---------------------------------------------------------------------------------------------- relevancy


def explicit_weighted_patterns(subject, ids, row, token):
    """The same by autograd: the explicit path with every pattern kept in the graph."""
    kept = {}
    with trace(subject.model, record=False) as t:
        for name in every_attention(subject):
            t.replace(f"{name}.pattern", lambda pattern, call, name=name: kept.setdefault(name, pattern))
        logits = subject.logits(ids)
    gradients = torch.autograd.grad(logits[row, token], list(kept.values()), allow_unused=True)
    weighted = {}
    for (name, pattern), gradient in zip(kept.items(), gradients, strict=True):
        gradient = torch.zeros_like(pattern) if gradient is None else gradient
        weighted[name] = (pattern * gradient).clamp(min=0).mean(1)[0].detach()
    return weighted


def chefer(subject, weighted):
    """The rules once more, tower by tower and without the helper functions of the package."""

    def bar(relevancy):
        added = relevancy - torch.eye(len(relevancy))
        total = added.sum(-1, keepdim=True)
        return torch.where(total > 0, added / total, added) + torch.eye(len(relevancy))

    order = attention_names(subject)
    encoders = []
    for source in subject.sources:
        r = torch.eye(len(source))
        for name in order[source.tower]:
            r = r + weighted[name] @ r
        encoders.append(bar(r))
    decoder = torch.eye(len(weighted["decoder.0.self"]))
    sources = [torch.zeros(len(decoder), len(source)) for source in subject.sources]
    for i in range(subject.layers("decoder")):
        own, cross = weighted[f"decoder.{i}.self"], weighted[f"decoder.{i}.cross"]
        sources = [s + own @ s for s in sources]
        decoder = decoder + own @ decoder
        start = 0
        for j, (source, r) in enumerate(zip(subject.sources, encoders, strict=True)):
            mixing = subject.mixing[:, start : start + len(source)]
            sources[j] = sources[j] + bar(decoder).T @ cross @ mixing @ r
            start += len(source)
    return torch.cat(sources, 1), decoder


def test_relevancy_is_that_of_autograd_on_the_explicit_path(subject):
    answer = [5, 6, 7]
    flow = relevancy(subject, answer)
    ids = subject.prompt + answer
    for row in range(3):
        weighted = explicit_weighted_patterns(subject, ids[:-1], row, ids[row + 1])
        sources, decoder = chefer(subject, weighted)
        # Sums of a few products of fp32 numbers of size 1.
        torch.testing.assert_close(flow.sources[row], sources[row], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(flow.decoder[row], decoder[row], atol=1e-5, rtol=1e-4)
    assert flow.sources.min() >= 0 and flow.sources.max() > 1e-3


def test_each_weighted_pattern_is_that_of_autograd(subject):
    ids = subject.prompt + [5]
    with trace(subject.model, grad=True) as t:
        logits = subject.logits(ids)
    ours = weighted_patterns(subject, t, logits[1, 7])
    theirs = explicit_weighted_patterns(subject, ids, 1, 7)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-4)


def test_relevancy_leaves_no_gradients_and_works_under_no_grad(subject):
    with torch.no_grad():
        flow = relevancy(subject, [5, 6], rows=[1])
    assert all(parameter.grad is None for parameter in subject.model.parameters())
    assert flow.sources[0].abs().max() == 0 and flow.sources[1].max() > 0


# ---------------------------------------------------------------------------------------------- rollout


def test_rollout_shares_sum_to_one_and_look_back_only(subject):
    t = traced(subject, [5, 6, 7])
    flow = rollout(subject, t)
    total = flow.sources.sum(-1) + flow.decoder.sum(-1)
    torch.testing.assert_close(total, torch.ones(3), atol=1e-5, rtol=0)
    assert flow.decoder.triu(1).abs().max() == 0
    assert flow.sources.min() >= 0


def test_rollout_is_the_product_of_half_residual_matrices():
    subject = tiny_vqa_subject()
    t = traced(subject, [5])
    image = torch.eye(10)
    for layer in range(2):
        image = (t.pattern(f"image.{layer}.self")[0].mean(0) / 2 + torch.eye(10) / 2) @ image
    one, two = (t.pattern(f"decoder.{layer}.cross")[0].mean(0)[:, :10] for layer in range(2))
    # One decoder token: its self-attention is 1, so what came in with a cross-attention is halved by each later one.
    expected = (one / 4 + two / 2) @ image
    torch.testing.assert_close(rollout(subject, t).sources[:, :10], expected, atol=1e-6, rtol=0)


def test_cross_maps_are_the_patterns_spread_over_what_keys_are_made_of():
    tokens, mean = tiny_vqa_subject("tokens"), tiny_vqa_subject("mean")
    t = traced(tokens, [5])
    torch.testing.assert_close(cross_maps(tokens, t)[1], t.pattern("decoder.1.cross")[0])
    t = traced(mean, [5])
    expected = torch.cat([torch.full((10,), 0.05), torch.full((5,), 0.1)]).expand(2, 4, 1, -1)
    torch.testing.assert_close(cross_maps(mean, t), expected)


# ---------------------------------------------------------------------------------------------- heads


def test_entropy_and_distance_have_their_closed_forms():
    visible = torch.ones(4, dtype=torch.bool)
    uniform, one = torch.full((4,), 0.25), torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert float(normalised_entropy(uniform, visible)) == pytest.approx(1)
    assert float(normalised_entropy(one, visible)) == pytest.approx(0, abs=1e-6)
    half = torch.tensor([0.5, 0.5, 0.0, 0.0])
    assert float(normalised_entropy(half, visible)) == pytest.approx(0.5)
    assert float(normalised_entropy(half, half > 0)) == pytest.approx(1)
    image = Source("image", ("",) * 5, sinks=(0,), grid=(2, 2))
    ahead = torch.zeros(1, 5, 5)
    ahead[0, :, 4] = 1.0  # every token reads the patch in the lower right corner
    expected = (math.sqrt(2) + 1 + 1 + 0) / 4
    assert float(mean_distance(ahead, image)) == pytest.approx(expected)
    assert float(mean_distance(torch.eye(3)[None], None)) == pytest.approx(0)
    assert float(mean_distance(torch.eye(3)[None].flip(-1), None)) == pytest.approx(4 / 3)


def test_statistics_cover_every_head_and_their_masses_sum_to_one(subject):
    t = traced(subject, [5, 6, 7])
    statistics = head_statistics(subject, t)
    assert len(statistics) == 4 * len(every_attention(subject))
    for s in statistics:
        assert isinstance(s, HeadStatistics)
        assert s.image + s.text + s.sink == pytest.approx(1, abs=1e-5)
        assert 0 <= s.entropy <= 1 + 1e-5
        assert (s.distance is None) == s.name.endswith("cross")
    if subject.sources[0].tower == "image" and len(subject.mixing) > 1:
        cross = next(s for s in statistics if s.name == "decoder.0.cross" and s.head == 2)
        pattern = t.pattern("decoder.0.cross")[0, 2].mean(0)
        assert cross.image == pytest.approx(float(pattern[1:10].sum()), abs=1e-6)
        assert cross.text == pytest.approx(float(pattern[11:14].sum()), abs=1e-6)
        assert cross.sink == pytest.approx(float(pattern[[0, 10, 14]].sum()), abs=1e-6)


# ---------------------------------------------------------------------------------------------- lenses


def test_the_last_lens_is_the_model(subject):
    t = traced(subject, [5, 6], *ATTRIBUTION_TAPS)
    expected = subject.logits(subject.prompt + [5]).log_softmax(-1)
    lens = logit_lens(subject, t)
    assert len(lens) == subject.layers("decoder") + 1
    torch.testing.assert_close(lens[-1], expected.detach(), atol=1e-5, rtol=0)
    assert (lens[0] - expected).abs().max() > 0.1


def test_attributions_sum_to_the_logit(subject):
    t = traced(subject, [5, 6, 7], *ATTRIBUTION_TAPS)
    logits = subject.logits(subject.prompt + [5, 6]).detach()
    for row, token in [(0, 5), (2, 7)]:
        parts = logit_attribution(subject, t, row, token)
        assert parts.cross_heads.shape == parts.self_heads.shape == (2, 4)
        expected = float(logits[row, token] - logits[row].mean())
        assert parts.total == pytest.approx(expected, abs=2e-5)
