"""BLIP-2 and OPT against the reference models, through sharded files that the reference saved and our loader read."""

import pytest
import torch
import transformers as hf
from blip2_helpers import IMAGE_TOKEN, QUERIES, TEXT, change_config, prompts, reference, with_image_tokens
from helpers import STD, assert_close, saved
from model_helpers import greedy

from vqa_scratch.errors import UserError
from vqa_scratch.generate import Conditioning, GenerationOptions, generate
from vqa_scratch.models import OPT, Blip2, Blip2Config, OPTConfig
from vqa_scratch.study import trace

no_grad = torch.no_grad()
CASES = {
    "as released": {},
    "no bias in the image tower, other activations": {
        "vision": {"qkv_bias": False, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
        "qformer": {"hidden_act": "relu", "layer_norm_eps": 1e-3},
        "text": {"activation_function": "gelu"},
    },
    "every block of the Q-Former reads the image": {"qformer": {"cross_attention_frequency": 1}},
    "every third block does": {"qformer": {"cross_attention_frequency": 3}, "num_query_tokens": 1},
}


@no_grad
@pytest.mark.parametrize("case", CASES)
def test_blip2(tmp_path, case):
    theirs = reference(tmp_path, **CASES[case])
    ours = Blip2.from_pretrained(tmp_path)
    pixels, (ids, mask) = torch.randn(2, 3, 28, 28), prompts()
    everything, all_mask = with_image_tokens(ids, mask, CASES[case].get("num_query_tokens", QUERIES))
    wanted = theirs(pixel_values=pixels, input_ids=everything, attention_mask=all_mask)
    assert_close(ours.vision(pixels), wanted.vision_outputs.last_hidden_state)
    assert_close(ours.qformer(ours.vision(pixels)), wanted.qformer_outputs.last_hidden_state)
    assert_close(ours(pixels, ids, mask), wanted.logits, where=all_mask[..., None].expand(-1, -1, 60))


@no_grad
def test_it_is_the_image_that_is_asked(tmp_path):
    """Logits follow the image; a later word changes no earlier one."""
    reference(tmp_path)
    model = Blip2.from_pretrained(tmp_path)
    pixels, (ids, _) = torch.randn(2, 3, 28, 28), prompts((9, 9))
    logits = model(pixels, ids)
    assert (logits - model(pixels.flip(0), ids)).abs().max() > 0.1
    changed = ids.clone()
    changed[:, 6] += 1
    assert torch.equal(logits[:, : QUERIES + 6], model(pixels, changed)[:, : QUERIES + 6])
    assert (logits - model(pixels, changed))[:, QUERIES + 6 :].abs().max() > 0.1


@no_grad
@pytest.mark.parametrize("image_token", [IMAGE_TOKEN, None])
def test_greedy_tokens_equal_those_of_the_reference(tmp_path, image_token):
    """Batched, prompts of several lengths, some answers ended by EOS; older files know no image token."""
    theirs = reference(tmp_path)
    if image_token is None:
        change_config(tmp_path, None, image_token_index=None)
    ours = Blip2.from_pretrained(tmp_path)
    assert ours.config.image_token == image_token

    def made(seed: int, eos: int) -> torch.Tensor:
        """(B, A) new ids, after comparing them with the reference's."""
        torch.manual_seed(seed)
        pixels, (ids, mask) = torch.randn(3, 3, 28, 28), prompts((8, 3, 6))
        everything, all_mask = with_image_tokens(ids, mask)
        theirs.language_model.generation_config.eos_token_id = eos
        wanted = theirs.generate(pixels, everything, all_mask, max_new_tokens=12)[:, everything.shape[1] :]
        limits = {"max_new_tokens": 12, "eos_id": eos, "fill": 1}
        made = greedy(ours.language, ids, mask, None, **limits, prefix=ours.encode_image(pixels))
        assert torch.equal(made.ids, wanted)
        return wanted

    said = torch.cat([made(seed, eos=2) for seed in range(4)])
    often = int(said.flatten().mode().values)
    assert any((made(seed, eos=often) == 1).any() for seed in range(4)), "no answer ended by itself"


@no_grad
def test_beams_and_traces_find_the_tokens_of_the_reference(tmp_path):
    """Beams share the image's keys; under a trace decoding goes through the modules."""
    theirs = reference(tmp_path)
    ours = Blip2.from_pretrained(tmp_path)
    pixels, (ids, mask) = torch.randn(2, 3, 28, 28), prompts((8, 5))
    everything, all_mask = with_image_tokens(ids, mask)
    image = Conditioning(prefix=ours.encode_image(pixels))
    for beams in (1, 3):
        wanted = theirs.generate(pixels, everything, all_mask, max_new_tokens=9, num_beams=beams)
        options = GenerationOptions(9, eos_id=2, num_beams=beams)
        made = generate(ours.language, ids, mask, image, options=options, fill=1)
        assert torch.equal(made.ids, wanted[:, everything.shape[1] :])
        with trace(ours.language, "decoder.0.resid_pre"):
            again = generate(ours.language, ids, mask, image, options=options, fill=1)
            assert torch.equal(again.ids, made.ids)


@no_grad
def test_one_image_serves_several_questions(tmp_path):
    """Encoded once, and read beside others as it is read alone."""
    reference(tmp_path)
    model = Blip2.from_pretrained(tmp_path)
    pixels, (ids, mask) = torch.randn(2, 3, 28, 28), prompts((9, 7, 9))
    which, options = torch.tensor([1, 1, 0]), GenerationOptions(8)
    image = Conditioning(prefix=model.encode_image(pixels)[which])
    made = generate(model.language, ids, mask, image, options=options)
    for row in range(3):
        alone = Conditioning(prefix=model.encode_image(pixels[which[row]][None]))
        own = generate(model.language, ids[row][mask[row].bool()][None], None, alone, options=options)
        assert torch.equal(own.ids[0], made.ids[row])
        assert_close(own.log_probs[0], made.log_probs[row])


@no_grad
def test_half_precision(tmp_path):
    """bf16 everywhere but in the Q-Former; near fp32, and near the reference in the same precision."""
    theirs = reference(tmp_path).to(torch.bfloat16)
    theirs.qformer.float()
    theirs.query_tokens.data = theirs.query_tokens.data.float()
    full, half = Blip2.from_pretrained(tmp_path), Blip2.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kinds = {name: parameter.dtype for name, parameter in half.named_parameters()}
    assert {kind for name, kind in kinds.items() if name.startswith("qformer.")} == {torch.float32}
    assert {kind for name, kind in kinds.items() if not name.startswith("qformer.")} == {torch.bfloat16}
    pixels, (ids, _) = torch.randn(2, 3, 28, 28), prompts((9, 9))
    ours, exact = half(pixels, ids).float(), full(pixels, ids)
    everything, _ = with_image_tokens(ids, ids)
    # 8 bits of mantissa: a rounding is 2**-9 of the value, and the residual stream sees some dozens of them.
    assert (ours - exact).abs().max() < 0.05 * exact.abs().max()
    assert (ours - theirs(pixel_values=pixels.bfloat16(), input_ids=everything).logits).abs().max() < 0.05 * exact.max()


def test_loading_makes_no_random_start_and_no_second_copy(tmp_path, monkeypatch):
    """Parameters are made without values, once, in their final type: what is allocated is what the model weighs."""
    reference(tmp_path)
    made = []
    empty_like = torch.empty_like

    def watch(*args, **kwargs):
        made.append(empty_like(*args, **kwargs))
        return made[-1]

    def refuse(tensor, *args, **kwargs):
        assert tensor.is_meta, "a weight was drawn at random only to be overwritten"
        return tensor

    for name in ("normal_", "trunc_normal_", "uniform_", "kaiming_uniform_"):
        monkeypatch.setattr(torch.nn.init, name, refuse)
    monkeypatch.setattr(torch, "empty_like", watch)
    model = Blip2.from_pretrained(tmp_path, dtype=torch.bfloat16)
    real = sum(tensor.nbytes for tensor in made if not tensor.is_meta)
    assert real == sum(parameter.nbytes for parameter in model.parameters())


@no_grad
def test_what_is_saved_is_read_by_both(tmp_path):
    reference(tmp_path / "theirs")
    ours = Blip2.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    assert Blip2.from_pretrained(tmp_path / "ours").config == ours.config
    back, info = hf.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels, (ids, _) = torch.randn(1, 3, 28, 28), prompts((9,))
    everything, _ = with_image_tokens(ids, ids)
    assert_close(ours(pixels, ids), back.eval()(pixel_values=pixels, input_ids=everything).logits)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (None, {"model_type": "blip"}, "a model of type 'blip', expected blip-2"),
        ("text_config", {"model_type": "t5"}, "the language model of config.json is a 't5'; here it must be an 'opt'"),
        ("text_config", {"enable_bias": False}, "asks for enable_bias = False; here it can only be True"),
        ("text_config", {"eos_token_id": [2, -3]}, r"eos_token_id must be a whole number .*, not \[2, -3\]"),
        ("text_config", {"word_embed_proj_dim": 8}, "whose embedding is as wide as its blocks"),
        ("text_config", {"do_layer_norm_before": False}, "with norms before sublayers"),
        ("qformer_config", {"use_qformer_text_input": True}, "use_qformer_text_input = True; here it can only be"),
        ("qformer_config", {"cross_attention_frequency": 0}, "must be a whole number from 1 to .*, not 0"),
        ("vision_config", {"patch_size": [14, 7]}, r"patch_size must be a whole number .*, not \[14, 7\]"),
        ("vision_config", {"hidden_act": "swish"}, "asks for activation 'swish'"),
    ],
)
def test_configs_that_cannot_be_followed(tmp_path, part, values, message):
    reference(tmp_path)
    change_config(tmp_path, part, **values)
    with pytest.raises(UserError, match=message):
        Blip2.from_pretrained(tmp_path)


