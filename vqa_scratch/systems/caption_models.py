"""Builds the models of the caption system: small random ones, or a torchvision ResNet and a released GPT-2."""

from typing import Any

from vqa_scratch.connectors import connect, connector_class
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.text import Tokenizer, train_bpe
from vqa_scratch.data.tokenizers import Tokenizers
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.models.gpt2 import GPT2, GPT2Config
from vqa_scratch.models.resnet import ResNet, ResNetConfig, group_norm
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.systems import assembly
from vqa_scratch.systems.assembly import check_positions, needed
from vqa_scratch.systems.experts import small_decoder
from vqa_scratch.systems.options import CaptionOptions
from vqa_scratch.systems.vqa_models import IMAGE_SIZE

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
# torchvision's preprocessing of its first ResNet weights: shortest side 256, centre 224.
RESNET_PROCESSOR = ImageProcessor(size=256, crop_size=(224, 224), kind="BitImageProcessor", mean=MEAN, std=STD)


def build_model(options: CaptionOptions, train: list[VQASample]) -> tuple[VQAModel, Tokenizers, ImageProcessor]:
    """The model, tokenizers and preprocessing that the options ask for."""
    kind = connector_class("tokens")
    processor = RESNET_PROCESSOR
    if options.init == "pretrained":
        writes = needed(options, "decoder_model")
        decoder, writer = Tokenizer.from_pretrained(writes), GPT2.from_pretrained(writes, add_cross_attention=True)
        image = ResNet.from_pretrained(needed(options, "image_model"))
    else:
        texts = {s.answer for s in train} | {s.question for s in train if s.question}
        decoder = train_bpe([f" {text}" for text in sorted(texts)], options.vocabulary)
        if options.preset == "coco":  # random weights of the released sizes, to measure without downloads
            ids: dict[str, Any] = {"bos_id": decoder.bos_id, "eos_id": decoder.eos_id}
            image, writer = ResNet(ResNetConfig()), GPT2(GPT2Config(add_cross_attention=True, **ids))
        else:
            image, writer = small_models(options, decoder)
            processor = ImageProcessor(size=(IMAGE_SIZE, IMAGE_SIZE))
    read = [*(["max_question_tokens"] if options.question_share else []), "max_caption_tokens"]
    check_positions(options, read, writer.config.max_positions, options.decoder_model or "GPT-2")
    grid = assembly.grid_of(image, processor)
    connector = connect({"kind": "tokens", **kind.sizes_for(grid, options)}, image, None, writer)
    if options.preset == "caption":
        connector.start_from_places(assembly.grid_waves(grid, options.width))
    return VQAModel(image, None, connector, writer), assembly.tokenizers_for(options, None, decoder), processor


def small_models(options: CaptionOptions, words: Tokenizer) -> tuple[ResNet, GPT2]:
    """Small models with random weights: two stages of basic blocks turn a 64-pixel image into 8x8 places."""
    image = ResNetConfig("basic", (options.image_blocks,) * 2, (options.image_width, 2 * options.image_width))
    longest = options.max_question_tokens + options.max_caption_tokens + 1
    return ResNet(image, group_norm), small_decoder(options, words, longest, cross_attention=True)
