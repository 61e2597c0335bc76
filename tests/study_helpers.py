"""Tiny models and subjects for the tests of `vqa_scratch.study`; weights are spread so that attention is uneven."""

from functools import partial
from types import SimpleNamespace

import torch
from model_helpers import tiny_image

from vqa_scratch.connectors import CONNECTORS, connect, connector_class
from vqa_scratch.models import (
    GPT2,
    OPT,
    T5,
    Bert,
    BertConfig,
    Blip2,
    Blip2Config,
    GPT2Config,
    OPTConfig,
    QFormerConfig,
    ResNet,
    ResNetConfig,
    T5Config,
    ViLT,
    ViLTClassifier,
    ViLTConfig,
    ViTConfig,
)
from vqa_scratch.models.resnet import group_norm
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.study.subject import Blip2Subject, T5Subject, ViLTSubject, VQASubject

PATCHES = 9
QUESTION, QUESTION_IDS = ("[CLS]", "what", "is", "it", "[SEP]"), [3, 7, 8, 9, 4]


def spread(model: torch.nn.Module, std: float = 0.25) -> torch.nn.Module:
    """Larger random weights, in eval mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
    return model.eval()


def tiny_decoder(heads: int = 4, cross: bool = True) -> GPT2:
    return GPT2(GPT2Config(30, 32, 16, 2, heads, add_cross_attention=cross, bos_id=1, eos_id=2))


def tiny_vqa(kind: str = "tokens", heads: int = 4) -> VQAModel:
    """A model with the connector of that name."""
    connector = connector_class(kind)
    image = tiny_image(kind, heads)
    sizes = BertConfig(layout="distilbert", vocab_size=40, dim=16, layers=2, heads=heads, hidden=32, token_types=0)
    text = Bert(sizes) if connector.reads_text else None
    decoder = tiny_decoder(heads, connector.needs_cross_attention())
    more = connector.sizes_for((3, 3), SimpleNamespace(queries=3, heads=heads))
    return spread(VQAModel(image, text, connect({"kind": kind, **more}, image, text, decoder), decoder))


def tiny_vqa_subject(kind: str = "tokens", model: VQAModel | None = None) -> VQASubject:
    model = tiny_vqa(kind) if model is None else model
    asked = ((), (), ()) if model.text is None else (QUESTION_IDS, QUESTION, (0, 4))
    return VQASubject(model, torch.randn(1, 3, 24, 24), [1, 5] if model.text is None else [1], *asked)


def tiny_caption_subject() -> VQASubject:
    image, decoder = ResNet(ResNetConfig("basic", (1, 1), (16, 16)), group_norm), tiny_decoder()
    connector = connect({"kind": "tokens", "grid": [3, 3]}, image, None, decoder)
    model = spread(VQAModel(image, None, connector, decoder), 0.1)
    return VQASubject(model, torch.randn(1, 3, 24, 24), [1], max_new_tokens=8)


def tiny_vilt(labels: tuple[str, ...] = ("red", "blue", "two")) -> ViLTClassifier:
    config = ViLTConfig(
        image_size=24, patch_size=8, dim=16, layers=2, heads=4, hidden=32, vocab_size=40, max_positions=16
    )
    return spread(ViLTClassifier(ViLT(config), labels))


def tiny_vilt_subject(model: ViLTClassifier | None = None) -> ViLTSubject:
    model = tiny_vilt() if model is None else model
    return ViLTSubject(model, torch.randn(1, 3, 24, 24), QUESTION_IDS, QUESTION, (0, 4))


def tiny_opt() -> OPT:
    return OPT(OPTConfig(vocab_size=30, max_positions=32, dim=16, layers=2, heads=4, hidden=32, bos_id=1, eos_id=2))


def tiny_blip2_subject() -> Blip2Subject:
    """Two queries' blocks, the first of which reads the image."""
    config = Blip2Config(
        vision=ViTConfig(image_size=24, patch_size=8, dim=16, layers=2, heads=4, hidden=32),
        qformer=QFormerConfig(dim=16, layers=2, heads=4, hidden=32),
        language=tiny_opt().config,
        queries=3,
        image_token=29,
    )
    return Blip2Subject(spread(Blip2(config)), torch.randn(1, 3, 24, 24), [1, 5], 6)


def tiny_t5(vocab_size: int = 30) -> T5:
    config = T5Config(vocab_size=vocab_size, dim=16, head_dim=4, hidden=24, encoder_layers=2, decoder_layers=2, heads=4)
    return spread(T5(config), 0.1)


def tiny_t5_subject() -> T5Subject:
    return T5Subject(tiny_t5(), [5, 9, 3, 12, 7, 1], ("a", "b", "c", "d", "e", "</s>"))


SUBJECTS = {
    **{kind: partial(tiny_vqa_subject, kind) for kind in CONNECTORS},
    "t5": tiny_t5_subject,
    "caption": tiny_caption_subject,
    "vilt": tiny_vilt_subject,
    "blip2": tiny_blip2_subject,
}
