"""Idefics against the reference model, through files it saved and our loader read, and back."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from blip2_helpers import change_config
from helpers import STD, assert_close, saved
from image_text_helpers import END, LONG, padded
from safetensors.torch import load_file, save_file
from transformers.models.idefics.processing_idefics import (
    image_attention_mask_for_packed_input_ids_pt,
    incremental_to_binary_attention_mask,
)

from vqa_scratch.errors import UserError
from vqa_scratch.generate import Conditioning, GenerationOptions, generate
from vqa_scratch.models import Idefics, IdeficsConfig
from vqa_scratch.study import trace

no_grad = torch.no_grad()
WORDS, ADDED = 58, 2
FAKE, PLACE = WORDS, WORDS + 1
TEXT = {"vocab_size": WORDS, "additional_vocab_size": ADDED, "hidden_size": 32, "intermediate_size": 40}
TEXT |= {"num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": LONG}
TEXT |= {"initializer_range": STD / 2}  # there are twelve sublayers: rounding adds up
TOWER = {"embed_dim": 24, "intermediate_size": 30, "num_hidden_layers": 2, "num_attention_heads": 3}
TOWER |= {"image_size": 8, "patch_size": 4, "initializer_range": STD}
PERCEIVER = {"resampler_n_latents": 3, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 10}
RESAMPLED = {"use_resampler": True, "cross_layer_interval": 2}
CASES = {
    "as released": {**RESAMPLED, "qk_layer_norms": True, "perceiver": {"qk_layer_norms_perceiver": True}},
    "no norms of heads": RESAMPLED,
    "no resampler": {"qk_layer_norms": True},
    "a gate for each number, every fourth block": {"alpha_type": "vector", "cross_layer_interval": 4},
    "no words of its own": {"additional_vocab_size": 0, "vocab_size": WORDS + ADDED, **RESAMPLED},
    "tied": {"tie_word_embeddings": True, **RESAMPLED},
}


def reference(folder: Path, **changes) -> hf.IdeficsForVisionText2Text:
    perceiver = PERCEIVER | changes.pop("perceiver", {})
    config = hf.IdeficsConfig(**TEXT | END | {"vision_config": TOWER, "perceiver_config": perceiver} | changes)
    model = hf.IdeficsForVisionText2Text(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "alpha" in name:
                parameter.normal_()
            elif "embedding" in name or ".cross_attn." in name:  # drawn by other rules; and images shall be seen
                parameter.normal_(std=STD)
    return saved(model, folder)


def words(count: int) -> list[int]:
    return torch.randint(5, WORDS, (count,)).tolist()


def their_mask(ids: torch.Tensor, images: int) -> torch.Tensor:
    """The mask of the reference's processor."""

    class Tokenizer:
        eos_token_id = 2

        @staticmethod
        def convert_tokens_to_ids(token: str) -> int:
            return PLACE

    seen, _ = image_attention_mask_for_packed_input_ids_pt(ids, Tokenizer)
    return incremental_to_binary_attention_mask(seen, "pt", num_classes=images)


def prompts(images=(2, 1, 0)) -> dict[str, torch.Tensor]:
    """Rows with so many images, words before the first and after the last, padding on the left; as the processor."""
    rows = []
    for count in images:
        row = [1, *words(3)]
        for _ in range(count):
            row += [FAKE, PLACE, FAKE, *words(int(torch.randint(2, 9, ())))]
        rows.append(row + words(30 if not count else 2))
    ids, mask = padded(rows)
    pixels = torch.randn(len(images), max(1, *images), 3, 8, 8)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": pixels,
        "image_attention_mask": their_mask(ids, pixels.shape[1]),
    }


def cut(given: dict[str, torch.Tensor], start: int, end: int) -> dict[str, torch.Tensor]:
    """The tokens from `start` to `end` as a chunk of a cache."""
    ids, mask, seen = given["input_ids"], given["attention_mask"], given["image_attention_mask"]
    return {
        **given,
        "input_ids": ids[:, start:end],
        "attention_mask": mask[:, :end],
        "image_attention_mask": seen[:, start:end],
    }


