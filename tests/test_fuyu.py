"""Fuyu against the reference model and processor, through files they saved and our loader read, and back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from blip2_helpers import change_config
from helpers import assert_close
from image_text_helpers import END, PLACE, TEXT, fuyu_reference, padded, words
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

from vqa_scratch.data.fuyu_images import FuyuImageProcessor
from vqa_scratch.errors import UserError
from vqa_scratch.generate import GenerationOptions, generate
from vqa_scratch.models import Fuyu, FuyuConfig

no_grad = torch.no_grad()
NEWLINE, PATCH = 58, 2
SIZES = ((4, 6), (2, 2), (6, 2))  # pixels
ROTARY = {"rope_theta": 25_000.0, "rope_type": "default", "partial_rotary_factor": 0.5}


def prompts(model: Fuyu, sizes=SIZES, lengths=(9, 40, 2)):
    """Ids and mask (3, T) of an image of each size and a text, and the patches of all."""
    images = [torch.randn(1, 3, *size) for size in sizes]
    rows = [model.rows(*size, NEWLINE) + words(n) for size, n in zip(sizes, lengths, strict=True)]
    return *padded(rows), torch.cat([model.patches(image)[0] for image in images])


@no_grad
@pytest.mark.parametrize("text", [{}, {"qk_layernorm": False}, {"rope_parameters": ROTARY}], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_back(tmp_path, text, tied):
    """Images of three sizes in one batch; and each alone."""
    theirs = fuyu_reference(tmp_path / "theirs", PATCH, text, tie_word_embeddings=tied)
    ours = Fuyu.from_pretrained(tmp_path / "theirs")
    ids, mask, patches = prompts(ours)
    wanted = theirs(input_ids=ids, attention_mask=mask, pixel_values=patches).logits
    assert_close(ours(ids, mask, patches), wanted, where=mask)
    start = 0
    for row, (height, width) in enumerate(SIZES):
        end = start + height * width // PATCH**2
        own = ids[row][mask[row].bool()][None]
        alone = theirs(input_ids=own, pixel_values=patches[None, start:end]).logits
        assert_close(ours(own, None, patches[start:end]), alone)
        assert_close(alone[0], wanted[row, mask[row].bool()])
        start = end
    assert (ours(ids, mask, patches.flip(0)) - wanted)[mask.bool()].abs().max() > 0.1, "nothing depends on the image"

    ours.save_pretrained(tmp_path / "ours")
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert_close(back.eval()(input_ids=ids, attention_mask=mask, pixel_values=patches).logits, wanted, where=mask)
    files = [tmp_path / name / "model.safetensors" for name in ("ours", "theirs")]
    assert load_file(files[0]).keys() == load_file(files[1]).keys()
    again = Fuyu.from_pretrained(tmp_path / "ours")
    assert again.config == ours.config and torch.equal(again(ids, mask, patches), ours(ids, mask, patches))


def make_flat(folder: Path) -> None:
    """The config of the Hub: the decoder's sizes in the file itself."""
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    theta = text.pop("rope_parameters")["rope_theta"]
    flat = config | text | {"model_type": "fuyu", "rope_theta": theta, "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps(flat))


@no_grad
def test_the_flat_config_of_the_hub(tmp_path):
    """Read by both as the same model; a theta that is named counts, half of each head turns without being named."""
    fuyu_reference(tmp_path, PATCH)
    nested = Fuyu.from_pretrained(tmp_path)
    make_flat(tmp_path)
    flat = Fuyu.from_pretrained(tmp_path)
    assert flat.config == nested.config and flat.config.language.rotary.share == 0.5
    change_config(tmp_path, None, rope_theta=25_000.0)
    ours, theirs = Fuyu.from_pretrained(tmp_path), hf.FuyuForCausalLM.from_pretrained(tmp_path).eval()
    ids, mask, patches = prompts(ours)
    wanted = theirs(input_ids=ids, attention_mask=mask, pixel_values=patches).logits
    assert_close(ours(ids, mask, patches), wanted, where=mask)
    assert (wanted - nested(ids, mask, patches))[mask.bool()].abs().max() > 1e-3


@no_grad
def test_the_spelling_of_the_modules(tmp_path):
    fuyu_reference(tmp_path, PATCH)
    ours = Fuyu.from_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    named = {"model." + key.replace("_model.model.", "_model."): tensor for key, tensor in tensors.items()}
    named["lm_head.weight"] = named.pop("model.language_model.lm_head.weight")
    save_file(named, tmp_path / "model.safetensors")
    ids, mask, patches = prompts(ours)
    assert torch.equal(Fuyu.from_pretrained(tmp_path)(ids, mask, patches), ours(ids, mask, patches))


def test_the_defaults_are_those_of_the_reference():
    for given in ({}, {"text_config": {}}, {"hidden_size": 4096}):
        theirs = hf.FuyuConfig(**given).to_dict()
        mine = FuyuConfig.from_hf({"model_type": "fuyu"} | given).to_hf()
        assert {k: mine[k] for k in ("patch_size", "num_channels", "image_token_id", "tie_word_embeddings")} == {
            k: theirs[k] for k in ("patch_size", "num_channels", "image_token_id", "tie_word_embeddings")
        }
        text = theirs["text_config"]
        skipped = {"architectures", "bos_token_id"}
        assert {k: v for k, v in mine["text_config"].items() if k not in skipped} == {
            k: text[k] for k in mine["text_config"] if k not in skipped
        }


@no_grad
def test_one_patch_is_one_row_of_the_linear_map(tmp_path):
    """Row, column, channel: the channel runs fastest."""
    fuyu_reference(tmp_path, PATCH)
    ours = Fuyu.from_pretrained(tmp_path)
    image = torch.arange(12.0).view(1, 3, 2, 2)
    (patch,) = ours.patches(image)[0]
    assert patch.tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    wanted = ours.patch_embed.weight @ patch + ours.patch_embed.bias
    assert_close(ours.embed(torch.tensor([[PLACE]]), ours.patches(image))[0, 0], wanted)
    assert ours.rows(2, 2, NEWLINE) == [PLACE, NEWLINE]
    assert ours.rows(4, 6, NEWLINE) == [PLACE, PLACE, PLACE, NEWLINE] * 2
    cut = ours.patches(torch.arange(3.0 * 4 * 6).view(1, 3, 4, 6))
    theirs = FuyuImageProcessorPil(patch_size={"height": 2, "width": 2})
    wanted = theirs.patchify_image(np.arange(3.0 * 4 * 6).reshape(3, 4, 6), patch_size=theirs.patch_size)
    assert cut.shape == (1, 6, 12) and np.array_equal(cut[0].numpy(), wanted)


@no_grad
def test_a_text_alone_and_two_chunks(tmp_path):
    fuyu_reference(tmp_path, PATCH)
    ours = Fuyu.from_pretrained(tmp_path)
    ids, mask, patches = prompts(ours)
    plain, plain_mask = padded([words(44), words(7)])
    assert torch.equal(ours(plain, plain_mask), ours.language(plain, plain_mask))
    cut = 1 + int((ids == PLACE).nonzero()[:, 1].max())
    cache = ours.language.new_cache()
    first = ours(ids[:, :cut], mask[:, :cut], patches, cache=cache)
    second = ours(ids[:, cut:], mask, cache=cache)
    assert_close(torch.cat([first, second], 1), ours(ids, mask, patches), where=mask)


@no_grad
def test_greedy_tokens_equal_those_of_the_reference(tmp_path):
    theirs = fuyu_reference(tmp_path, PATCH)
    ours = Fuyu.from_pretrained(tmp_path)
    ids, mask, patches = prompts(ours)
    last = SIZES[2][0] * SIZES[2][1] // PATCH**2
    for rows, given in ((slice(3), patches), (slice(2, 3), patches[-last:])):
        wanted = theirs.generate(
            input_ids=ids[rows], attention_mask=mask[rows], pixel_values=given, max_new_tokens=20, min_new_tokens=20,
            do_sample=False, eos_token_id=None,
        )  # fmt: skip
        embeddings = ours.embed(ids[rows], given)
        made = generate(ours.language, ids[rows], mask[rows], embeddings=embeddings, options=GenerationOptions(20))
        assert torch.equal(made.ids, wanted[:, ids.shape[1] :]) and len(set(made.ids.flatten().tolist())) > 5


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (None, {"image_token_id": 60}, "the token of an image's places is 60, but the vocabulary ends at 59"),
        (None, {"patch_size": 3}, r"patch_embed|vision_embed_tokens.weight is \(32, 12\), should be \(32, 27\)"),
        ("text_config", {"model_type": "llama"}, "the language model of a Fuyu is a persimmon, not a llama"),
        ("text_config", {"hidden_size": "wide"}, "text_config: config.json: hidden_size must be a whole number"),
    ],
)
def test_configs_that_cannot_be_followed(tmp_path, part, values, message):
    fuyu_reference(tmp_path, PATCH)
    change_config(tmp_path, part, **values)
    with pytest.raises(UserError, match=message):
        Fuyu.from_pretrained(tmp_path)


