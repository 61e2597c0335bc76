"""Rebuilt patterns against the eager `output_attentions` of the reference models, through saved files.

Tolerance 1e-6: weights are at most 1, and fp32 rounds scores of the size met here to a few 1e-7.
"""

import pytest
import torch
import transformers
from helpers import STD, saved

from vqa_scratch.models import CLIP, GPT2, T5, Bert, ViLTClassifier, ViT
from vqa_scratch.models.released import image_encoder
from vqa_scratch.study import trace
from vqa_scratch.study.subject import ViLTSubject

EAGER = {"attn_implementation": "eager", "initializer_range": STD}


def check(t, prefix, expected, kind="self"):
    """Every layer's pattern, and the certificate."""
    for layer, theirs in enumerate(expected):
        ours = t.pattern(f"{prefix}.{layer}.{kind}")
        worst = (ours - theirs).abs().max().item()
        assert ours.shape == theirs.shape and worst <= 1e-6, f"layer {layer}: {worst:.2g}"
        assert theirs.std() > 0.01, "the reference is trivially uniform"
    assert t.certificate().worst <= 1e-5


@torch.no_grad()
def test_vit(tmp_path):
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        **EAGER,
    )  # fmt: skip
    theirs = saved(transformers.ViTModel(config, add_pooling_layer=False), tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    model = ViT.from_pretrained(tmp_path)
    with trace(model, "image.*.self") as t:
        model(pixels)
    check(t, "image", theirs(pixels, output_attentions=True).attentions)


@torch.no_grad()
def test_distilbert_with_padding(tmp_path):
    config = transformers.DistilBertConfig(
        vocab_size=50, dim=32, n_layers=3, n_heads=4, hidden_dim=48, max_position_embeddings=24, **EAGER
    )
    theirs = saved(transformers.DistilBertModel(config), tmp_path)
    ids = torch.randint(1, 50, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    model = Bert.from_pretrained(tmp_path)
    with trace(model) as t:
        model(ids, mask)
    check(t, "text", theirs(ids, attention_mask=mask, output_attentions=True).attentions)


@torch.no_grad()
def test_gpt2_self_and_cross(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=64, n_embd=32, n_layer=3, n_head=4, add_cross_attention=True, **EAGER
    )
    theirs = saved(transformers.GPT2LMHeadModel(config), tmp_path)
    ids, states = torch.randint(0, 50, (2, 41)), torch.randn(2, 9, 32)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 5:] = False
    expected = theirs(
        ids, encoder_hidden_states=states, encoder_attention_mask=mask.long(), output_attentions=True, use_cache=False
    )
    model = GPT2.from_pretrained(tmp_path)
    with trace(model, "decoder.*.self", "decoder.*.cross") as t:
        model(ids, encoder_hidden_states=states, encoder_attention_mask=mask)
    check(t, "decoder", expected.attentions)
    check(t, "decoder", expected.cross_attentions, "cross")


@torch.no_grad()
@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_t5(tmp_path, feed_forward):
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
        feed_forward_proj=feed_forward, decoder_start_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    reference = transformers.T5ForConditionalGeneration(config)
    for parameter in reference.parameters():  # scores are not scaled: keep them at the size of trained ones
        parameter.mul_(0.3 if parameter.ndim == 2 else 1.0)
    theirs = saved(reference, tmp_path)
    ids, decoder_ids = torch.randint(2, 50, (2, 15)), torch.randint(2, 50, (2, 41))
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    expected = theirs(
        input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids, output_attentions=True, use_cache=False
    )
    model = T5.from_pretrained(tmp_path)
    with trace(model) as t:
        model(ids, mask, decoder_ids)
    check(t, "encoder", expected.encoder_attentions)
    check(t, "decoder", expected.decoder_attentions)
    check(t, "decoder", expected.cross_attentions, "cross")


@torch.no_grad()
@pytest.mark.parametrize("size", [(24, 24), (16, 40)])
def test_vilt(tmp_path, monkeypatch, size):
    """The reference draws the order of the patches by lot; here the lot is their own order."""
    config = transformers.ViltConfig(
        vocab_size=50, max_position_embeddings=12, hidden_size=24, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=40, image_size=24, patch_size=8, **EAGER,
    )  # fmt: skip
    theirs = saved(transformers.ViltForQuestionAnswering(config), tmp_path)
    monkeypatch.setattr(torch, "multinomial", lambda weights, number, **more: torch.arange(int(number)))
    pixels, ids = torch.randn(1, 3, *size), torch.randint(1, 50, (1, 7))
    expected = theirs(input_ids=ids, pixel_values=pixels, output_attentions=True)
    model = ViLTClassifier.from_pretrained(tmp_path)
    subject = ViLTSubject(model, pixels, ids[0].tolist(), [str(i) for i in range(7)], (0,))
    with trace(model, "encoder.*.self") as t:
        answer = subject.generate()
    check(t, "encoder", expected.attentions)
    assert answer == [int(expected.logits.argmax())]
    assert subject.image[0].grid == (size[0] // 8, size[1] // 8)


@torch.no_grad()
@pytest.mark.parametrize("registers", [False, True])
def test_dinov2(tmp_path, registers):
    kind = transformers.Dinov2WithRegistersModel if registers else transformers.Dinov2Model
    config = kind.config_class(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, mlp_ratio=2, **EAGER
    )
    theirs = saved(kind(config), tmp_path)
    pixels = torch.randn(2, 3, 24, 40)
    model = image_encoder(tmp_path)
    with trace(model, "image.*.self") as t:
        model(pixels)
    check(t, "image", theirs(pixels, output_attentions=True).attentions)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_both_towers_of_a_clip(tmp_path, kind):
    """With padded texts; and the probe that pools a SigLIP's image."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    images = sizes | {"image_size": 32, "patch_size": 8, "attn_implementation": "eager"}
    words = sizes | {
        "vocab_size": 50,
        "max_position_embeddings": 14,
        "attn_implementation": "eager",
        "eos_token_id": 49,
    }
    family = {"clip": transformers.CLIPModel, "siglip": transformers.SiglipModel}[kind]
    theirs = family(family.config_class(vision_config=images, text_config=words, attn_implementation="eager"))
    for parameter in theirs.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=STD)
    theirs = saved(theirs, tmp_path)
    pixels, ids, mask = torch.randn(2, 3, 32, 32), torch.randint(1, 49, (3, 14)), torch.ones(3, 14, dtype=torch.long)
    ids[:, -1] = ids[1, 8] = 49
    mask[1, 9:] = 0
    model = CLIP.from_pretrained(tmp_path)
    with trace(model) as t:
        model(pixels, ids, mask)
    shown = {"output_attentions": True}
    image = theirs.vision_model(pixels, **shown)
    check(t, "image", image.attentions)
    check(t, "text", theirs.text_model(ids, attention_mask=mask, **shown).attentions)
    if kind == "siglip":
        head, states = theirs.vision_model.head, image.last_hidden_state
        probe = head.probe.expand(2, -1, -1)
        expected = head.attention(probe, states, states, need_weights=True, average_attn_weights=False)[1]
        check(t, "probe", [expected], "cross")
    assert t.certificate().attentions == (7 if kind == "siglip" else 6)
