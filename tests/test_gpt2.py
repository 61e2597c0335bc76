"""GPT-2 against the reference model, through files that it saved and our loader read, and back; caches; masks."""

import logging

import pytest
import torch
import transformers as hf
from helpers import STD, assert_close, saved, text_batch

from vqa_scratch.errors import UserError
from vqa_scratch.models import GPT2, GPT2Config
from vqa_scratch.nn import Memory

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
no_grad = torch.no_grad()


def gpt2_reference(folder, kind=hf.GPT2LMHeadModel, **changes):
    sizes = {"vocab_size": 60, "n_embd": 39, "n_layer": 3, "n_head": 3, "n_positions": 64, "initializer_range": STD}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2}
    return saved(kind(hf.GPT2Config(**sizes | changes)), folder)


GPT2_CASES = {
    "plain": {},
    "cross-attention": {"add_cross_attention": True},
    "scaled by layer, own inner width": {"scale_attn_by_inverse_layer_idx": True, "n_inner": 31},
    "unscaled, one head, relu": {
        "scale_attn_weights": False,
        "n_head": 1,
        "activation_function": "relu",
        "layer_norm_epsilon": 1e-3,
    },
}


@no_grad
@pytest.mark.parametrize("case", GPT2_CASES)
def test_gpt2_and_back(tmp_path, case):
    reference = gpt2_reference(tmp_path / "theirs", **GPT2_CASES[case])
    model = GPT2.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    back, info = hf.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    back.eval()
    ids, mask = text_batch()
    cross = {}
    if model.config.add_cross_attention:
        memory_mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0, 1] + [0] * 5, [1] * 7])
        cross = {"encoder_hidden_states": torch.randn(4, 7, 39), "encoder_attention_mask": memory_mask}
    # Padding stands on the right, where the reference's own positions (0, 1, 2, ...) are the right ones.
    theirs = reference(ids, attention_mask=mask, **cross).logits
    assert_close(model(ids, mask, **cross), theirs, where=mask)
    assert_close(back(ids, attention_mask=mask, **cross).logits, theirs, where=mask)
    read = [Memory(*cross.values())] if cross else None
    hidden = model.hidden(model.embed(ids), mask, memory=read)
    assert_close(model.logits(hidden), theirs, where=mask)
    assert_close(hidden @ model.head.T, theirs, where=mask)
    if cross:  # the reference skips the sublayer when there is nothing to read; so do we
        assert_close(model(ids[:1]), reference(ids[:1]).logits)
        assert (model(ids[:1]) - theirs[:1]).abs().max() > 0.1
        cross = {key: value[3:] for key, value in cross.items()}
    assert_close(model(ids[3:, :1], **cross), reference(ids[3:, :1], **cross).logits)


@no_grad
def test_gpt2_left_padding_gets_the_positions_it_needs(tmp_path):
    reference = gpt2_reference(tmp_path)
    model = GPT2.from_pretrained(tmp_path)
    ids, mask = text_batch()
    ids, mask = ids.flip(1), mask.flip(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    theirs = reference(ids, attention_mask=mask, position_ids=positions).logits
    assert_close(model(ids, mask), theirs, where=mask)
    assert_close(model(ids, mask)[2:3, -5:], model(ids[2:3, -5:]))


@no_grad
@pytest.mark.parametrize("kind", [hf.GPT2Model, hf.GPT2LMHeadModel])
def test_gpt2_file_without_prefix_with_mask_buffers(tmp_path, kind):
    """The layout of "gpt2" on the Hub: bare keys, and the causal masks saved as weights."""
    from safetensors.torch import load_file, save_file

    reference = gpt2_reference(tmp_path, kind)
    file = tmp_path / "model.safetensors"
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in load_file(file).items()}
    for layer in range(3):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, file)
    ids, mask = text_batch()
    model = GPT2.from_pretrained(tmp_path)
    hidden = (reference if kind is hf.GPT2Model else reference.transformer)(ids, attention_mask=mask).last_hidden_state
    assert_close(model.hidden(model.embed(ids), mask), hidden, where=mask)


