"""Rollout, relevancy, head statistics and lenses against autograd, closed forms and invariants."""

import math
import re
from pathlib import Path

import pytest
import torch
from study_helpers import (
    QUESTION,
    QUESTION_IDS,
    SUBJECTS,
    tiny_blip2_subject,
    tiny_vilt,
    tiny_vilt_subject,
    tiny_vqa_subject,
)

from vqa_scratch.nn.states import Places
from vqa_scratch.study import trace
from vqa_scratch.study.analysis import (
    HeadStatistics,
    attention_names,
    cross_maps,
    every_attention,
    head_statistics,
    mean_distance,
    normalised_entropy,
    plain_map,
    relevancy,
    rollout,
    weighted_patterns,
)
from vqa_scratch.study.base import Source
from vqa_scratch.study.lens import lens_taps, logit_attribution, logit_lens
from vqa_scratch.study.pair import PairSubject
from vqa_scratch.study.subject import ViLTSubject


@pytest.fixture(params=SUBJECTS)
def subject(request):
    return SUBJECTS[request.param]()


@pytest.fixture(params=["tokens", "mean", "t5", "caption"])
def reader(request):
    """A subject whose decoder reads its sources by cross-attention."""
    return SUBJECTS[request.param]()


def answer_of(subject, length=3):
    """Some answer: ids of the decoder, one label, or the texts of a pair."""
    if isinstance(subject, PairSubject):
        return [0, 1, 2][:length]
    return [2] if isinstance(subject, ViLTSubject) else [5, 6, 7][:length]


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


def bar(relevancy):
    """Equations 8 and 9."""
    added = relevancy - torch.eye(len(relevancy))
    total = added.sum(-1, keepdim=True)
    return torch.where(total > 0, added / total, added) + torch.eye(len(relevancy))


def through(weighted, *names):
    """Equation 6 over self-attentions, from the identity."""
    r = torch.eye(len(weighted[names[0]]))
    for name in names:
        r = r + weighted[name] @ r
    return r


def chefer(subject, weighted):
    """The rules once more, encoder by encoder and without the helper functions of the package."""
    order = attention_names(subject)
    encoders = []
    for source in subject.sources:
        r = torch.eye(len(source))
        for name in order[source.name]:
            r = r + weighted[name] @ r
        encoders.append(bar(r))
    decoder = torch.eye(len(weighted["decoder.0.self"]))
    sources = [torch.zeros(len(decoder), len(source)) for source in subject.sources]
    for i in range(subject.layers):
        own, cross = weighted[f"decoder.{i}.self"], weighted[f"decoder.{i}.cross"]
        sources = [s + own @ s for s in sources]
        decoder = decoder + own @ decoder
        start = 0
        for j, (source, r) in enumerate(zip(subject.sources, encoders, strict=True)):
            mixing = subject.mixing[:, start : start + len(source)]
            sources[j] = sources[j] + bar(decoder).T @ cross @ mixing @ r
            start += len(source)
    return torch.cat(sources, 1), decoder