def memory(model: Idefics, given: dict[str, torch.Tensor]) -> Conditioning:
    return Conditioning([model.memory(model.encode_image(given["pixel_values"]), given["image_attention_mask"])])


@no_grad
@pytest.mark.parametrize("case", CASES)
def test_logits_and_back(tmp_path, case):
    """Two images, one and none in texts of different lengths; each token sees its last image."""
    theirs = reference(tmp_path / "theirs", **CASES[case])
    ours = Idefics.from_pretrained(tmp_path / "theirs")
    given = prompts()
    wanted = theirs(**given).logits
    assert wanted.shape[-1] == WORDS + ADDED
    assert_close(ours(**given), wanted, where=given["attention_mask"])
    moved = ours(**given | {"pixel_values": given["pixel_values"].flip(1)}) - wanted
    assert moved[given["attention_mask"].bool()].abs().max() > 0.1, "nothing depends on the images"
    latents = 3 if "use_resampler" in CASES[case] else 5
    assert ours.encode_image(given["pixel_values"]).shape == (3, 2, latents, 24)

    ours.save_pretrained(tmp_path / "ours")
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["unexpected_keys"] and all("post_layernorm" in key for key in info["missing_keys"])
    assert_close(back.eval()(**given).logits, wanted, where=given["attention_mask"])
    again = Idefics.from_pretrained(tmp_path / "ours")
    assert again.config == ours.config and torch.equal(again(**given), ours(**given))


@no_grad
def test_a_text_without_images(tmp_path):
    """As the reference's processor has it, one image that no token sees: the MLPs of gated layers run all the same."""
    theirs, ours = reference(tmp_path, **RESAMPLED), None
    ours, (ids, mask) = Idefics.from_pretrained(tmp_path), padded([words(44), words(7)])
    unseen = {"pixel_values": torch.zeros(2, 1, 3, 8, 8), "image_attention_mask": torch.zeros(2, 44, 1)}
    wanted = theirs(input_ids=ids, attention_mask=mask, **unseen).logits
    assert_close(ours(ids, mask), wanted, where=mask)
    assert (ours.language(ids, mask) - wanted)[mask.bool()].abs().max() > 0.1, "the bare decoder says something else"


@no_grad
@pytest.mark.parametrize("case", ["as released", "no resampler"])
def test_with_closed_gates_it_is_a_llama(tmp_path, case):
    reference(tmp_path, **CASES[case])
    ours, given = Idefics.from_pretrained(tmp_path), prompts()
    for block in ours.config.read_before:
        layer = ours.language.blocks[block].gated
        layer.cross_gate.zero_(), layer.mlp_gate.zero_()
    assert torch.equal(ours(**given), ours.language(given["input_ids"], given["attention_mask"]))


@no_grad
def test_the_second_image_does_not_reach_back(tmp_path):
    """Exactly, as in the reference."""
    reference(tmp_path, **CASES["as released"])
    ours, given = Idefics.from_pretrained(tmp_path), prompts((2, 2))
    other = given["pixel_values"].clone()
    other[:, 1] = torch.randn_like(other[:, 1])
    one, two = ours(**given), ours(**given | {"pixel_values": other})
    for row in range(2):
        _, second = (given["input_ids"][row] == PLACE).nonzero().flatten().tolist()
        assert torch.equal(one[row, :second], two[row, :second])
        assert (one[row, second:] - two[row, second:]).abs().amax(-1).min() > 1e-3


@no_grad
@pytest.mark.parametrize("case", ["as released", "no resampler"])
def test_in_two_chunks_through_a_cache(tmp_path, case):
    """Cut between two images, and after the last one, where nothing has to be said about images any more."""
    theirs = reference(tmp_path, **CASES[case])
    ours, given = Idefics.from_pretrained(tmp_path), prompts((2, 1, 2))
    wanted, length, real = theirs(**given).logits, given["input_ids"].shape[1], given["attention_mask"]
    places = (given["input_ids"] == PLACE).nonzero()[:, 1]
    for cut_at in (int(places.min()) + 1, int(places.max()) + 1):
        cache = ours.language.new_cache()
        first = ours(**cut(given, 0, cut_at), cache=cache)
        second = ours(**cut(given, cut_at, length), cache=cache)
        assert_close(torch.cat([first, second], 1), wanted, where=real)
    cache = ours.language.new_cache()
    ours(**cut(given, 0, cut_at), cache=cache)
    rest = {"input_ids": given["input_ids"][:, cut_at:], "attention_mask": real}
    assert_close(ours(**rest, cache=cache), wanted[:, cut_at:])


