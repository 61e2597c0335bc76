"""Tiny models and subjects for the tests of `vqa_scratch.study`; weights are spread so that attention is uneven."""

import torch

from vqa_scratch.models import GPT2, T5, Bert, BertConfig, GPT2Config, T5Config, ViT, ViTConfig
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.study.subject import T5Subject, VQASubject

PATCHES = 9


def spread(model: torch.nn.Module, std: float = 0.25) -> torch.nn.Module:
    """Larger random weights, in eval mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
    return model.eval()


def tiny_vqa(fusion: str = "tokens", heads: int = 4) -> VQAModel:
    image = ViT(ViTConfig(image_size=24, patch_size=8, dim=16, layers=2, heads=heads, hidden=32))
    text = Bert(BertConfig(layout="distilbert", vocab_size=40, dim=16, layers=2, heads=heads, hidden=32, token_types=0))
    decoder = GPT2(
        GPT2Config(
            vocab_size=30, max_positions=16, dim=16, layers=2, heads=heads, add_cross_attention=True, bos_id=1, eos_id=2
        )
    )
    return spread(VQAModel(image, text, decoder, fusion))


def tiny_vqa_subject(fusion: str = "tokens", model: VQAModel | None = None) -> VQASubject:
    labels = ("[CLS]", "what", "is", "it", "[SEP]")
    model = tiny_vqa(fusion) if model is None else model
    return VQASubject(model, torch.randn(1, 3, 24, 24), [3, 7, 8, 9, 4], labels, (0, 4), [1])


def tiny_t5(vocab_size: int = 30) -> T5:
    config = T5Config(vocab_size=vocab_size, dim=16, head_dim=4, hidden=24, encoder_layers=2, decoder_layers=2, heads=4)
    return spread(T5(config), 0.1)


def tiny_t5_subject() -> T5Subject:
    return T5Subject(tiny_t5(), [5, 9, 3, 12, 7, 1], ("a", "b", "c", "d", "e", "</s>"))