def test_every_problem_is_in_one_error(tmp_path):
    """Sizes that disagree with the files: too few layers, too many queries, another frequency of cross-attention."""
    reference(tmp_path)
    change_config(tmp_path, "text_config", num_hidden_layers=1)
    change_config(tmp_path, "qformer_config", cross_attention_frequency=3)
    change_config(tmp_path, None, num_query_tokens=5)
    with pytest.raises(UserError) as error:
        Blip2.from_pretrained(tmp_path)
    for found in (
        "does not fit Blip2: unexpected:",
        "qformer.encoder.layer.2.crossattention.",
        " and 21 more; ",
        "wrong: query_tokens is (1, 4, 18), should be (1, 5, 18)",
    ):
        assert found in str(error.value)


def test_shards_of_an_interrupted_download(tmp_path):
    reference(tmp_path)
    first, second, *_ = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    (tmp_path / first).unlink()
    whole = (tmp_path / second).read_bytes()
    (tmp_path / second).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"it lacks {first}, which .*; .*as an interrupted download") as error:
        Blip2.from_pretrained(tmp_path)
    assert f"{second} is not a whole safetensors file" in error.value.args[0]


# --- OPT alone --------------------------------------------------------------------------------------------------------

OPT_CASES = {
    "as released": {},
    "350M: a narrow embedding, and norms after": {"word_embed_proj_dim": 10, "do_layer_norm_before": False},
    "a narrow embedding": {"word_embed_proj_dim": 10},
    "another activation, one head": {"activation_function": "gelu_new", "num_attention_heads": 1},
}


