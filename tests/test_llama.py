"""Llama and what is built like it against the reference models: files they saved are read, and written back."""

import json

import pytest
import torch
import transformers as hf
from helpers import STD, assert_close, saved, text_batch

from vqa_scratch.errors import UserError
from vqa_scratch.models import Llama, LlamaConfig, released
from vqa_scratch.models.llama_experts import Mixture
from vqa_scratch.nn.memory import Memory
from vqa_scratch.nn.rotary import Rotary
from vqa_scratch.study import trace
from vqa_scratch.weights.files import read_safetensors, write_safetensors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
no_grad = torch.no_grad()
SIZES = {
    "vocab_size": 60,
    "hidden_size": 64,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": STD,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 40, "rope_theta": 50.0}  # low, mixed and kept frequencies, all three
QWEN2_MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "num_key_value_heads": 2}
QWEN2_MOE |= {"shared_expert_intermediate_size": 40}
CASES = {
    "one head of keys": ("Llama", {"num_key_value_heads": 1}),
    "two heads of keys, tied": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "as many heads of keys": ("Llama", {"rms_norm_eps": 1e-3}),
    "heads of their own size": ("Llama", {"head_dim": 10, "num_key_value_heads": 2}),
    "all biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10_000.0}}),
    "Qwen2": ("Qwen2", {"num_key_value_heads": 2, "eos_token_id": [7, 9]}),
    "Persimmon": ("Persimmon", {}),
    "Persimmon without norms of q and k": ("Persimmon", {"qk_layernorm": False}),
    "Mixtral": ("Mixtral", {"num_local_experts": 5, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "Qwen2Moe": ("Qwen2Moe", {**QWEN2_MOE, "norm_topk_prob": True}),
    "Qwen2Moe with MLPs": ("Qwen2Moe", {**QWEN2_MOE, "num_hidden_layers": 4, "decoder_sparse_step": 2}),
    "Qwen2Moe with an MLP by name": ("Qwen2Moe", {**QWEN2_MOE, "num_hidden_layers": 3, "mlp_only_layers": [1]}),
    "Olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "num_key_value_heads": 2, "clip_qkv": 0.8}),
    "Olmoe, weights that sum to 1": ("Olmoe", {"num_experts": 3, "num_experts_per_tok": 3, "norm_topk_prob": True}),
}


def reference(folder, case):
    family, changes = CASES[case]
    config = getattr(hf, f"{family}Config")(**SIZES | changes)
    return saved(getattr(hf, f"{family}ForCausalLM")(config), folder)


@no_grad
@pytest.mark.parametrize("case", CASES)
def test_logits_and_back(tmp_path, case):
    theirs = reference(tmp_path / "theirs", case)
    model = Llama.from_pretrained(tmp_path / "theirs")
    ids, mask = text_batch()
    wanted = theirs(ids, attention_mask=mask).logits
    assert_close(model(ids, mask), wanted, where=mask)
    assert_close(model(ids), theirs(ids).logits)
    hidden = model.hidden(model.embed(ids), mask)
    assert_close(hidden @ model.head.T, wanted, where=mask)
    model.save_pretrained(tmp_path / "ours")
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert_close(back.eval()(ids, attention_mask=mask).logits, wanted, where=mask)
    files = [read_safetensors(tmp_path / folder / "model.safetensors") for folder in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    again = Llama.from_pretrained(tmp_path / "ours")
    assert again.config == model.config and torch.equal(again(ids, mask), model(ids, mask))


@no_grad
@pytest.mark.parametrize("case", CASES)
def test_left_padding_and_a_cache_in_two_chunks(tmp_path, case):
    theirs = reference(tmp_path, case)
    model = Llama.from_pretrained(tmp_path)
    ids, mask = text_batch(lengths=(43, 31, 5, 1))
    ids, mask = ids.flip(1), mask.flip(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    wanted = theirs(ids, attention_mask=mask, position_ids=positions).logits
    assert_close(model(ids, mask), wanted, where=mask)
    assert_close(model(ids, mask)[2:3, -5:], model(ids[2:3, -5:]))
    for first in (1, 20, 42):
        cache = model.new_cache()
        chunks = [model(ids[:, :first], mask[:, :first], cache=cache), model(ids[:, first:], mask, cache=cache)]
        assert cache.length == 43 and cache[0].contents[0].shape[1] == model.config.kv_heads
        # another product for another number of rows: the sums are in another order
        assert_close(torch.cat(chunks, 1), wanted, where=mask, tolerance=2e-5)


def small(**changes) -> Llama:
    sizes = {"vocab_size": 60, "max_positions": 64, "dim": 24, "layers": 2, "heads": 4, "hidden": 20, "init_std": STD}
    return Llama(LlamaConfig(**sizes | changes)).eval()


LLAMA3_1 = Rotary(500_000.0, kind="llama3", factor=8.0, low=1.0, high=4.0, original=8192)


@pytest.mark.parametrize("rotary", [Rotary(), Rotary(25_000.0, 0.5), Rotary(kind="linear", factor=4.0), LLAMA3_1])
def test_scores_depend_on_distances_and_lengths_stay(rotary):
    """The score of q at i and k at j is that at i + 7 and j + 7; a turn changes no length, and none at position 0."""
    q, k = torch.randn(2, 1, 1, 9, 16).double()
    here, there = (rotary.rotation(torch.arange(9) + shift, 16) for shift in (0, 7))
    scores = here(q) @ here(k).transpose(-1, -2)
    shifted = there(q) @ there(k).transpose(-1, -2)
    assert (scores - shifted).abs().max() < 1e-5  # cosines are those of fp32 angles
    assert (scores - q @ k.transpose(-1, -2)).abs().max() > 0.1
    assert (here(q).norm(dim=-1) - q.norm(dim=-1)).abs().max() < 1e-6
    assert torch.equal(here(q)[..., 0, :], q[..., 0, :])
    left = int(16 * rotary.share)
    assert torch.equal(here(q)[..., left:], q[..., left:])
    copy = q.clone()
    here.in_place(copy)
    assert (copy - here(q)).abs().max() < 1e-12


def test_a_rotation_is_a_complex_product():
    """Su et al. 2021, equation 16: the pair (i, i + 4) of a head of 8 is multiplied by exp(1j * position * f_i)."""
    x, position = torch.randn(1, 8, dtype=torch.float64), 5
    pairs = torch.complex(x[:, :4], x[:, 4:])
    pairs = pairs * torch.polar(torch.ones(4).double(), position * 10_000.0 ** (-torch.arange(4).double() / 4))
    turned = Rotary().rotation(torch.tensor([position]), 8)(x)
    assert (turned - torch.cat([pairs.real, pairs.imag], 1)).abs().max() < 1e-6


def test_llama3_frequencies_meet_at_both_ends():
    """By hand: high frequencies stay, low ones are an eighth, and of 64 some lie between."""
    plain, scaled = (rotary.frequencies(128) for rotary in (Rotary(500_000.0), LLAMA3_1))
    ratio, turns = scaled / plain, 8192 * plain / 6.283185307
    assert torch.equal(ratio[turns > 4.001], torch.ones(int((turns > 4.001).sum())))
    assert (ratio[turns < 0.999] - 1 / 8).abs().max() < 1e-6
    between = ratio[(turns > 1.001) & (turns < 3.999)]
    assert len(between) and ((between > 1 / 8) & (between < 1)).all() and (between.diff() < 0).all()


@no_grad
def test_as_many_heads_of_keys_as_copies_of_fewer():
    """A model whose two heads of keys and values are copied for their readers says what the grouped one says."""
    grouped, full = small(kv_heads=2), small(kv_heads=4)
    weights = grouped.state_dict()
    for name in [name for name in weights if "qkv" in name]:
        q, k, v = weights[name].split((24, 12, 12))
        copied = (x.unflatten(0, (2, 6)).repeat_interleave(2, 0).flatten(0, 1) for x in (k, v))
        weights[name] = torch.cat([q, *copied])
    full.load_state_dict(weights)
    ids, mask = text_batch()
    assert_close(grouped(ids, mask), full(ids, mask), where=mask)


@no_grad
def test_later_tokens_change_nothing_earlier():
    model, (ids, _) = small(kv_heads=2), text_batch()
    whole = model(ids)
    for position in (1, 20, 43):
        other = ids.clone()
        other[:, position] = (ids[:, position] + 1) % 60
        changed = model(other)
        assert torch.equal(changed[:, :position], whole[:, :position])
        assert (changed[:, position:] - whole[:, position:]).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("changes", [{"kv_heads": 1}, {"norm": "layer", "qk_norm": True, "gated": False}])
def test_every_parameter_trains(changes):
    model, (ids, mask) = small(**changes).train(), text_batch()
    model(ids, mask).square().mean().backward()
    for name, parameter in model.named_parameters():
        if name.endswith("k_norm.bias"):  # added to all keys alike, so only what rotation makes of it counts
            continue
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@no_grad
def test_a_trace_shows_the_weights_that_ran():
    model, (ids, mask) = small(kv_heads=2), text_batch()
    with trace(model) as t:
        model(ids, mask)
    assert t.pattern("decoder.1.self").shape == (4, 4, 44, 44) and t.certificate().worst < 1e-5


# ---------------------------------------------------------------------------------------------- files


def edited(folder, **changes) -> None:
    """Change the config.json of a folder; None takes a field away."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@no_grad
@pytest.mark.parametrize("spelled", ["type", "rope_type"])
@pytest.mark.parametrize("case", ["llama3", "linear", "Persimmon"])
def test_files_of_older_releases(tmp_path, case, spelled):
    """`rope_theta` and `rope_scaling` in config.json, and tables of frequencies among the weights."""
    theirs = reference(tmp_path, case)
    new = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    old = {"rope_theta": new.pop("rope_theta"), "partial_rotary_factor": new.pop("partial_rotary_factor", None)}
    kind = new.pop("rope_type")
    edited(tmp_path, rope_parameters=None, rope_scaling={spelled: kind, **new} if new else None, **old)
    tensors = read_safetensors(tmp_path / "model.safetensors")
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    tensors |= {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    ids, mask = text_batch()
    model = Llama.from_pretrained(tmp_path)
    assert_close(model(ids, mask), theirs(ids, attention_mask=mask).logits, where=mask)
    assert model.to_hf()["rope_parameters"].items() >= {"rope_type": kind, "rope_theta": old["rope_theta"]}.items()


@no_grad
def test_files_in_bf16(tmp_path):
    reference(tmp_path, "Qwen2").bfloat16().save_pretrained(tmp_path)
    theirs = hf.Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model, (ids, mask) = Llama.from_pretrained(tmp_path), text_batch()
    assert model.head.dtype == torch.float32
    assert_close(model(ids, mask), theirs(ids, attention_mask=mask).logits, where=mask)


def test_end_tokens_are_kept(tmp_path):
    reference(tmp_path / "theirs", "Qwen2")
    model = Llama.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    for folder in ("theirs", "ours"):
        assert Llama.from_pretrained(tmp_path / folder).config.eos_id == (7, 9)
    assert hf.AutoConfig.from_pretrained(tmp_path / "ours").eos_token_id == [7, 9]
    assert LlamaConfig.from_hf(model.to_hf() | {"eos_token_id": [7, 9, 4]}).eos_id == (7, 9, 4)
    assert LlamaConfig.from_hf(model.to_hf() | {"eos_token_id": [7]}).eos_id == 7
    assert LlamaConfig.from_hf(model.to_hf() | {"eos_token_id": 3}).to_hf()["eos_token_id"] == 3
    assert LlamaConfig.from_hf(model.to_hf() | {"eos_token_id": None}).eos_id is None


@no_grad
def test_a_head_in_the_file_of_a_tied_model(tmp_path):
    reference(tmp_path, "two heads of keys, tied")
    tensors = {key: tensor.clone() for key, tensor in read_safetensors(tmp_path / "model.safetensors").items()}
    head = tensors["model.embed_tokens.weight"].clone()
    write_safetensors(tmp_path / "model.safetensors", tensors | {"lm_head.weight": head})
    model = Llama.from_pretrained(tmp_path)
    assert model.lm_head is None and torch.equal(model.head, head)
    write_safetensors(tmp_path / "model.safetensors", tensors | {"lm_head.weight": head + 1e-3})
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight"):
        Llama.from_pretrained(tmp_path)


def rope(**changes) -> dict:
    return {"rope_parameters": {"rope_theta": 100.0, "rope_type": "linear", "factor": 2.0} | changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sliding_window": 4096}, "config.json asks for sliding_window = 4096; here it can only be None"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "asks for layers with a sliding window"),
        (
            rope(rope_type="yarn"),
            "rope_parameters is of type 'yarn'; here rotary positions are default, linear, llama3",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling is of type 'dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters differs between layers"),
        (rope(factor=None), "rope_parameters: factor must be a number above 0, not None"),
        (rope(factor=float("nan")), "rope_parameters: factor must be a number above 0, not nan"),
        (rope(rope_theta="10"), "rope_theta must be a number above 0, not '10'"),
        (rope(rope_type=[]), r"is of type \[\]"),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor must be below high_freq_factor"),
        (rope(partial_rotary_factor=0.4), "rotary positions turn pairs: not 3 of the 8 numbers of a head"),
        (rope(partial_rotary_factor=1.5), "rotary positions turn pairs: not 12 of the 8 numbers of a head"),
        ({"rope_parameters": [1]}, "'rope_parameters' is"),
        ({"num_key_value_heads": 3}, "3 heads of keys and values cannot serve 4 of queries evenly"),
        ({"hidden_size": 33, "head_dim": None}, "width 33 does not divide into 4 heads"),
        (
            {"eos_token_id": "end"},
            r"eos_token_id must be a whole number from 0 to [\d,]*, or a list of such, not 'end'",
        ),
        ({"eos_token_id": [2, None]}, r"eos_token_id must be .*, not \[2, None\]"),
        ({"eos_token_id": []}, r"eos_token_id must be .*, not \[\]"),
        ({"layer_types": "full_attention"}, "'layer_types' is"),
        ({"model_type": "mamba"}, "describes a model of type 'mamba', expected llama, qwen2, persimmon, mixtral, "),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "9 experts a token of 8: must be from 1 to 8$"),
        ({"model_type": "mixtral", "sliding_window": 4096}, "asks for sliding_window = 4096; here it can only be None"),
        ({"model_type": "olmoe", "num_experts": 0}, "num_experts must be a whole number from 1 to 1,000"),
        ({"model_type": "olmoe", "norm_topk_prob": 1}, "norm_topk_prob must be true or false, not 1"),
        (
            {"model_type": "qwen2_moe", "mlp_only_layers": [1.5]},
            r"mlp_only_layers must be a list of layers.* not \[1.5",
        ),
        ({"model_type": "qwen2_moe", "decoder_sparse_step": 0}, "decoder_sparse_step must be a whole number from 1 to"),
        ({"hidden_act": "swish"}, "asks for activation 'swish'"),
    ],
)
def test_what_is_not_supported_is_one_line(changes, said):
    config = small(dim=32).to_hf() | changes
    with pytest.raises(UserError, match=said) as caught:
        LlamaConfig.from_hf(config)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_misuse_is_named(tmp_path):
    model = small()
    with pytest.raises(ValueError, match="this decoder has no cross-attention: .*or add gated layers"):
        model.hidden(torch.zeros(1, 2, 24), memory=[Memory(torch.zeros(1, 3, 24))])
    with pytest.raises(ValueError, match=r"attention_mask must be \(1, 4\), got \(1, 3\)"):
        model(torch.ones(1, 4).long(), torch.ones(1, 3))
    small(kv_heads=2).save_pretrained(tmp_path)
    edited(tmp_path, num_key_value_heads=1)
    with pytest.raises(UserError, match="does not fit Llama: wrong: .*k_proj.weight is .12, 24., should be .6, 24."):
        Llama.from_pretrained(tmp_path)
    edited(tmp_path, num_key_value_heads=2, tie_word_embeddings=True)
    with pytest.raises(UserError, match="lm_head.weight differs"):
        Llama.from_pretrained(tmp_path)


def test_experts_that_a_layout_does_not_have_are_not_saved(tmp_path):
    for changes in ({"layout": "llama"}, {"layout": "mixtral", "renormalise": False}, {"layout": "olmoe", "every": 2}):
        layout = changes.pop("layout")
        model = small(layout=layout, experts=Mixture(**{"experts": 3, "hidden": 20, **changes}))
        with pytest.raises(UserError, match=f"a model of type '{layout}' has no such experts: Mixture"):
            model.save_pretrained(tmp_path)


def test_the_table_of_decoders_opens_each(tmp_path):
    for layout in LlamaConfig.LAYOUTS:
        config = {"model_type": layout, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        config |= {"intermediate_size": 8, "vocab_size": 9}
        model = released.decoder_of(config)
        model.save_pretrained(tmp_path)
        opened = released.decoder(tmp_path, cross_attention=False)
        assert type(opened) is Llama and opened.config == model.config and opened.config.layout == layout
        usual = {"persimmon": Rotary(share=0.5), "mixtral": Rotary(1e6)}.get(layout, Rotary())
        assert opened.config.rotary == usual and (opened.config.activation == "relu2") == (layout == "persimmon")
    with pytest.raises(UserError, match="'olmoe'; decoders with cross-attention are gpt2$"):
        released.decoder(tmp_path, cross_attention=True)


def test_an_expert_or_a_row_of_a_router_that_is_missing_is_named(tmp_path):
    reference(tmp_path, "Mixtral")
    whole = {key: tensor.clone() for key, tensor in read_safetensors(tmp_path / "model.safetensors").items()}
    router, expert = (f"model.layers.1.block_sparse_moe.{name}.weight" for name in ("gate", "experts.3.w2"))
    for changes, said in (
        (
            {router: whole[router][:4].clone()},
            r"wrong: .*layers.1.block_sparse_moe.gate.weight is \(4, 64\), .* \(5, 64\)",
        ),
        ({expert: None}, "missing: layers.1.block_sparse_moe.experts.3.w2.weight$"),
        (
            {expert.replace("3.w2", "5.w2"): whole[expert].clone()},
            "unexpected: .*layers.1.block_sparse_moe.experts.5.w2",
        ),
        ({router: whole[router] * torch.nan}, "layers.1.block_sparse_moe.gate.weight in .* holds NaN"),
    ):
        tensors = {key: tensor for key, tensor in (whole | changes).items() if tensor is not None}
        write_safetensors(tmp_path / "model.safetensors", tensors)
        with pytest.raises(UserError, match=said) as caught:
            Llama.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)