@no_grad
@pytest.mark.parametrize("case", ["as released", "no resampler", "a gate for each number, every fourth block"])
def test_greedy_tokens_equal_those_of_the_reference(tmp_path, case):
    """20 tokens, in a batch with padding and alone, which see what the last token of the prompt saw."""
    theirs = reference(tmp_path, **CASES[case])
    ours, options = Idefics.from_pretrained(tmp_path), GenerationOptions(20, no_repeat_ngram_size=2)
    how = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "no_repeat_ngram_size": 2}
    whole = prompts((2, 1, 1))
    for given in (whole, {name: tensor[:1] for name, tensor in whole.items()}):
        ids, mask = given["input_ids"], given["attention_mask"]
        wanted = theirs.generate(**given, **how, eos_token_id=None)
        made = generate(ours.language, ids, mask, memory(ours, given), options=options)
        assert torch.equal(made.ids, wanted[:, ids.shape[1] :])
        assert len(set(made.ids.flatten().tolist())) > 4
        with trace(ours.language, "decoder.0.resid_pre"):
            slow = generate(ours.language, ids, mask, memory(ours, given), options=options)
        assert torch.equal(slow.ids, made.ids)


@no_grad
def test_which_image_a_token_sees(tmp_path):
    """As the processor of the reference has it: none before the first, none after an end token until the next."""
    reference(tmp_path)
    ours = Idefics.from_pretrained(tmp_path)
    for _ in range(20):
        ids = torch.randint(1, 8, (3, 40))
        ids[ids == 7] = PLACE
        counts = (ids == PLACE).sum(1).tolist()
        assert torch.equal(ours.image_mask(ids, PLACE, counts).long(), their_mask(ids, max(counts)))
    assert ours.image_mask(torch.tensor([[5, 6]]), PLACE, [0]).tolist() == [[[False], [False]]]