def test_gpt2_file_with_a_head(tmp_path):
    """A head that repeats the embedding is read past; one with weights of its own is not quietly lost."""
    from safetensors.torch import load_file, save_file

    gpt2_reference(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    head = tensors["transformer.wte.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, file)
    GPT2.from_pretrained(tmp_path)
    save_file(tensors | {"lm_head.weight": head + 1e-3}, file)
    with pytest.raises(UserError, match="lm_head.weight differs from transformer.wte.weight, but this model shares"):
        GPT2.from_pretrained(tmp_path)


@no_grad
def test_cross_attention_on_a_plain_checkpoint(tmp_path, caplog):
    """The one exception from strictness: those weights start at random, the rest are read, one line says so."""
    reference = gpt2_reference(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = GPT2.from_pretrained(tmp_path, add_cross_attention=True)
    assert caplog.messages == [f"{tmp_path} has no cross-attention: 24 of its parameters start at random"]
    ids, mask = text_batch()
    assert_close(model(ids, mask), reference(ids, attention_mask=mask).logits, where=mask)
    for name, std in (("q", STD), ("kv", STD), ("out", STD / 6**0.5)):
        weight = torch.cat([getattr(block.cross, name).weight.flatten() for block in model.blocks])
        # 4563 draws or more: the sample's deviation is within 5 % (1 % standard error)
        assert abs(weight.std().item() / std - 1) < 0.05
        assert all(getattr(block.cross, name).bias.abs().max() == 0 for block in model.blocks)
    caplog.clear()
    GPT2.from_pretrained(tmp_path)
    assert not caplog.messages


def small_gpt2():
    config = GPT2Config(60, 64, 24, 2, 2, hidden=30, init_std=STD, add_cross_attention=True)
    return GPT2(config).eval()


@no_grad
def test_later_tokens_change_nothing_earlier():
    model = small_gpt2()
    ids, _ = text_batch()
    memory = torch.randn(4, 5, 24)
    whole = model(ids, encoder_hidden_states=memory)
    for position in (1, 20, 43):
        other = ids.clone()
        other[:, position] = (ids[:, position] + 1) % 60
        changed = model(other, encoder_hidden_states=memory)
        assert torch.equal(changed[:, :position], whole[:, :position])
        assert (changed[:, position:] - whole[:, position:]).abs().amax(-1).min() > 1e-3


@no_grad
@pytest.mark.parametrize("side", ["none", "left"])
def test_cache_equals_no_cache_token_by_token(side):
    model = small_gpt2()
    ids, mask = text_batch()
    mask = torch.ones_like(mask) if side == "none" else mask.flip(1)
    memory = [Memory(torch.randn(2, 5, 24), torch.rand(2, 5) > 0.3, repeat=2), Memory(torch.randn(4, 3, 24))]
    whole = model(ids, mask, memory=memory)
    for first in (1, 30):
        cache = model.new_cache()
        steps = [model(ids[:, :first], mask[:, :first], memory=memory, cache=cache)]
        for t in range(first, ids.shape[1]):
            steps.append(model(ids[:, t : t + 1], mask[:, : t + 1], cache=cache))
        assert cache.length == ids.shape[1]
        assert_close(torch.cat(steps, 1), whole, where=mask)
    if side == "none":  # no mask at all means the same
        cache = model.new_cache()
        model(ids[:, :-1], memory=memory, cache=cache)
        assert_close(model(ids[:, -1:], cache=cache), whole[:, -1:])
        assert_close(model(ids, memory=memory), whole)


def test_gpt2_trains_through_every_parameter():
    """Both cross-attended parts, in train mode, give every parameter a gradient."""
    model = small_gpt2().train()
    ids, mask = text_batch()
    memory = [Memory(torch.randn(2, 5, 24), None, repeat=2), Memory(torch.randn(4, 3, 24))]
    model(ids, mask, memory=memory).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


def test_gpt2_names_what_does_not_fit():
    model = GPT2(GPT2Config(60, 8, 24, 1, 2))
    with pytest.raises(ValueError, match="9 tokens, but the position table serves 8"):
        model(torch.ones(1, 9).long())
    with pytest.raises(ValueError, match=r"attention_mask must be \(1, 4\), got \(1, 3\)"):
        model(torch.ones(1, 4).long(), torch.ones(1, 3))
    with pytest.raises(ValueError, match="this decoder has no cross-attention: build GPT2 with add_cross"):
        model(torch.ones(1, 4).long(), encoder_hidden_states=torch.randn(1, 2, 24))
    with pytest.raises(ValueError, match="encoder_hidden_states or memory, not both"):
        states = torch.randn(1, 2, 24)
        small_gpt2()(torch.ones(1, 4).long(), encoder_hidden_states=states, memory=[Memory(states)])
