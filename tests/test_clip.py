"""CLIP and SigLIP against the reference, through files that it saved: embeddings, logits, towers alone, old layouts."""

import json
import math

import pytest
import torch
import transformers as hf
from clip_helpers import END, captions, small
from helpers import STD, assert_close, saved
from safetensors.torch import load_file, save_file

from vqa_scratch.errors import UserError
from vqa_scratch.models import CLIP, CLIPConfig, CLIPText, CLIPTextConfig, ViT, ViTConfig
from vqa_scratch.models.clip import logits_of
from vqa_scratch.models.released import image_encoder
from vqa_scratch.nn.states import Places

no_grad = torch.no_grad()
_BLOCKS = {"num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 50}
_IMAGE = _BLOCKS | {"hidden_size": 36, "image_size": 24, "patch_size": 6}
_TEXT = _BLOCKS | {"hidden_size": 39, "vocab_size": 60, "max_position_embeddings": 20}
# SigLIP's images and texts must become equally wide.
_KINDS = {
    "clip": (hf.CLIPModel, {"projection_dim": 17}, {"eos_token_id": END}),
    "siglip": (hf.SiglipModel, {}, {"projection_size": 36}),
}


def config_of(kind, image=(), text=(), **top):
    model, fields, words = _KINDS[kind]
    return model.config_class(
        vision_config=_IMAGE | dict(image), text_config=_TEXT | words | dict(text), **fields | top
    )


def drawn(model, folder):
    """The reference with every weight drawn as in the other tests: its own start leaves it nearly linear."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=STD)
            elif "class_embedding" in name:
                parameter.normal_()
    return saved(model, folder)


def reference(kind, folder, **changes):
    return drawn(_KINDS[kind][0](config_of(kind, **changes)), folder)


def compare(ours, theirs, pixels, ids, mask=None):
    expected = theirs(input_ids=ids, pixel_values=pixels, attention_mask=None if mask is None else mask.long())
    out = ours(pixels, ids, mask)
    assert_close(out.image_embeds, expected.image_embeds)
    assert_close(out.text_embeds, expected.text_embeds)
    assert_close(
        out.logits_per_image, expected.logits_per_image, tolerance=1e-5 * expected.logits_per_image.abs().max()
    )
    assert expected.image_embeds.std(0).max() > 0.02 and expected.text_embeds.std(0).max() > 0.02
    return out


# --- parity -----------------------------------------------------------------------------------------------------------


@no_grad
@pytest.mark.parametrize("kind", _KINDS)
def test_a_model_and_back(tmp_path, kind):
    theirs = reference(kind, tmp_path / "theirs")
    ours = CLIP.from_pretrained(tmp_path / "theirs")
    pixels, (ids, mask) = torch.randn(3, 3, 24, 24), captions()
    for some in (None, mask):
        out = compare(ours, theirs, pixels, ids, some)
    assert out.logits_per_image.shape == (3, 4)
    for embeds in out[:2]:
        torch.testing.assert_close(embeds.norm(dim=1), torch.ones(len(embeds)))
    ours.save_pretrained(tmp_path / "ours")
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"] and not info["mismatched_keys"]
    compare(ours, back.eval(), pixels, ids)
    assert CLIP.from_pretrained(tmp_path / "ours").config == ours.config
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert hf.AutoConfig.from_pretrained(tmp_path / "ours").model_type == written["model_type"] == kind


@no_grad
@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("size", [(36, 36), (12, 30)])
def test_images_of_other_sizes(tmp_path, kind, size):
    theirs, pixels = reference(kind, tmp_path), torch.randn(2, 3, *size)
    expected = theirs.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
    assert_close(CLIP.from_pretrained(tmp_path).embed_images(pixels), expected / expected.norm(dim=-1, keepdim=True))


@no_grad
def test_defaults_are_those_of_the_reference(tmp_path):
    """Of every field that a config.json leaves out; the sizes of a whole tower are compared, not built."""
    for kind in _KINDS:
        plain = {"model_type": kind, "vision_config": {}, "text_config": {}}
        config, theirs = CLIPConfig.from_hf(plain), _KINDS[kind][0].config_class()
        written = config.to_hf()
        for part in ("vision_config", "text_config"):
            for name, value in written[part].items():
                if name not in ("architectures", "model_type"):
                    assert value == getattr(getattr(theirs, part), name), f"{kind}: {part}.{name}"
        assert config.projection_dim == (512 if kind == "clip" else 768)
        assert CLIPConfig.from_hf({"model_type": kind}) == config == CLIPConfig.from_hf(written)
    assert CLIPConfig() == CLIPConfig.from_hf({"model_type": "clip"})


# --- the end token ----------------------------------------------------------------------------------------------------


@no_grad
def test_the_end_token_of_old_files_is_the_highest_id(tmp_path):
    theirs = reference("clip", tmp_path, text={"eos_token_id": 2})
    ours = CLIP.from_pretrained(tmp_path)
    for pad in (1, 0, END):  # OpenAI pads with 0, others with the end token
        compare(ours, theirs, torch.randn(2, 3, 24, 24), captions(pad=pad)[0])
    ids, _ = captions()
    ids[2, 3] = 5
    with pytest.raises(UserError, match="text 2 has no end token .the highest id.: cut it before"):
        ours.embed_texts(ids)


@no_grad
def test_the_first_end_token_counts_and_one_is_needed(tmp_path):
    theirs = reference("clip", tmp_path)
    ours = CLIP.from_pretrained(tmp_path)
    ids, mask = captions()
    ids[1, 5] = ids[1, 17] = 59  # a higher id than the end token's: an added one, before and after it
    compare(ours, theirs, torch.randn(2, 3, 24, 24), ids)
    padded = ids.masked_fill(~mask, END)
    assert_close(ours.embed_texts(padded), ours.embed_texts(ids))  # causal: what follows the end is not seen
    ids[3, 1] = 7
    with pytest.raises(UserError, match="text 3 has no end token .id 58.: cut it before the end token is added"):
        ours.embed_texts(ids)
    with pytest.raises(ValueError, match="21 tokens, but the position table serves 20"):
        ours.embed_texts(torch.full((1, 21), END))


@no_grad
def test_siglip_reads_its_padding(tmp_path):
    """The trap of its users: another length, or a mask, is another embedding."""
    theirs = reference("siglip", tmp_path)
    ours = CLIP.from_pretrained(tmp_path)
    ids, mask = captions()
    whole = ours.embed_texts(ids)
    assert_close(whole, torch.nn.functional.normalize(theirs.get_text_features(ids).pooler_output, dim=-1))
    for changed in (ours.embed_texts(ids[2:3, :4]), ours.embed_texts(ids[2:3], mask[2:3])):
        assert (changed - whole[2]).abs().max() > 0.01
    assert ours.text.longest == 20


# --- old files and towers alone ---------------------------------------------------------------------------------------


@no_grad
def test_files_of_old_releases(tmp_path):
    """Buffers among the weights, and sizes in `*_config_dict` that override the others."""
    theirs = reference("clip", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {f"{x}_model.embeddings.position_ids": torch.arange(20)[None] for x in ("text", "vision")}
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    for part in ("text", "vision"):
        config[f"{part}_config_dict"] = config[f"{part}_config"]
        config[f"{part}_config"] = config[f"{part}_config"] | {"num_hidden_layers": 7, "hidden_size": 999}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert hf.CLIPModel.from_pretrained(tmp_path).config.text_config.num_hidden_layers == 3
    compare(CLIP.from_pretrained(tmp_path), theirs, torch.randn(2, 3, 24, 24), captions()[0])
    nulls = {f"{part}_config_dict": None for part in ("text", "vision")}
    changed = CLIPConfig.from_hf(
        config | nulls | {"vision_config": _IMAGE | {"num_hidden_layers": 7}, "text_config": _TEXT}
    )
    assert changed.image.layers == 7
    # what the older dictionary leaves out is the default, whatever the other says
    older = CLIPConfig.from_hf(config | {"text_config_dict": {"hidden_size": 768, "num_attention_heads": 12}})
    assert (older.text.layers, older.text.eos_id, older.text.dim) == (12, 49407, 768)


TOWERS = {
    "clip": (hf.CLIPVisionModel, hf.CLIPVisionConfig, 1),
    "clip, with its projection": (hf.CLIPVisionModelWithProjection, hf.CLIPVisionConfig, 1),
    "siglip": (hf.SiglipVisionModel, hf.SiglipVisionConfig, 0),
}


@no_grad
@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("name", TOWERS)
def test_an_image_tower_alone(tmp_path, name, prefixed):
    """With and without `vision_model.` in front of its keys: releases of the reference differ in it."""
    kind, config, prefix = TOWERS[name]
    theirs = drawn(kind(config(**_IMAGE)), tmp_path)
    tensors = {
        key.removeprefix("vision_model."): value for key, value in load_file(tmp_path / "model.safetensors").items()
    }
    if prefixed:
        tensors = {key if key.startswith("visual_") else f"vision_model.{key}": value for key, value in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    ours = image_encoder(tmp_path)
    assert isinstance(ours, ViT) and ours.prefix_tokens == prefix and ours.dim == 36
    for height, width in ((24, 24), (12, 30)):
        pixels = torch.randn(2, 3, height, width)
        expected = theirs(pixels, interpolate_pos_encoding=(height, width) != (24, 24)).last_hidden_state
        states = ours.states(pixels)
        assert_close(states.tokens, expected)
        assert states.places == Places((height // 6, width // 6), 3.0, 6) and states.prefix_tokens == prefix
    ours.save_pretrained(tmp_path / "ours")
    assert ViT.from_pretrained(tmp_path / "ours").config == ours.config
    plain = hf.SiglipVisionModel if prefix == 0 else hf.CLIPVisionModel
    back, info = plain.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert all(key.startswith(("post_layernorm", "head.")) for key in info["missing_keys"])
    assert_close(back.eval()(pixels, interpolate_pos_encoding=True).last_hidden_state, expected)


@no_grad
@pytest.mark.parametrize("kind", _KINDS)
def test_the_image_tower_of_a_whole_model(tmp_path, kind):
    theirs, pixels = reference(kind, tmp_path), torch.randn(2, 3, 24, 24)
    ours = image_encoder(tmp_path)
    assert isinstance(ours, ViT)
    assert_close(ours(pixels), theirs.vision_model(pixels).last_hidden_state)


@no_grad
@pytest.mark.parametrize("kind", _KINDS)
def test_a_text_tower_alone(tmp_path, kind):
    model = {"clip": hf.CLIPTextModel, "siglip": hf.SiglipTextModel}[kind]
    theirs = drawn(model(model.config_class(**_TEXT | _KINDS[kind][2])), tmp_path)
    ours, (ids, mask) = CLIPText.from_pretrained(tmp_path), captions()
    expected = theirs(ids, attention_mask=mask.long())
    assert_close(ours.states(ids, mask).tokens, expected.last_hidden_state, where=mask)
    if kind == "clip":
        assert_close(ours(ids, mask), expected.pooler_output)


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_named(tmp_path):
    plain = {"vision_config": _IMAGE, "text_config": _TEXT}
    with pytest.raises(UserError, match="type 'blip', expected clip, siglip"):
        CLIPConfig.from_hf(plain | {"model_type": "blip"})
    with pytest.raises(UserError, match="a siglip makes texts 39 wide .* and images 36 .* must be equal"):
        CLIPConfig.from_hf(plain | {"model_type": "siglip"})
    with pytest.raises(UserError, match="image tower of a clip must be a clip_vision_model, not a vit"):
        CLIPConfig.from_hf({"model_type": "clip", "vision_config": {"model_type": "vit"}})
    with pytest.raises(UserError, match="'text_config' is 3, not"):
        CLIPConfig.from_hf({"model_type": "clip", "text_config": 3})
    with pytest.raises(UserError, match="layout must be one of clip_text_model, siglip_text_model, got 'bert'"):
        CLIPTextConfig(layout="bert")
    theirs = reference("clip", tmp_path)
    tensors = theirs.state_dict() | {"logit_scale": torch.tensor(math.nan)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="logit_scale"):
        CLIP.from_pretrained(tmp_path)
    save_file({key: x for key, x in tensors.items() if "class_emb" not in key}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="does not fit CLIP: missing: vision_model.embeddings.class_embedding"):
        CLIP.from_pretrained(tmp_path)


def test_a_zero_vector_is_similar_to_nothing():
    """Where the reference divides by zero: a logit of 0 (and SigLIP's bias), and finite gradients."""
    for kind, logit in (("clip", 0.0), ("siglip", -10.0)):
        model = small(kind)
        with torch.no_grad():
            model.text_head.weight.zero_()
            if model.text_head.bias is not None:
                model.text_head.bias.zero_()
        out = model(torch.randn(2, 3, 12, 12), captions()[0])
        assert (out.text_embeds == 0).all() and (out.logits_per_image == logit).all()
        out.logits_per_image.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# --- the start --------------------------------------------------------------------------------------------------------


def test_openai_start():
    """Standard deviations against the closed forms, at a width where a few percent separate them."""
    dim, layers = 96, 3
    sizes = {"dim": dim, "layers": layers, "heads": 4, "hidden": 4 * dim}
    images = ViTConfig(image_size=48, patch_size=6, layout="clip_vision_model", **sizes)
    model = CLIP(CLIPConfig(images, CLIPTextConfig(2000, 77, **sizes), projection_dim=80))
    text, image, added = model.text, model.image, dim**-0.5 * (2 * layers) ** -0.5
    wanted = {
        text.tokens.weight: 0.02,
        text.positions.weight: 0.01,
        model.text_head.weight: dim**-0.5,
        model.image_head.projection.weight: dim**-0.5,
        image.positions: dim**-0.5,
        image.patch_embed.weight: (3 * 3 * 6 * 6) ** -0.5,  # uniform within 1 / sqrt(inputs)
    }
    for block in text.blocks:
        wanted |= {block.attn.qkv.weight: dim**-0.5, block.attn.out.weight: added}
        wanted |= {block.mlp.up.weight: (2 * dim) ** -0.5, block.mlp.down.weight: added}
    for block in image.blocks:
        wanted |= {block.attn.qkv.weight: (2 / (4 * dim)) ** 0.5, block.attn.out.weight: (3 * dim) ** -0.5}
        wanted |= {block.mlp.up.weight: (3 * dim) ** -0.5, block.mlp.down.weight: (12 * dim) ** -0.5}
    for weight, std in wanted.items():
        assert weight.std().item() == pytest.approx(std, rel=0.05), weight.shape
    assert image.cls_token.std().item() == pytest.approx(dim**-0.5, rel=0.3)
    for block in (*text.blocks, *image.blocks):
        assert not block.attn.qkv.bias.any() and not block.attn.out.bias.any()
    assert model.logit_scale.item() == pytest.approx(2.6592, abs=1e-4) and model.logit_bias is None
    siglip = small("siglip")
    assert (siglip.logit_scale.exp().item(), siglip.logit_bias.item()) == (pytest.approx(10), -10)


@no_grad
def test_logits_are_in_fp32_whatever_computes_the_towers():
    model = small()
    pixels, ids = torch.randn(2, 3, 12, 12), captions()[0]
    with torch.autocast("cpu", torch.bfloat16):
        out = model(pixels, ids)
    assert {x.dtype for x in out} == {torch.float32}
    assert torch.equal(out.logits_per_image, logits_of(out.image_embeds, out.text_embeds, model.logit_scale))
    assert_close(out.image_embeds, model.embed_images(pixels), tolerance=0.02)  # bf16 keeps 8 bits