@no_grad
def test_in_bf16_and_from_shards(tmp_path):
    theirs = reference(tmp_path, **CASES["as released"])
    (tmp_path / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    full, half = Idefics.from_pretrained(tmp_path), Idefics.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    given = prompts()
    exact = full(**given)
    # 8 bits of mantissa: a rounding is 2**-9 of the value, and the residual stream sees some dozens of them.
    assert (half(**given).float() - exact)[given["attention_mask"].bool()].abs().max() < 0.05 * exact.abs().max()


def test_gradients_reach_every_part(tmp_path):
    reference(tmp_path, **CASES["as released"])
    ours, given = Idefics.from_pretrained(tmp_path), prompts()
    ours(**given)[given["attention_mask"].bool()].square().mean().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_tables_of_old_files_are_left_out(tmp_path):
    reference(tmp_path, **RESAMPLED)
    tensors = load_file(tmp_path / "model.safetensors")
    for part in ("layers.0.self_attn", "gated_cross_attn_layers.1.cross_attn"):
        tensors[f"model.{part}.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    Idefics.from_pretrained(tmp_path)


def test_the_defaults_are_those_of_the_reference(tmp_path):
    """And those of a config that says nothing: one gated layer a block, no resampler, no words of its own."""
    theirs = hf.IdeficsConfig()
    mine = IdeficsConfig.from_hf({"model_type": "idefics", "vocab_size": 32000}).to_hf()
    for name in ("additional_vocab_size", "cross_layer_interval", "qk_layer_norms", "alpha_type", "alpha_initializer"):
        assert mine[name] == getattr(theirs, name)
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps"):
        assert mine[name] == getattr(theirs, name)
    for name, value in theirs.vision_config.to_dict().items():
        assert mine["vision_config"].get(name, value) == value, name
    assert mine["use_resampler"] is False
    resampled = IdeficsConfig.from_hf({"model_type": "idefics", "vocab_size": 32000, "use_resampler": True}).to_hf()
    for name, value in theirs.perceiver_config.to_dict().items():
        if name.startswith("resampler"):
            assert resampled["perceiver_config"][name] == value


@pytest.mark.parametrize(("how", "value"), [("ones", 1.0), ("zeros", 0.0)])
def test_gates_start_as_the_file_says(how, value):
    small = {"model_type": "idefics", **TEXT, "vision_config": TOWER, "alpha_initializer": how}
    gates = [block.gated.mlp_gate for block in Idefics(IdeficsConfig.from_hf(small)).language.blocks]
    assert all((gate == value).all() for gate in gates)
    random = small | {"alpha_initializer": "normal", "alphas_initializer_range": 0.5, "alpha_type": "vector"}
    gates = [block.gated.mlp_gate for block in Idefics(IdeficsConfig.from_hf(random)).language.blocks]
    assert 0.3 < torch.cat(gates).std() < 0.7  # of 128 numbers


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (None, {"alpha_type": "both"}, 'alpha_type must be "float" or "vector", not \'both\''),
        (None, {"alpha_initializer": "twos"}, "alpha_initializer must be zeros, ones or one of .*, not 'twos'"),
        (None, {"cross_layer_interval": 3}, "4 blocks do not divide into groups of cross_layer_interval 3"),
        (None, {"dropout": 0.1}, "dropout = 0.1; here it can only be 0.0"),
        (None, {"num_attention_heads": 5, "head_dim": 8}, "width 32 does not divide into 5 heads"),
        (None, {"use_resampler": "yes"}, "'use_resampler' is 'yes', not bool"),
        (None, {"additional_vocab_size": -2}, "additional_vocab_size must be a whole number from 0"),
        ("vision_config", {"embed_dim": 25}, "vision_config: width 25 does not divide into 3 heads"),
        ("perceiver_config", {"resampler_depth": 0}, "resampler_depth must be a whole number from 1"),
        (None, {"additional_vocab_size": 3}, "additional_embedding.weight is .2, 32., should be .3, 32."),
    ],
)
def test_what_cannot_be_followed(tmp_path, part, values, message):
    reference(tmp_path, **RESAMPLED)
    change_config(tmp_path, part, **values)
    with pytest.raises(UserError, match=message) as error:
        Idefics.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) <= 300


@no_grad
def test_images_and_places_that_do_not_fit(tmp_path):
    reference(tmp_path, **RESAMPLED)
    ours, given = Idefics.from_pretrained(tmp_path), prompts((2, 1))
    ids, pixels, seen = given["input_ids"], given["pixel_values"], given["image_attention_mask"]
    for images, message in (([1, 1], "row 0 .* has 2 tokens 59, .* but 1 images"), ([2, 2], "row 1 .* 1 tokens 59")):
        with pytest.raises(UserError, match=message):
            ours.image_mask(ids, PLACE, images)
    with pytest.raises(UserError, match="the token of an image's places is 60, but the vocabulary ends at 59"):
        ours.image_mask(ids, 60, [2, 1])
    with pytest.raises(UserError, match="images need image_attention_mask"):
        ours(ids, None, pixels)
    with pytest.raises(UserError, match=r"must be \(2 rows, tokens, 2 images\), not \(2, .*, 1\)"):
        ours(ids, None, pixels, seen[..., :1])
    with pytest.raises(ValueError, match="tokens, but the memory says what"):
        ours(ids, None, pixels, seen[:, 1:])
    for wrong in (pixels[:, :, :1], torch.cat([pixels, pixels[:, :, :1]], 2), pixels[:, 0]):
        with pytest.raises(UserError, match=r"pixel_values must be \(rows, images, 3 channels, height, width\), not"):
            ours(ids, None, wrong, seen)
    with pytest.raises(UserError, match="image of 9x8 pixels does not divide"):
        ours(ids, None, torch.zeros(2, 2, 3, 9, 8), seen)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == WORDS
