"""Prompts with an image in them, and pairs: which pixels each token is, and what a similarity is made of."""

import pytest
import torch
from study_helpers import SUBJECTS, tiny_idefics_subject

from vqa_scratch.models.clip import ClassTokenHead
from vqa_scratch.study import trace
from vqa_scratch.study.analysis import every_attention, flows
from vqa_scratch.study.lens import frozen_norm, lens_taps, logit_attribution
from vqa_scratch.study.opened import Opened
from vqa_scratch.study.places import intervals
from vqa_scratch.study.record import take_apart
from vqa_scratch.study.report import _heads_in_order


@pytest.mark.parametrize("name", ["llava", "fuyu"])
def test_logits_are_those_of_the_whole_prompt(name):
    subject = SUBJECTS[name]()
    pixels = subject.pixel_values if name == "llava" else subject.model.patches(subject.pixel_values)
    whole = subject.model(torch.tensor([[*subject.ids, *subject.prompt, 5, 6]]), None, pixels)
    torch.testing.assert_close(subject.logits([*subject.prompt, 5, 6]), whole[0, -3:])
    said = subject.generate()  # through the cache
    logits = subject.logits(subject.prompt + said[:-1])
    assert logits.argmax(-1).tolist() == said


@pytest.mark.parametrize("name", ["llava", "fuyu"])
def test_a_token_is_drawn_on_the_pixels_that_it_is(name):
    """With weights that read one token of the prefix alone, the gradient of a logit fills that token's square and is
    zero outside; a word or a newline has none."""
    subject, seen = SUBJECTS[name](), 0
    (places, where), size = subject.image, subject.pixel_values.shape[2:]
    squares = [intervals(places, axis, size[axis]) for axis in (0, 1)]
    for key in range(subject.prefix):
        subject.pixel_values.requires_grad_().grad = None
        with trace(subject.model, record=False) as t:
            for attention in every_attention(subject):

                def alone(pattern, call, reads=attention == "decoder.0.self", key=key):
                    itself = torch.eye(pattern.shape[-1]).expand_as(pattern).clone()
                    if reads:
                        itself[..., -1, :] = torch.eye(pattern.shape[-1])[key]
                    return itself

                t.replace(f"{attention}.pattern", alone)
            subject.logits(subject.prompt)[-1, 5].backward()
        touched = subject.pixel_values.grad[0].abs().sum(0) > 0
        token = int(subject.mixing[key].argmax()) - where.start
        expected = torch.zeros(size, dtype=torch.bool)
        if token >= 0 and key in subject.mixing[:, where].sum(1).nonzero():
            (top, bottom), (left, right) = (
                squares[axis][i].int().tolist() for axis, i in enumerate(divmod(token, places.grid[1]))
            )
            expected[top:bottom, left:right] = True
            seen += 1
        assert torch.equal(touched, expected), key
    assert seen == places.grid[0] * places.grid[1]


def test_words_and_places_are_the_prompt_in_another_order():
    llava, fuyu = SUBJECTS["llava"](), SUBJECTS["fuyu"]()
    assert llava.sources[0].labels == ("<s>", "see", "what", "is") and llava.sources[0].sinks == (0,)
    assert llava.mixing.argmax(1).tolist() == [0, 1, *range(5, 14), 2, 3], "the class token, 4, is not in the prompt"
    assert llava.sources[1].attentions == ("image.0.self", "image.1.self"), "it reads the states before the last block"
    words, image = fuyu.sources
    assert words.labels == ("<1>", "<5>", "<6>") and image.labels[:4] == (
        *("newline 1", "newline 2", "newline 3"),
        "patch 1,1",
    )
    assert image.sinks == (0, 1, 2) and (image.places.grid, image.places.first, image.places.stride) == ((3, 2), 4.0, 8)
    assert fuyu.mixing.argmax(1).tolist() == [6, 7, 3, 8, 9, 4, 10, 11, 5, 0, 1, 2]
    assert (llava.mixing.sum(1) == 1).all() and (fuyu.mixing.sum(1) == 1).all()


