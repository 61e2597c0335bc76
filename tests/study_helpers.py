"""Tiny models and subjects for the tests of `vqa_scratch.study`; weights are spread so that attention is uneven."""

import torch
from torch import nn

from vqa_scratch.models import (
    GPT2,
    OPT,
    T5,
    Bert,
    BertConfig,
    Blip2,
    Blip2Config,
    CaptionModel,
    GPT2Config,
    OPTConfig,
    QFormerConfig,
    ResNet,
    ResNetConfig,
    T5Config,
    ViLT,
    ViLTClassifier,
    ViLTConfig,
    ViT,
    ViTConfig,
)
from vqa_scratch.models.resnet import group_norm
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.study.base import ImageSubject, block_attentions, image_source
from vqa_scratch.study.subject import Blip2Subject, CaptionSubject, T5Subject, ViLTSubject, VQASubject

PATCHES = 9
QUESTION, QUESTION_IDS = ("[CLS]", "what", "is", "it", "[SEP]"), [3, 7, 8, 9, 4]


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
    model = tiny_vqa(fusion) if model is None else model
    return VQASubject(model, torch.randn(1, 3, 24, 24), QUESTION_IDS, QUESTION, (0, 4), [1])


def tiny_caption_subject() -> CaptionSubject:
    image = ResNet(ResNetConfig("basic", (1, 1), (16, 16)), group_norm)
    decoder = GPT2(GPT2Config(30, 16, 16, 2, 4, add_cross_attention=True, bos_id=1, eos_id=2))
    return CaptionSubject(spread(CaptionModel(image, decoder, grid=3), 0.1), torch.randn(1, 3, 24, 24), [1], 8)


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


class TinyLlava(nn.Module):
    """Patches, projected, before the words of an OPT."""

    def __init__(self) -> None:
        super().__init__()
        self.image = ViT(ViTConfig(image_size=24, patch_size=8, dim=16, layers=2, heads=4, hidden=32))
        self.projection, self.language = nn.Linear(16, 16), tiny_opt()

    def embeddings(self, pixel_values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        prefix = self.projection(self.image(pixel_values)[:, self.image.prefix_tokens :])
        return torch.cat([prefix, self.language.tokens(ids)], 1)

    def forward(self, pixel_values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.language.logits(self.language.read(self.embeddings(pixel_values, ids))[:, PATCHES:])


class TinyLlavaSubject(ImageSubject):
    """What a model with a prefix has to say of itself."""

    def __init__(self) -> None:
        self.model = spread(TinyLlava())
        self.decoder, self.head, self.end_id = self.model.language, self.model.language.tokens.weight, 2
        self.pixel_values, self.prompt, self.max_new_tokens = torch.randn(1, 3, 24, 24), [1, 5], 4
        source = image_source(self.model.image, self.pixel_values, block_attentions("image", self.model.image))
        self.sources, self.prefix = (source,), PATCHES
        self.mixing = torch.eye(len(source))[source.first_place :]

    def logits_of(self, images: torch.Tensor, decoder_ids: list[int]) -> torch.Tensor:
        return self.model(images, torch.tensor([decoder_ids]).expand(len(images), -1))

    @torch.no_grad()
    def generate(self, max_new_tokens: int | None = None) -> list[int]:
        language, cache, answer = self.model.language, self.model.language.new_cache(), []
        new = self.model.embeddings(self.pixel_values, torch.tensor([self.prompt]))
        while len(answer) < (max_new_tokens or self.max_new_tokens):
            answer.append(int(language.logits(language.read(new, cache=cache)[:, -1]).argmax()))
            new = language.tokens(torch.tensor([answer[-1:]]))
        return answer


def tiny_t5(vocab_size: int = 30) -> T5:
    config = T5Config(vocab_size=vocab_size, dim=16, head_dim=4, hidden=24, encoder_layers=2, decoder_layers=2, heads=4)
    return spread(T5(config), 0.1)


def tiny_t5_subject() -> T5Subject:
    return T5Subject(tiny_t5(), [5, 9, 3, 12, 7, 1], ("a", "b", "c", "d", "e", "</s>"))


SUBJECTS = {
    "tokens": lambda: tiny_vqa_subject("tokens"),
    "mean": lambda: tiny_vqa_subject("mean"),
    "t5": tiny_t5_subject,
    "caption": tiny_caption_subject,
    "vilt": tiny_vilt_subject,
    "blip2": tiny_blip2_subject,
    "llava": TinyLlavaSubject,
}
