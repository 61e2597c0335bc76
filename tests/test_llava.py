"""LLaVA against the reference model, through files it saved and our loader read, and back."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from blip2_helpers import change_config
from helpers import assert_close
from image_text_helpers import LONG, PLACE, TEXT, TOWER, VOCABULARY, llava_reference, padded, words
from safetensors.torch import load_file, save_file

from vqa_scratch.errors import UserError
from vqa_scratch.generate import GenerationOptions, generate
from vqa_scratch.models import Llama, LlamaConfig, Llava, LlavaConfig, ViTConfig
from vqa_scratch.study import trace

no_grad = torch.no_grad()
FULL = {"vision_feature_select_strategy": "full"}
CASES = {
    "as released": (),
    "Qwen2": ("CLIP", "Qwen2"),
    "Persimmon": ("CLIP", "Persimmon"),
    "SigLIP and Qwen2, the last block": ("Siglip", "Qwen2", FULL | {"vision_feature_layer": -1}),
    "with the class token, after the first block": ("CLIP", "Llama", FULL | {"vision_feature_layer": 1}),
    "the last block, no biases": ("CLIP", "Llama", {"vision_feature_layer": 3, "multimodal_projector_bias": False}),
    "another activation": ("CLIP", "Llama", {"projector_hidden_act": "silu"}),
    "tied": ("CLIP", "Qwen2", {"text_changes": {"tie_word_embeddings": True}}),
    "tied, as the whole file says": ("CLIP", "Qwen2", {"tie_word_embeddings": True}),
}  # fmt: skip


def reference(folder: Path, case: str):
    parts = CASES[case]
    return llava_reference(folder, *parts[:2], **(parts[2] if len(parts) > 2 else {}))


def prompts(places: int, images=(2, 0, 1)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and mask (3, T) of rows with so many images somewhere, and the pixels of all."""
    rows = []
    for count in images:
        row = words(3)
        for _ in range(count):
            row += [PLACE] * places + words(int(torch.randint(1, 9, ())))
        rows.append(row + words(40 if not count else 2))
    return *padded(rows), torch.randn(sum(images), 3, 8, 8)


