"""Tiny models and subjects for the tests of `vqa_scratch.study`; weights are spread so that attention is uneven."""

from functools import partial
from types import SimpleNamespace

import torch
from model_helpers import tiny_image

from vqa_scratch.connectors import CONNECTORS, connect, connector_class
from vqa_scratch.models import (
    CLIP,
    GPT2,
    OPT,
    T5,
    Bert,
    BertConfig,
    Blip2,
    Blip2Config,
    CLIPConfig,
    CLIPTextConfig,
    Fuyu,
    FuyuConfig,
    GPT2Config,
    Idefics,
    IdeficsConfig,
    Llama,
    LlamaConfig,
    Llava,
    LlavaConfig,
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
from vqa_scratch.models.llama_experts import Mixture
from vqa_scratch.models.resampler import ResamplerConfig
from vqa_scratch.models.resnet import group_norm
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.study.pair import PairSubject
from vqa_scratch.study.subject import (
    Blip2Subject,
    IdeficsSubject,
    PlacedSubject,
    ViLTSubject,
    VQASubject,
    fuyu_subject,
    llava_subject,
)
from vqa_scratch.study.texts import LanguageSubject, T5Subject

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


def tiny_vqa(kind: str = "tokens", heads: int = 4, decoder: Llama | None = None) -> VQAModel:
    """A model with the connector of that name."""
    connector = connector_class(kind)
    image = tiny_image(kind, heads)
    sizes = BertConfig(layout="distilbert", vocab_size=40, dim=16, layers=2, heads=heads, hidden=32, token_types=0)
    text = Bert(sizes) if connector.reads_text else None
    decoder = tiny_decoder(heads, connector.needs_cross_attention()) if decoder is None else decoder
    more = connector.sizes_for((3, 3), SimpleNamespace(queries=3, heads=heads, query_tiles=True))
    return spread(VQAModel(image, text, connect({"kind": kind, **more}, image, text, decoder), decoder))


def tiny_expert_subject() -> VQASubject:
    """A prefix that a decoder with experts reads."""
    sizes = {"vocab_size": 30, "max_positions": 32, "dim": 16, "layers": 2, "heads": 4, "bos_id": 1, "eos_id": 2}
    decoder = Llama(LlamaConfig(**sizes, layout="mixtral", experts=Mixture(4, 2, 20)))
    return tiny_vqa_subject(model=tiny_vqa("prefix", decoder=decoder))


def tiny_vqa_subject(kind: str = "tokens", model: VQAModel | None = None) -> VQASubject:
    model = tiny_vqa(kind) if model is None else model
    asked = ((), (), ()) if model.text is None else (QUESTION_IDS, QUESTION, (0, 4))
    return VQASubject(model, torch.randn(1, 3, 24, 24), [1, 5] if model.text is None else [1], *asked)


def tiny_sparse_subject() -> VQASubject:
    """Gated layers of two heads before the first and the third of four blocks, which have four."""
    image, decoder = tiny_image("resampler", 4), GPT2(GPT2Config(30, 32, 16, 4, 4, bos_id=1, eos_id=2))
    connector = connect({"kind": "resampler", "queries": 3, "heads": 2}, image, None, decoder)
    for block in decoder.blocks[1::2]:
        block.gated = None
    return tiny_vqa_subject(model=spread(VQAModel(image, None, connector, decoder)))


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


def tiny_llava_subject() -> PlacedSubject:
    """Its image stands between two words and three; heads of keys and values are fewer than of queries."""
    vision = ViTConfig(24, 8, dim=16, layers=3, heads=4, hidden=32, layout="clip_vision_model")
    text = LlamaConfig(30, 64, 16, 2, 4, kv_heads=2, hidden=24, eos_id=2)
    model = spread(Llava(LlavaConfig(vision, text, image_token=29)))
    labels = ("<s>", "see", *["<image>"] * 9, "what", "is", "it")
    return llava_subject(model, torch.randn(1, 3, 24, 24), [1, 8, *[29] * 9, 5, 6, 7], labels, (0,), 8)


def tiny_fuyu_subject() -> PlacedSubject:
    """Three rows of two patches, each with a newline."""
    config = LlamaConfig.from_hf(
        {"model_type": "persimmon", "vocab_size": 30, "hidden_size": 16, "intermediate_size": 24}
        | {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "eos_token_id": 2}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    )
    model = spread(Fuyu(FuyuConfig(config, patch_size=8, image_token=29)))
    ids = [*model.rows(24, 16, 28), 1, 5, 6, 4]
    return fuyu_subject(model, torch.randn(1, 3, 24, 16), ids, [f"<{token}>" for token in ids], (9,), 8)


def tiny_idefics_subject(every: int = 1, prompt: tuple[int, ...] = (29, 1, 5)) -> IdeficsSubject:
    """A gated layer before every so manieth of two blocks, and a resampler of two layers."""
    vision = ViTConfig(24, 8, dim=16, layers=2, heads=4, hidden=32, layout="clip_vision_model")
    text, latents = LlamaConfig(30, 64, 16, 2, 4, hidden=24, eos_id=2), ResamplerConfig(16, 3, 2, 4, 4)
    model = spread(Idefics(IdeficsConfig(vision, text, latents, every=every)))
    return IdeficsSubject(model, torch.randn(1, 3, 24, 24), list(prompt), 29, 8)


def tiny_pair_subject(kind: str = "clip") -> PairSubject:
    """A text of three words, and two of them alone."""
    sizes = {"dim": 16, "layers": 2, "heads": 4, "hidden": 32}
    image = ViTConfig(24, 8, layout=f"{kind}_vision_model", **sizes)
    text = CLIPTextConfig(30, 6, eos_id=9, layout=f"{kind}_text_model", **sizes)
    model = spread(CLIP(CLIPConfig(image, text, 16, kind)), 0.4)
    ids = torch.tensor([[1, 5, 6, 7, 9, 0]])
    with torch.no_grad():
        words = model.embed_texts(torch.tensor([[1, 5, 9, 0, 0, 0], [1, 6, 9, 0, 0, 0]]))
    return PairSubject(model, torch.randn(1, 3, 24, 24), ids, ("[CLS]", *"abc", "[SEP]", "[PAD]"), (0, 4, 5), words)


def tiny_t5(vocab_size: int = 30) -> T5:
    config = T5Config(vocab_size=vocab_size, dim=16, head_dim=4, hidden=24, encoder_layers=2, decoder_layers=2, heads=4)
    return spread(T5(config), 0.1)


def tiny_t5_subject() -> T5Subject:
    return T5Subject(tiny_t5(), [5, 9, 3, 12, 7, 1], ("a", "b", "c", "d", "e", "</s>"))


def tiny_language_subject() -> LanguageSubject:
    """A text of four words after a start token; heads of keys and values are fewer than of queries."""
    model = spread(Llama(LlamaConfig(30, 64, 16, 2, 4, kv_heads=2, hidden=24, eos_id=2)))
    return LanguageSubject(model, [1, 8, 5, 6, 7], ("<s>", "see", "what", "is", "it"), (0,), 8)


SUBJECTS = {
    **{kind: partial(tiny_vqa_subject, kind) for kind in CONNECTORS},
    "t5": tiny_t5_subject,
    "language": tiny_language_subject,
    "caption": tiny_caption_subject,
    "vilt": tiny_vilt_subject,
    "blip2": tiny_blip2_subject,
    "experts": tiny_expert_subject,
    "llava": tiny_llava_subject,
    "fuyu": tiny_fuyu_subject,
    "idefics": tiny_idefics_subject,
    "pair": tiny_pair_subject,
    "probed pair": partial(tiny_pair_subject, "siglip"),
}