@no_grad
def test_more_and_fewer_places_than_patches(tmp_path):
    fuyu_reference(tmp_path, PATCH)
    ours = Fuyu.from_pretrained(tmp_path)
    ids, mask, patches = prompts(ours)
    with pytest.raises(UserError, match="have 10 tokens 59, .* but the images given have 9 parts"):
        ours(ids, mask, patches[1:])
    with pytest.raises(UserError, match="5x4 pixels does not divide into patches of 2x2"):
        ours.patches(torch.zeros(1, 3, 5, 4))
    assert TEXT["vocab_size"] > PLACE > NEWLINE and END["eos_token_id"] == 2


# --- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 60), (31, 59), (12, 90), (200, 100), (90, 200), (61, 300), (65, 301), (1, 1)])
def test_pixels_equal_those_of_the_reference(tmp_path, shape):
    """Small images are padded, and larger ones shrunk: the part of the reference's that it would cut into patches."""
    theirs = FuyuImageProcessorPil(size={"height": 60, "width": 120}, patch_size={"height": 30, "width": 30})
    theirs.save_pretrained(tmp_path)
    ours = FuyuImageProcessor.from_pretrained(tmp_path)
    assert ours == FuyuImageProcessor(size=(60, 120)) and ours.output_size is None
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8))
    made = ours(image)
    wanted = torch.tensor(theirs(image, return_tensors="np")["images"][0][0])
    assert made.shape[1] % 30 == made.shape[2] % 30 == 0
    assert torch.equal(made, wanted[:, : made.shape[1], : made.shape[2]])
    assert (wanted[:, made.shape[1] :] < -0.99).all() and (wanted[:, :, made.shape[2] :] < -0.99).all()
    ours.save_pretrained(tmp_path / "ours")
    assert FuyuImageProcessor.from_pretrained(tmp_path / "ours") == ours


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_processor_type": "ViTImageProcessor"}, "prepared by a FuyuImageProcessor, not by ViTImageProcessor"),
        ({"do_pad": False}, "must be resized, padded with one byte, and cut into square patches"),
        ({"padding_value": 0.5}, "padded with one byte"),
        ({"padding_mode": "reflect"}, "padded with one byte"),
        ({"patch_size": {"height": 30, "width": 15}}, "cut into square patches"),
        ({"patch_size": {"height": [30], "width": [30]}}, r"patch_size: 'height' is \[30\], not int"),
        ({"size": {"height": 100, "width": 120}}, r"whole patches of 30: \(100, 120\)"),
        ({"size": {"shortest_edge": 60}}, "size must be a height and a width of whole patches of 30: 60"),
    ],
)
def test_processing_that_cannot_be_followed(changes, message):
    config = FuyuImageProcessor(size=(60, 120)).to_hf()
    with pytest.raises(UserError, match=message):
        FuyuImageProcessor.from_hf(config | changes)
