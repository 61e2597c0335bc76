"""TextClassifier against RobertaForSequenceClassification, through saved files."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig as BertConfig_
from transformers import (
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from vqa_scratch.errors import UserError
from vqa_scratch.models.bert import BertConfig
from vqa_scratch.models.classifier import TextClassifier, check_label

LABELS = ("bad", "so-so", "good")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    torch.manual_seed(1)
    config = RobertaConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=52,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        num_labels=3,
        id2label=dict(enumerate(LABELS)),
    )
    theirs = RobertaForSequenceClassification(config).eval()
    folder = tmp_path_factory.mktemp("roberta")
    theirs.save_pretrained(folder)
    return theirs, TextClassifier.from_pretrained(folder), folder


def batch():
    lengths = torch.tensor([[50], [7], [2]])
    mask = torch.arange(50) < lengths
    return torch.randint(2, 97, (3, 50)).masked_fill(~mask, 1), mask


def test_parity_and_labels(pair):
    theirs, ours, _ = pair
    ids, mask = batch()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, mask), theirs(ids, mask.long()).logits, rtol=0, atol=1e-5)
    assert ours.labels == LABELS
    with pytest.raises(UserError, match="no class .neutral.; its classes are bad, so-so, good"):
        check_label(ours.labels, "neutral")


def test_export_loads_in_transformers(pair, tmp_path):
    _, ours, _ = pair
    ours.save_pretrained(tmp_path)
    again = RobertaForSequenceClassification.from_pretrained(tmp_path).eval()
    ids, mask = batch()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, mask), again(ids, mask.long()).logits, rtol=0, atol=1e-5)
    assert again.config.id2label == dict(enumerate(LABELS))
    assert TextClassifier.from_pretrained(tmp_path).labels == LABELS


def test_old_files_with_pooler_and_position_ids_load(pair, tmp_path):
    _, ours, folder = pair
    tensors = load_file(folder / "model.safetensors")
    tensors["roberta.pooler.dense.weight"], tensors["roberta.pooler.dense.bias"] = torch.zeros(32, 32), torch.zeros(32)
    tensors["roberta.embeddings.position_ids"] = torch.arange(52)[None]
    config = json.loads((folder / "config.json").read_text())
    config.pop("id2label"), config.pop("label2id")
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    model = TextClassifier.from_pretrained(tmp_path)
    assert model.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    ids, mask = batch()
    with torch.no_grad():
        assert torch.equal(model(ids, mask), ours(ids, mask))


def test_wrong_checkpoints_are_refused(pair, tmp_path):
    _, _, folder = pair
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())

    def refused(config, tensors, message):
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=message):
            TextClassifier.from_pretrained(tmp_path)

    refused(config | {"model_type": "bert"}, tensors, "has no classifier.bias: it is not a sequence classifier")
    refused(
        config | {"model_type": "t5"}, tensors, "holds a t5 model; a classifier is one of bert, distilbert, roberta"
    )
    refused(config | {"id2label": {"0": "a", "1": "b"}}, tensors, "names 2 classes, the head has 3")
    headless = {key: value for key, value in tensors.items() if not key.startswith("classifier")}
    refused(config, headless, "not a sequence classifier")
    short = {key: value for key, value in tensors.items() if "layer.1.output.dense.bias" not in key}
    refused(config, short, "missing: encoder.layer.1.output.dense.bias")


def test_misuse_is_refused():
    config = BertConfig(layout="roberta", vocab_size=11, dim=8, layers=1, heads=2, hidden=8, token_types=1, pad_id=1)
    with pytest.raises(UserError, match="different labels"):
        TextClassifier(config, ("a", "a"))


def test_gradients_reach_everything():
    config = BertConfig(layout="roberta", vocab_size=11, dim=8, layers=2, heads=2, hidden=8, token_types=1, pad_id=1)
    model = TextClassifier(config, ("a", "b"))
    model(torch.randint(2, 11, (3, 5))).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.network
@pytest.mark.parametrize("name", ["textattack/roberta-base-CoLA", "cardiffnlp/twitter-roberta-base-sentiment"])
def test_real_reward_models(name):
    theirs = RobertaForSequenceClassification.from_pretrained(name).eval()
    ours = TextClassifier.from_pretrained(name)
    ids = torch.randint(4, 50265, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["safetensors", "half", "pickle"])
def test_the_word_table_of_a_safetensors_file_is_not_copied(pair, tmp_path, kind):
    """Its rows are those of the file, in every kind of file; what is written to them stays in the model."""
    _, ours, _ = pair
    ours.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    if kind == "half":
        save_file({key: tensor.half() for key, tensor in tensors.items()}, path)
    if kind == "pickle":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        path.unlink()
    before = next(iter(tmp_path.glob("*model.*"))).read_bytes()
    model = TextClassifier.from_pretrained(tmp_path)
    table = model.encoder.tokens.weight
    maps = [x.split() for x in Path("/proc/self/maps").read_text().splitlines()] if sys.platform == "linux" else []
    spans = [[int(end, 16) for end in line[0].split("-")] for line in maps if line[-1] == str(path.resolve())]
    assert any(start <= table.data_ptr() < end for start, end in spans) == (kind == "safetensors" and bool(maps))
    torch.testing.assert_close(table, ours.encoder.tokens.weight, rtol=0, atol=1e-4 if kind == "half" else 0)
    with torch.no_grad():
        table.zero_()
    assert next(iter(tmp_path.glob("*model.*"))).read_bytes() == before


RELATIVES = {
    "bert": (BertConfig_, BertForSequenceClassification, {}),
    "distilbert": (DistilBertConfig, DistilBertForSequenceClassification, {}),
    "roberta": (RobertaConfig, RobertaForSequenceClassification, {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
}


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("name", RELATIVES)
def test_every_layout_with_one_output_or_more(name, outputs, tmp_path):
    """Both ways, through files; a reward model has one output."""
    config_class, model_class, more = RELATIVES[name]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    if name == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    torch.manual_seed(3)
    theirs = model_class(
        config_class(vocab_size=97, max_position_embeddings=52, num_labels=outputs, pad_token_id=1, **sizes, **more)
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # biases too
    theirs.save_pretrained(tmp_path / "theirs")
    ours = TextClassifier.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = model_class.from_pretrained(tmp_path / "ours").eval()
    ids, mask = batch()
    with torch.no_grad():
        for model in (ours, lambda i, m: again(i, m.long()).logits):
            torch.testing.assert_close(model(ids, mask), theirs(ids, mask.long()).logits, rtol=0, atol=1e-5)
    assert len(ours.labels) == outputs