def test_relevancy_is_that_of_autograd_on_the_explicit_path(reader):
    answer = [5, 6, 7]
    flow = relevancy(reader, answer)
    ids = reader.prompt + answer
    for row in range(3):
        weighted = explicit_weighted_patterns(reader, ids[:-1], row, ids[row + 1])
        sources, decoder = chefer(reader, weighted)
        # Sums of a few products of fp32 numbers of size 1.
        torch.testing.assert_close(flow.sources[row], sources[row], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(flow.decoder[row], decoder[row], atol=1e-5, rtol=1e-4)
    assert flow.sources.min() >= 0 and flow.sources.max() > 1e-3


def test_relevancy_of_a_single_stream_is_equation_6_alone():
    subject = tiny_vilt_subject()
    flow = relevancy(subject, [2])
    weighted = explicit_weighted_patterns(subject, subject.prompt, 0, 2)
    expected = through(weighted, "encoder.0.self", "encoder.1.self")
    torch.testing.assert_close(flow.sources, expected[:1], atol=1e-5, rtol=1e-4)
    assert flow.decoder.shape == (1, 0) and flow.sources[0, 0] > 1  # it starts from the identity
    assert flow.sources[0, 6:].max() > 1e-3


def test_relevancy_through_a_prefix():
    """Rows of the prefix begin with what the image encoder made of the patches, the others with themselves."""
    subject = tiny_vqa_subject("prefix")
    flow = relevancy(subject, [5, 6])
    weighted = explicit_weighted_patterns(subject, [*subject.prompt, 5], 2, 6)
    image = bar(through(weighted, "image.0.self", "image.1.self"))
    start = torch.zeros(9 + 3, 10 + 3)
    start[:9, :10], start[9:, 10:] = image[1:], torch.eye(3)
    expected = through(weighted, "decoder.0.self", "decoder.1.self") @ start
    torch.testing.assert_close(flow.sources[2], expected[-1, :10], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(flow.decoder[2], expected[-1, 10:], atol=1e-5, rtol=1e-4)
    assert flow.sources[2].max() > 1e-3 and flow.sources[0].max() == 0  # the prompt's first token predicts nothing


def test_relevancy_through_queries():
    """Equation 10 from the queries to the image; their own tokens are sources too."""
    subject = tiny_blip2_subject()
    flow = relevancy(subject, [5, 6])
    weighted = explicit_weighted_patterns(subject, [*subject.prompt, 5], 2, 6)
    image = bar(through(weighted, "image.0.self", "image.1.self"))
    first = torch.eye(3) + weighted["query.0.self"]
    from_image = bar(first).T @ weighted["query.0.cross"] @ image
    second = torch.eye(3) + weighted["query.1.self"]
    made = torch.cat([second @ from_image, second @ first - torch.eye(3)], 1)
    made = made / made.sum(-1, keepdim=True) + torch.cat([torch.zeros(3, 10), torch.eye(3)], 1)
    start = torch.zeros(3 + 3, 13 + 3)
    start[:3, :13], start[3:, 13:] = made, torch.eye(3)
    expected = through(weighted, "decoder.0.self", "decoder.1.self") @ start
    torch.testing.assert_close(flow.sources[2], expected[-1, :13], atol=1e-5, rtol=1e-4)
    assert flow.sources[2, :10].max() > 1e-4


def test_each_weighted_pattern_is_that_of_autograd(subject):
    ids, token = subject.prompt + [5], answer_of(subject)[-1]
    with trace(subject.model, grad=True) as t:
        logits = subject.logits(ids)
    row = len(logits) - 1
    ours = weighted_patterns(subject, t, logits[row, token])
    theirs = explicit_weighted_patterns(subject, ids, row, token)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-4)


def test_relevancy_leaves_no_gradients_and_works_under_no_grad(subject):
    answer = answer_of(subject, 2)
    with torch.no_grad():
        flow = relevancy(subject, answer)
    assert all(parameter.grad is None for parameter in subject.model.parameters())
    prompt = len(subject.prompt) - 1
    assert flow.sources[-1].max() > 0 and (flow.sources[:prompt] == 0).all()
    alone = relevancy(subject, answer[:1])  # later tokens do not change what made the first
    torch.testing.assert_close(alone.sources, flow.sources[: prompt + 1], atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------------------------------------- rollout


def test_rollout_shares_sum_to_one_and_look_back_only(subject):
    t = traced(subject, answer_of(subject))
    flow = rollout(subject, t)
    total = flow.sources.sum(-1) + flow.decoder.sum(-1)
    torch.testing.assert_close(total, torch.ones(len(subject.prompt) + len(answer_of(subject)) - 1), atol=1e-5, rtol=0)
    assert not flow.decoder.triu(1).any()
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


def test_rollout_of_a_single_stream_and_of_a_prefix():
    subject = tiny_vilt_subject()
    t = traced(subject, [2])
    one, two = (t.pattern(f"encoder.{i}.self")[0].mean(0) / 2 + torch.eye(15) / 2 for i in range(2))
    torch.testing.assert_close(rollout(subject, t).sources, (two @ one)[:1], atol=1e-6, rtol=0)
    subject = tiny_vqa_subject("prefix")
    t = traced(subject, [5])
    one, two = (t.pattern(f"image.{i}.self")[0].mean(0) / 2 + torch.eye(10) / 2 for i in range(2))
    start = torch.block_diag((two @ one)[1:], torch.eye(2))
    one, two = (t.pattern(f"decoder.{i}.self")[0].mean(0) / 2 + torch.eye(11) / 2 for i in range(2))
    flow = rollout(subject, t)
    torch.testing.assert_close(torch.cat([flow.sources, flow.decoder], 1), (two @ one @ start)[9:], atol=1e-6, rtol=0)


def test_nothing_mixes_in_an_encoder_without_attention():
    """Through a ResNet the rollout is the identity: what reaches the answer is cross-attention alone."""
    subject = SUBJECTS["caption"]()
    t = traced(subject, [5])
    one, two = (t.pattern(f"decoder.{i}.cross")[0].mean(0) for i in range(2))
    torch.testing.assert_close(rollout(subject, t).sources, one / 4 + two / 2, atol=1e-6, rtol=0)
    assert attention_names(subject)["image"] == []


def test_the_plain_map_of_each_way_to_read():
    subject = tiny_vilt_subject()
    t = traced(subject, [2])
    words = torch.stack([t.pattern(f"encoder.{i}.self")[0, :, :5].mean(1) for i in range(2)])  # (L, H, 15)
    torch.testing.assert_close(cross_maps(subject, t)[:, :, 0], words)
    torch.testing.assert_close(plain_map(subject, t).sources[0], words.mean((0, 1)))
    subject = tiny_vqa_subject("prefix")
    t = traced(subject, [5])
    pattern = torch.stack([t.pattern(f"decoder.{i}.self")[0, :, 9:] for i in range(2)])
    torch.testing.assert_close(cross_maps(subject, t)[..., 1:], pattern[..., :9])
    flow = plain_map(subject, t)
    torch.testing.assert_close(flow.decoder, pattern.mean((0, 1))[:, 9:])
    torch.testing.assert_close(flow.sources.sum(1) + flow.decoder.sum(1), torch.ones(2))
    subject = tiny_blip2_subject()  # queries stand for what they read
    t = traced(subject, [5])
    expected = t.pattern("decoder.1.self")[0, 2, 3:, :3] @ t.pattern("query.0.cross")[0].mean(0)
    torch.testing.assert_close(cross_maps(subject, t)[1, 2, :, :10], expected)
    assert cross_maps(subject, t)[..., 10:].abs().max() == 0


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
    image = Source("image", ("",) * 5, sinks=(0,), places=Places((2, 2), 4.0, 8))
    ahead = torch.zeros(1, 5, 5)
    ahead[0, :, 4] = 1.0  # every token reads the patch in the lower right corner
    expected = (math.sqrt(2) + 1 + 1 + 0) / 4
    assert float(mean_distance(ahead, image.places)) == pytest.approx(expected)
    assert float(mean_distance(torch.eye(3)[None], None)) == pytest.approx(0)
    assert float(mean_distance(torch.eye(3)[None].flip(-1), None)) == pytest.approx(4 / 3)


def test_statistics_cover_every_head_and_their_masses_sum_to_one(subject):
    t = traced(subject, answer_of(subject))
    statistics = head_statistics(subject, t)
    assert len(statistics) == 4 * len(every_attention(subject))
    for s in statistics:
        assert isinstance(s, HeadStatistics)
        assert s.image + s.text + s.sink == pytest.approx(1, abs=1e-5)
        assert 0 <= s.entropy <= 1 + 1e-5
        assert (s.distance is None) == s.name.endswith("cross")
    if isinstance(subject, ViLTSubject):
        own = next(s for s in statistics if s.name == "encoder.1.self" and s.head == 3)
        pattern = t.pattern("encoder.1.self")[0, 3]
        assert own.image == pytest.approx(float(pattern.mean(0)[6:].sum()), abs=1e-6)
        assert own.text == pytest.approx(float(pattern.mean(0)[1:4].sum()), abs=1e-6)
        places = Places((3, 3), 4.0, 8)
        assert own.distance == pytest.approx(float(mean_distance(pattern[None, 6:, 6:], places)), abs=1e-6)
    if len(subject.mixing) == 15 and not subject.prefix:
        cross = next(s for s in statistics if s.name == "decoder.0.cross" and s.head == 2)
        pattern = t.pattern("decoder.0.cross")[0, 2].mean(0)
        assert cross.image == pytest.approx(float(pattern[1:10].sum()), abs=1e-6)
        assert cross.text == pytest.approx(float(pattern[11:14].sum()), abs=1e-6)
        assert cross.sink == pytest.approx(float(pattern[[0, 10, 14]].sum()), abs=1e-6)


# ---------------------------------------------------------------------------------------------- lenses


@pytest.mark.parametrize("name", [name for name in SUBJECTS if "pair" not in name])  # which writes nothing
def test_the_last_lens_is_the_model(name):
    subject = SUBJECTS[name]()
    answer = answer_of(subject, 2)
    t = traced(subject, answer, *lens_taps(subject))
    expected = subject.log_probabilities(subject.logits(subject.prompt + answer[:-1]))
    lens = logit_lens(subject, t)
    assert len(lens) == subject.layers + 1
    torch.testing.assert_close(lens[-1], expected.detach(), atol=1e-5, rtol=0)
    assert (lens[0] - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", [name for name in SUBJECTS if name != "vilt" and "pair" not in name])
def test_attributions_sum_to_the_logit(name):
    subject = SUBJECTS[name]()
    t = traced(subject, [5, 6, 7], *lens_taps(subject))
    logits = subject.logits(subject.prompt + [5, 6]).detach()
    kinds = ("self",) if subject.prefix else ("self", "cross")
    for row, token in [(0, 5), (2, 7)]:
        parts = logit_attribution(subject, t, row, token)
        assert {kind: heads.shape for kind, heads in parts.heads.items()} == dict.fromkeys(kinds, (2, 4))
        expected = float(logits[row, token] - logits[row].mean())
        total = sum(x.sum() for x in parts.heads.values()) + parts.mlps.sum() + parts.embedding + parts.biases
        assert float(total) == pytest.approx(expected, abs=2e-5)


def test_the_example_of_the_page_runs():
    """docs/attention.md, on a single stream."""
    page = (Path(__file__).parent.parent / "docs" / "attention.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "ViLTSubject" in block)
    given = {"model": tiny_vilt(), "pixel_values": torch.randn(1, 3, 24, 24)}
    names = given | {"question_ids": QUESTION_IDS, "question_labels": QUESTION}
    exec(compile(code, "attention.md", "exec"), names)
    assert names["answer"] == names["subject"].generate()
    assert names["relevancy"](names["subject"], names["answer"]).sources.shape == (1, 15)
