"""Texts as a CLIP or SigLIP expects them, and labels as classes: against the definition, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from clip_helpers import small

from vqa_scratch.data.text import train_wordpiece
from vqa_scratch.errors import UserError
from vqa_scratch.models import CLIP, CLIPConfig, CLIPTextConfig, ViTConfig
from vqa_scratch.systems.clip_texts import classify, embed_labels, embed_texts, text_ids

WORDS = train_wordpiece(["a photo of a red square and the blue circle ."] * 3, 100)
TEMPLATES = ("a photo of a {}.", "the {}", "{} and a circle")


def model_for(kind):
    sizes = {"dim": 24, "layers": 2, "heads": 2, "hidden": 48}
    torch.manual_seed(0)
    images = ViTConfig(image_size=12, patch_size=4, layout=f"{kind}_vision_model", **sizes)
    texts = CLIPTextConfig(len(WORDS), 16, eos_id=WORDS.sep_id, layout=f"{kind}_text_model", **sizes)
    return CLIP(CLIPConfig(images, texts, 24, kind)).eval()


@torch.no_grad()
def test_texts_are_padded_as_in_training():
    texts = ["red", "a photo of a red square " * 9, ""]
    clip, siglip = model_for("clip"), model_for("siglip")
    before = WORDS.truncated
    ids = text_ids(clip, WORDS, texts)
    assert ids.shape == (3, 16) and (ids == WORDS.sep_id).any(1).all() and ids[1, -1] == WORDS.sep_id
    assert WORDS.truncated == before + 1
    assert text_ids(clip, WORDS, ["red"]).shape == (1, 3)  # padding never counts: as short as can be
    assert text_ids(siglip, WORDS, ["red"]).tolist() == [[*WORDS.encode("red"), *[WORDS.pad_id] * 13]]
    for model in (clip, siglip):  # so a text is the same alone and in company
        torch.testing.assert_close(embed_texts(model, WORDS, texts)[:1], embed_texts(model, WORDS, ["red"]))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_labels_are_averaged_over_templates(kind):
    model, labels = model_for(kind), ["red square", " blue circle "]
    embeds = embed_labels(model, WORDS, labels, TEMPLATES)
    for row, label in zip(embeds, labels, strict=True):
        each = [model.embed_texts(text_ids(model, WORDS, [t.replace("{}", label.strip())]))[0] for t in TEMPLATES]
        torch.testing.assert_close(each[0].norm(), torch.tensor(1.0))
        torch.testing.assert_close(row, F.normalize(torch.stack(each).mean(0), dim=0))
    pixels = torch.randn(5, 3, 12, 12)
    logits = model.logit_scale.exp() * model.embed_images(pixels) @ embeds.T
    expected = logits.softmax(1) if kind == "clip" else (logits - 10).sigmoid()
    torch.testing.assert_close(classify(model, pixels, embeds), expected)


def test_hundreds_of_texts_go_in_parts():
    model, texts = model_for("clip"), [f"red {i}" for i in range(600)]
    with torch.no_grad():
        expected = model.embed_texts(text_ids(model, WORDS, texts))
    torch.testing.assert_close(embed_texts(model, WORDS, texts), expected)


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        ([], TEMPLATES, "labels must be texts, at least one and none empty; got 0"),
        (["a", " "], TEMPLATES, "at least one and none empty; got 2"),
        (["a", "b", " a"], TEMPLATES, "labels must differ; given more than once: a"),
        (["a"], [], "a template has {} once, where the label goes; got no template"),
        (["a"], ["a photo", "{}{}"], "where the label goes; got 'a photo', '{}{}'"),
    ],
)
def test_labels_that_are_refused(labels, templates, message):
    with pytest.raises(UserError) as caught:
        embed_labels(small(), WORDS, labels, templates)
    assert message in str(caught.value)