@no_grad
@pytest.mark.parametrize("case", CASES)
def test_logits_and_back(tmp_path, case):
    """Several images a row, anywhere in texts of different lengths; and a batch of one."""
    theirs = reference(tmp_path / "theirs", case)
    ours = Llava.from_pretrained(tmp_path / "theirs")
    places = ours.encode_image(torch.randn(1, 3, 8, 8)).shape[1]
    assert places == 4 + (case.startswith("with the class token"))
    ids, mask, pixels = prompts(places)
    wanted = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    assert_close(ours(ids, mask, pixels), wanted, where=mask)
    (row,) = ids[2:][:, mask[2].bool()][None].unbind()
    alone = theirs(input_ids=row, pixel_values=pixels[2:]).logits
    assert_close(ours(row, None, pixels[2:]), alone)
    assert_close(alone[0], wanted[2, mask[2].bool()])
    assert (ours(ids, mask, pixels.flip(0)) - wanted)[mask.bool()].abs().max() > 0.1, "nothing depends on the image"

    ours.save_pretrained(tmp_path / "ours")
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["unexpected_keys"] and all("post_layernorm" in key for key in info["missing_keys"])
    assert_close(back.eval()(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits, wanted, where=mask)
    again = Llava.from_pretrained(tmp_path / "ours")
    assert again.config == ours.config and torch.equal(again(ids, mask, pixels), ours(ids, mask, pixels))


def respelled(folder: Path, respell) -> Llava:
    tensors = load_file(folder / "model.safetensors")
    save_file({respell(key): tensor for key, tensor in tensors.items()}, folder / "model.safetensors")
    return Llava.from_pretrained(folder)


@no_grad
@pytest.mark.parametrize(
    "respell",
    [
        lambda key: key.replace("vision_tower.", "vision_tower.vision_model."),  # the Hub's
        lambda key: f"module.{key}",
        lambda key: "lm_head.weight" if "lm_head" in key else "model." + key.replace("_model.model.", "_model."),
    ],
    ids=["the Hub's", "wrapped", "the modules of transformers 5"],
)  # fmt: skip
def test_the_spellings_of_keys(tmp_path, respell):
    llava_reference(tmp_path)
    ours, (ids, mask, pixels) = Llava.from_pretrained(tmp_path), prompts(4)
    assert torch.equal(respelled(tmp_path, respell)(ids, mask, pixels), ours(ids, mask, pixels))


@no_grad
def test_a_tied_head_may_be_in_the_file_as_well(tmp_path):
    reference(tmp_path, "tied")
    ours, (ids, mask, pixels) = Llava.from_pretrained(tmp_path), prompts(4)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["language_model.model.embed_tokens.weight"].clone()
    save_file(tensors | {"language_model.lm_head.weight": head}, tmp_path / "model.safetensors")
    assert torch.equal(Llava.from_pretrained(tmp_path)(ids, mask, pixels), ours(ids, mask, pixels))
    save_file(tensors | {"lm_head.weight": head + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="lm_head.weight differs from .*, but this model shares the two"):
        Llava.from_pretrained(tmp_path)


def test_what_is_written_is_spelled_as_on_the_hub(tmp_path):
    llava_reference(tmp_path)
    Llava.from_pretrained(tmp_path).save_pretrained(tmp_path / "ours")
    keys = load_file(tmp_path / "ours" / "model.safetensors").keys()
    begins = {".".join(key.split(".")[:2]) for key in keys}
    assert begins == {
        "language_model.lm_head", "language_model.model", "vision_tower.vision_model",
        "multi_modal_projector.linear_1", "multi_modal_projector.linear_2",
    }  # fmt: skip


def test_the_config_of_the_hub(tmp_path):
    """Parts that name only what differs from the family's defaults, and an absent layer and strategy."""
    theirs = hf.LlavaConfig(vision_config=TOWER, text_config={"model_type": "llama"} | TEXT, image_token_index=PLACE)
    given = {"model_type": "llava", "text_config": TEXT, "vision_config": TOWER, "image_token_index": PLACE}
    ours = LlavaConfig.from_hf(given)
    assert (ours.layer, ours.whole, ours.image_token) == (-2, False, PLACE)
    back = hf.LlavaConfig(**ours.to_hf())
    for part in ("vision_config", "text_config"):
        mine, other = getattr(back, part).to_dict(), getattr(theirs, part).to_dict()
        skipped = {"architectures", "vision_use_head", "initializer_range", "bos_token_id", "eos_token_id"}
        assert {k: v for k, v in mine.items() if k not in skipped} == {
            k: other.get(k) for k in mine if k not in skipped
        }


def test_the_defaults_are_those_of_the_reference():
    mine = LlavaConfig(ViTConfig(layout="clip_vision_model"), LlamaConfig(vocab_size=32064)).to_hf()
    for name in ("image_token_index", "projector_hidden_act", "vision_feature_layer", "vision_feature_select_strategy"):
        assert mine[name] == getattr(hf.LlavaConfig(), name)


@no_grad
def test_a_text_alone_is_the_bare_decoder(tmp_path):
    llava_reference(tmp_path)
    ours, (ids, mask) = Llava.from_pretrained(tmp_path), padded([words(44), words(7)])
    assert torch.equal(ours(ids, mask), ours.language(ids, mask))
    assert isinstance(ours.language, Llama)


@no_grad
def test_places_are_where_embeddings_stand(tmp_path):
    """To the bit: the same as handing in the words and the projected patches; gradients reach both."""
    llava_reference(tmp_path)
    ours, (ids, mask, pixels) = Llava.from_pretrained(tmp_path), prompts(4)
    embeddings, image = ours.language.embed(ids), ours.encode_image(pixels).flatten(0, 1)
    for i, (row, column) in enumerate((ids == PLACE).nonzero().tolist()):
        embeddings[row, column] = image[i]
    assert torch.equal(ours.read(embeddings, mask), ours(ids, mask, pixels))
    with torch.enable_grad():
        ours(ids, mask, pixels)[mask.bool()].square().mean().backward()
    for name in ("up.weight", "vision.patch_embed.weight", "vision.blocks.1.mlp.up.weight", "language.tokens.weight"):
        assert ours.get_parameter(name).grad.abs().max() > 0
    assert ours.vision.blocks[2].mlp.up.weight.grad is None, "the last block is not read"
    assert ours.language.tokens.weight.grad[PLACE].abs().max() == 0, "a place has no word"


@no_grad
def test_in_two_chunks_through_a_cache(tmp_path):
    llava_reference(tmp_path)
    ours, (ids, mask, pixels) = Llava.from_pretrained(tmp_path), prompts(4, (1, 1))
    cache, cut = ours.language.new_cache(), 1 + int((ids == PLACE).nonzero()[:, 1].max())
    first = ours(ids[:, :cut], mask[:, :cut], pixels, cache=cache)
    second = ours(ids[:, cut:], mask, cache=cache)
    assert_close(torch.cat([first, second], 1), ours(ids, mask, pixels), where=mask)


@no_grad
@pytest.mark.parametrize("case", ["as released", "Qwen2", "SigLIP and Qwen2, the last block"])
def test_greedy_tokens_equal_those_of_the_reference(tmp_path, case):
    """20 tokens, in a batch with padding and alone; and through the modules, under a trace."""
    theirs = reference(tmp_path, case)
    ours = Llava.from_pretrained(tmp_path)
    options = GenerationOptions(20)
    ids, mask, pixels = prompts(4)
    for rows, images in ((slice(3), slice(3)), (slice(2, 3), slice(2, 3))):
        given = {"input_ids": ids[rows], "attention_mask": mask[rows], "pixel_values": pixels[images]}
        wanted = theirs.generate(**given, max_new_tokens=20, min_new_tokens=20, do_sample=False, eos_token_id=None)
        embeddings = ours.embed(ids[rows], pixels[images])
        made = generate(ours.language, ids[rows], mask[rows], embeddings=embeddings, options=options)
        assert torch.equal(made.ids, wanted[:, ids.shape[1] :]) and len(set(made.ids.flatten().tolist())) > 5
        with trace(ours.language, "decoder.0.resid_pre"):
            slow = generate(ours.language, ids[rows], mask[rows], embeddings=embeddings, options=options)
        assert torch.equal(slow.ids, made.ids)


@no_grad
def test_beams_find_those_of_the_reference(tmp_path):
    theirs, ours = llava_reference(tmp_path), Llava.from_pretrained(tmp_path)
    ids, mask, pixels = prompts(4)
    wanted = theirs.generate(ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=9, num_beams=3)
    options = GenerationOptions(9, eos_id=2, num_beams=3)
    made = generate(ours.language, ids, mask, embeddings=ours.embed(ids, pixels), options=options)
    assert torch.equal(made.ids, wanted[:, ids.shape[1] :])


@no_grad
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_end_tokens_of_the_whole_come_before_those_of_the_text(tmp_path, file):
    """A file of today has them in generation_config.json; each of several ends a text, as in the reference."""
    theirs = llava_reference(tmp_path)
    ids, mask, pixels = prompts(4)
    given = {"attention_mask": mask, "pixel_values": pixels, "do_sample": False, "pad_token_id": 0}
    said = theirs.generate(ids, **given, max_new_tokens=9, eos_token_id=None)[:, ids.shape[1] :]
    ends = [int(said[0, 3]), int(said[1, 4]), int(said[2, 2])]
    change_config(tmp_path, "text_config", eos_token_id=1)
    (tmp_path / "generation_config.json").unlink()
    if file == "config.json":
        change_config(tmp_path, None, eos_token_id=ends)
    else:
        (tmp_path / file).write_text(json.dumps({"eos_token_id": ends}))
    ours, theirs = Llava.from_pretrained(tmp_path), type(theirs).from_pretrained(tmp_path).eval()
    assert ours.config.language.eos_id == tuple(ends)
    wanted = theirs.generate(ids, **given, max_new_tokens=9)[:, ids.shape[1] :]
    options = GenerationOptions(9, ours.config.language.eos_id)
    assert torch.equal(
        generate(ours.language, ids, mask, embeddings=ours.embed(ids, pixels), options=options).ids, wanted
    )


@no_grad
def test_in_bf16_and_from_shards(tmp_path):
    theirs = llava_reference(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    full, half = Llava.from_pretrained(tmp_path), Llava.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    ids, mask, pixels = prompts(4)
    exact = full(ids, mask, pixels)
    # 8 bits of mantissa: a rounding is 2**-9 of the value, and the residual stream sees some dozens of them.
    assert (half(ids, mask, pixels).float() - exact)[mask.bool()].abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (None, {"image_token_index": 60}, "the token of an image's places is 60, but the vocabulary ends at 59"),
        (None, {"vision_feature_layer": [-2, -1]}, r"'vision_feature_layer' is \[-2, -1\], not int"),
        (None, {"vision_feature_layer": 4}, "vision_feature_layer 4 is none of an image encoder with 3 layers"),
        (None, {"vision_feature_select_strategy": "cls"}, 'must be "default" or "full", not \'cls\''),
        (None, {"projector_hidden_act": "swish"}, "asks for activation 'swish'"),
        (None, {"text_config": None}, "'text_config' is None, not dict"),
        (None, {"mm_vision_tower": "openai/clip"}, "the layout of LLaVA's own repository"),
        ("vision_config", {"model_type": "siglip_vision_model"}, "leaves out a class token, which a SigLIP does not"),
        ("vision_config", {"model_type": "vit"}, "the image encoder is a 'vit'; here it must be clip_vision"),
        ("vision_config", {"patch_size": 3}, "vision_config: image size 8 is not a multiple of the patch size 3"),
        ("text_config", {"model_type": "mistral"}, "text_config: .* a model of type 'mistral', expected llama"),
        ("text_config", {"num_hidden_layers": 1}, "does not fit Llava: unexpected: language_model.model.layers.1."),
    ],
)  # fmt: skip
def test_configs_that_cannot_be_followed(tmp_path, part, values, message):
    llava_reference(tmp_path)
    change_config(tmp_path, part, **values)
    with pytest.raises(UserError, match=message) as error:
        Llava.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) <= 300


@no_grad
def test_more_and_fewer_places_than_parts(tmp_path):
    llava_reference(tmp_path)
    ours, (ids, mask, pixels) = Llava.from_pretrained(tmp_path), prompts(4)
    for given, parts in ((pixels[:2], 8), (torch.cat([pixels, pixels]), 24), (None, 0)):
        with pytest.raises(UserError, match=rf"have 12 tokens 59, .* but the images given have {parts} parts"):
            ours(ids, mask, given)
    with pytest.raises(UserError, match="image of 9x8 pixels does not divide"):
        ours(ids, mask, torch.zeros(3, 3, 9, 8))
    embeddings = ours.embed(ids, pixels)
    with pytest.raises(ValueError, match="embeddings must be"):
        generate(ours.language, ids[:, 1:], mask[:, 1:], embeddings=embeddings, options=GenerationOptions(3))
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["max_position_embeddings"] == LONG
    assert ours.language.config.vocab_size == VOCABULARY