@no_grad
@pytest.mark.parametrize("case", OPT_CASES)
def test_opt(tmp_path, case):
    """40 tokens and more, rows padded on the left and on the right; and back to a file that the reference reads."""
    theirs = saved(hf.OPTForCausalLM(hf.OPTConfig(**TEXT | OPT_CASES[case])), tmp_path / "theirs")
    ours = OPT.from_pretrained(tmp_path / "theirs")
    ids = torch.randint(5, 60, (3, 44))
    mask = torch.ones(3, 44, dtype=torch.long)
    mask[0, :9] = mask[1, 30:] = 0
    wanted = theirs(input_ids=ids, attention_mask=mask).logits
    assert_close(ours(ids, mask), wanted, where=mask[..., None].expand_as(wanted))
    assert_close(ours(ids), theirs(input_ids=ids).logits)
    ours.save_pretrained(tmp_path / "ours")
    again = hf.OPTForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert_close(ours(ids, mask), again(input_ids=ids, attention_mask=mask).logits, mask[..., None].expand_as(wanted))
    assert OPT.from_pretrained(tmp_path / "ours").config == ours.config


@no_grad
@pytest.mark.parametrize("norm_first", [True, False])
def test_opt_in_pieces_through_a_cache(norm_first):
    model = OPT(OPTConfig(60, 48, 16, 2, 2, 20, norm_first=norm_first, init_std=STD)).eval()
    ids, cache = torch.randint(5, 60, (2, 44)), model.new_cache()
    pieces = [model(ids[:, a:b], cache=cache) for a, b in ((0, 30), (30, 31), (31, 44))]
    assert_close(torch.cat(pieces, 1), model(ids))


def test_opt_has_so_many_positions():
    model = OPT(OPTConfig(60, 8, 16, 1, 2, 20))
    with pytest.raises(ValueError, match="9 tokens, but the position table serves 8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match=r"attention_mask must be \(1, 4\), got \(1, 3\)"):
        model(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 3))


def test_the_defaults_are_those_of_the_reference():
    """An empty config.json means the same model to both."""
    ours, theirs = Blip2Config.from_hf({"model_type": "blip-2"}), hf.Blip2Config()
    for part in ("vision_config", "qformer_config", "text_config"):
        mine, other = ours.to_hf()[part], getattr(theirs, part).to_dict()
        skipped = {"architectures"} | ({"initializer_range"} if part == "vision_config" else set())  # theirs: 1e-10
        assert {key: other[key] for key in mine if key not in skipped} == {k: mine[k] for k in mine if k not in skipped}
    assert ours.queries == theirs.num_query_tokens
