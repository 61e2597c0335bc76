"""The captioner that also answers questions: ResNet and GPT-2 (`models/caption.py`). Presets caption and coco.

`caption` trains a small net of the same classes on the embedded data set; `coco` starts from a torchvision ResNet and
a released GPT-2. A caption has no prompt, a question is its own prompt, and one model learns both.
"""

import torch

from vqa_scratch.data.batches import Encoder
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.text import Tokenizer, train_bpe
from vqa_scratch.models.caption import CaptionConfig, CaptionModel
from vqa_scratch.models.gpt2 import GPT2, GPT2Config
from vqa_scratch.models.resnet import ResNet, ResNetConfig
from vqa_scratch.systems.base import System, check_positions, seed_everything
from vqa_scratch.systems.caption_job import CaptionJob
from vqa_scratch.systems.caption_run import caption_encoder, open_trained
from vqa_scratch.systems.captions import (
    Texts,
    read_splits,
)
from vqa_scratch.systems.options import CaptionOptions
from vqa_scratch.systems.vqa import IMAGE_SIZE, grid_positions
from vqa_scratch.training.precision import Precision

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# torchvision's preprocessing of its first ResNet weights: shortest side 256, centre 224.
RESNET_PROCESSOR = ImageProcessor(size=256, crop_size=(224, 224), kind="BitImageProcessor", **IMAGENET)
TABLE_ROWS = 8


def embedded_model(config: CaptionOptions, decoder: Tokenizer) -> CaptionModel:
    """A small random net: two stages of basic blocks, which leave a map of 8x8 places of a 64-pixel image."""
    image = ResNetConfig("basic", (config.image_blocks,) * 2, (config.image_width, 2 * config.image_width))
    decoder_config = GPT2Config(
        vocab_size=len(decoder),
        max_positions=config.max_question_tokens + config.max_caption_tokens + 1,
        dim=config.width,
        layers=config.decoder_layers,
        heads=config.heads,
        activation="relu",
        embedding_dropout=0.0,
        dropout=0.0,
        attention_dropout=0.0,
        add_cross_attention=True,
        bos_id=decoder.bos_id,
        eos_id=decoder.eos_id,
        pad_id=decoder.pad_id,
    )
    model = CaptionModel.from_config(CaptionConfig(image, decoder_config, "group", image.grid(IMAGE_SIZE)))
    with torch.no_grad():
        model.places[0] = 0.5 * grid_positions(model.grid, config.width)
    return model


def _check_positions(config: CaptionOptions, sizes: GPT2Config) -> None:
    read = [*(["max_question_tokens"] if config.question_share else []), "max_caption_tokens"]
    check_positions(config, read, sizes.max_positions, config.decoder_model or "GPT-2")


def build(config: CaptionOptions, train: Texts) -> tuple[CaptionModel, Encoder, ImageProcessor]:
    """Model, tokenizer and preprocessing that the config asks for."""
    seed_everything(config.seed)
    if config.init == "pretrained":
        decoder = Tokenizer.from_pretrained(config.decoder_model)
        gpt2 = GPT2.from_pretrained(config.decoder_model, add_cross_attention=True)
        _check_positions(config, gpt2.config)
        model = CaptionModel(ResNet.from_pretrained(config.image_model), gpt2)
        return model, caption_encoder(config, decoder), RESNET_PROCESSOR
    texts = {s.answer for s in (*train.captions, *train.questions)} | {s.question for s in train.questions}
    decoder = train_bpe([f" {text}" for text in sorted(texts)], config.vocabulary)
    encoder = caption_encoder(config, decoder)
    if config.preset == "coco":  # of the released sizes, for measuring without a network
        gpt2 = GPT2Config(vocab_size=50257, add_cross_attention=True, bos_id=decoder.bos_id, eos_id=decoder.eos_id)
        _check_positions(config, gpt2)
        return CaptionModel.from_config(CaptionConfig(ResNetConfig(), gpt2)), encoder, RESNET_PROCESSOR
    return embedded_model(config, decoder), encoder, ImageProcessor(size=(IMAGE_SIZE, IMAGE_SIZE))


def prepare(config: CaptionOptions, precision: Precision) -> CaptionJob:
    """Read the data and build the model. Raises UserError where either cannot be had."""
    folder, splits = read_splits(config)
    model, encoder, processor = build(config, splits["train"])
    return CaptionJob(config, model, encoder, processor, folder, splits, precision)


CAPTION = System("caption", CaptionOptions, prepare, open_trained)