def test_gated_layers_before_some_blocks():
    """Words before the image read nothing; blocks without such a layer add nothing by cross-attention."""
    subject = tiny_idefics_subject(2, (1, 5, 29, 6))
    assert subject.attentions == ["decoder.0.cross", "decoder.0.self", "decoder.1.self"]
    assert subject.reading == ["decoder.0.cross"]
    with trace(subject.model, *every_attention(subject), *lens_taps(subject)) as t:
        answer = subject.generate(3)
    assert t.certificate().worst <= 1e-5
    found = flows(subject, t, answer)
    for flow in found.values():
        assert flow.sources[:2].max() == 0 < flow.sources[3:].max()
    logits = subject.logits([*subject.prompt, *answer[:-1]]).detach()
    whole = subject.model(
        torch.tensor([[*subject.prompt, *answer[:-1]]]),
        None,
        subject.pixel_values[:, None],
        (torch.arange(3 + len(answer)) > 1)[None, :, None],
    )
    torch.testing.assert_close(logits, whole[0])
    row, token = 3, answer[0]
    parts = logit_attribution(subject, t, row, token)
    total = sum(x.sum() for x in parts.heads.values()) + parts.mlps.sum() + parts.embedding + parts.biases
    assert float(total) == pytest.approx(float(logits[row, token] - logits[row].mean()), abs=2e-5)
    assert parts.heads["cross"].shape == (2, 4) and not parts.heads["cross"][1].any()
    shown = Opened("idefics", subject, "", None, ("", "", "", ""), str, str)
    assert _heads_in_order(take_apart(shown))[0][0] == 0


# ---------------------------------------------------------------------------------------------------- pairs


def studied(subject):
    """A trace of a pair with the states that its parts are made of."""
    states = ("image.0.resid_pre", "image.*.mlp.out", "image.1.resid_post") if subject.prefix else ("probe.0.mlp.out",)
    with trace(subject.model, *every_attention(subject), *states) as t:
        answer = subject.generate()
    return t, answer


@pytest.mark.parametrize("name", ["pair", "probed pair"])
@torch.no_grad()
def test_parts_and_the_rest_are_the_similarity(name):
    """The rest by itself: of a CLIP what the class token starts from, MLPs, biases; of a SigLIP bias and MLP."""
    subject = SUBJECTS[name]()
    t, answer = studied(subject)
    similar, head = subject.logits(subject.prompt)[0], subject.model.image_head
    assert answer == [0, 1, 2] and similar.shape == (3,)
    parts = subject.more_flows(t)["parts"].sources
    if isinstance(head, ClassTokenHead):
        blocks, last = subject.model.image.blocks, t["image.1.resid_post"][0, 0]
        rest = t["image.0.resid_pre"][0, 0] + sum(
            t[f"image.{i}.mlp.out"][0, 0] + blocks[i].attn.out.bias for i in (0, 1)
        )
        rest = head.projection(frozen_norm(head.norm, last)(rest) + head.norm.bias)
    else:
        rest = t["probe.0.mlp.out"][0, 0] + head.cross.out.bias
    length = head(subject.model.image(subject.pixel_values)).norm()
    # Sums of about 100 fp32 products of size 1 to 10, of which the result is a few tenths.
    torch.testing.assert_close(parts.sum(1) + subject.texts @ rest / length, similar, atol=1e-5, rtol=0)
    assert parts.abs().max() > 1e-2 and parts[:, len(subject.sources[0]) :].abs().max() == 0


@pytest.mark.parametrize("name", ["pair", "probed pair"])
@torch.no_grad()
def test_nearness_is_each_token_as_if_it_were_the_image(name):
    subject = SUBJECTS[name]()
    t, _ = studied(subject)
    near, (_, where) = subject.more_flows(t)["nearness"].sources, subject.image
    tokens, texts, ours = subject.model.image(subject.pixel_values), subject.texts, []
    for token in range(tokens.shape[1]):
        vector = subject.model.image_head(tokens[:, token : token + 1])[0]
        ours.append(texts @ vector / vector.norm())
    ours = torch.stack(ours, 1)
    torch.testing.assert_close(near[:, : ours.shape[1]], ours - ours[:, where].mean(1, keepdim=True))
    if subject.prefix:  # the class token is what the image is
        torch.testing.assert_close(ours[:, 0], subject.logits(subject.prompt)[0])


def test_a_text_is_read_at_its_end_token():
    clip, siglip = SUBJECTS["pair"](), SUBJECTS["probed pair"]()
    assert (clip.sources[1].asked, siglip.sources[1].asked) == (4, 5)
    assert (clip.reading, siglip.reading) == (["image.0.self", "image.1.self"], ["probe.0.cross"])
