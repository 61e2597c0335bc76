"""Which parameters are decayed, and which Muon takes: by the kind of layer, and as the first edition grouped them.

Checkpoints index the optimizers' state by this order, so it must not change for a model that runs were made with.
"""

import pytest
from torch import nn

from vqa_scratch.connectors import connect
from vqa_scratch.models import GPT2, Bert, BertConfig, GPT2Config, ViT, ViTConfig
from vqa_scratch.models.resnet import ResNet, ResNetConfig
from vqa_scratch.models.vilt import ViLT, ViLTClassifier, ViLTConfig
from vqa_scratch.models.vit import ConvStem
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.training.parameter_groups import split_parameters

DECODER = GPT2Config(20, 16, 12, 2, 2, hidden=10, add_cross_attention=True)
IMAGE = ViTConfig(16, 8, 3, 12, 2, 2, 10)


def by_words_in_names(model):
    """The rule of the first edition."""
    groups = ([], [], [])
    for name, p in model.named_parameters():
        table = any(word in name for word in ("position", "token", "modality", "places"))
        group = 0 if ".blocks." in f".{name}" and p.ndim == 2 else 1 if p.ndim >= 2 and not table else 2
        if p.requires_grad:
            groups[group].append(p)
    return groups


def joined(image, text, **connector):
    decoder = GPT2(DECODER)
    return VQAModel(image, text, connect(connector, image, text, decoder), decoder)


def text(layout):
    return Bert(BertConfig(layout, 20, 12, 2, 2, 10, 16, token_types=0 if layout == "distilbert" else 2))


def vilt():
    return ViLTClassifier(ViLT(ViLTConfig(16, 8, 3, 12, 2, 2, 10, vocab_size=20, max_positions=8)), ("yes", "no"))


MODELS = {
    "tokens": lambda: joined(ViT(IMAGE, ConvStem(3, 12, 8)), text("bert"), kind="tokens", grid=(2, 2)),
    "mean": lambda: joined(ViT(IMAGE), text("distilbert"), kind="mean"),
    "vilt": vilt,
    "caption": lambda: joined(ResNet(ResNetConfig()), None, kind="tokens", grid=(7, 7)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("frozen", [False, True])
def test_groups_and_their_order_are_those_of_old_checkpoints(name, frozen):
    model = MODELS[name]()
    if frozen:
        next(m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)).requires_grad_(False)
    names = {id(p): name for name, p in model.named_parameters()}
    found, expected = ([[names[id(p)] for p in g] for g in f(model)] for f in (split_parameters, by_words_in_names))
    assert found == expected and all(found)
