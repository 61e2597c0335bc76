"""Builds the models of the VQA system for training: small random ones, or released ones."""

from typing import Any

import torch

from vqa_scratch.connectors import connect, connector_class
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.text import Tokenizer, train_bpe, train_wordpiece
from vqa_scratch.data.tokenizers import Tokenizers
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.models import released
from vqa_scratch.models.bert import Bert, BertConfig
from vqa_scratch.models.gpt2 import GPT2, GPT2Config
from vqa_scratch.models.hf_config import ReleasedDecoder
from vqa_scratch.models.patches import PixelPatches, PixelPatchesConfig
from vqa_scratch.models.vit import ViT, ViTConfig
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.nn.states import ImageEncoder
from vqa_scratch.systems import assembly
from vqa_scratch.systems.assembly import check_positions, needed
from vqa_scratch.systems.experts import small_decoder
from vqa_scratch.systems.options import VQAOptions

IMAGE_SIZE = 64  # side of the small models' images, in pixels
VOCABULARY = 512  # at most, in tokens, of the small models' tokenizers
DISTILBERT = BertConfig(layout="distilbert", layers=6, token_types=0)  # distilbert-base-uncased

Parts = tuple[VQAModel, Tokenizers, ImageProcessor]


def own_tokenizers(train: list[VQASample]) -> tuple[Tokenizer, Tokenizer]:
    """WordPiece for the text encoder and byte-level BPE for the decoder, learned from the training questions."""
    questions = sorted({s.question for s in train})
    answers = sorted({s.answer for s in train}.union(*{s.answers for s in train}))
    return train_wordpiece(questions, VOCABULARY), train_bpe([f" {text}" for text in questions + answers], VOCABULARY)


def reads_question(options: VQAOptions) -> bool:
    """Whether there is a text encoder."""
    return options.text_encoder and connector_class(options.connector).reads_text


def check_connector(options: VQAOptions) -> None:
    """Raise UserError unless the question reaches the decoder, and the encoders that are spoken of are there."""
    kind = connector_class(options.connector)
    if reads_question(options):
        if options.question_loss:
            raise UserError("--text-encoder tells the decoder the question: add --no-question-loss")
        return
    why = "--no-text-encoder" if kind.reads_text else f"--connector {options.connector}"
    if not options.question_prompt:
        raise UserError(
            f"{why} gives the decoder the image alone: add --question-prompt, so that it reads the question"
        )
    lacks = {"text_encoder": "is no text encoder"}
    lacks |= {"image_encoder": "is no image encoder", "encoders": "are no encoders"} if kind.reads_pixels else {}
    if options.freeze in lacks:
        raise UserError(f"--freeze {options.freeze} means nothing with {why}: there {lacks[options.freeze]}")
    if options.text_encoder and "text_encoder" in (options.given or ()):
        raise UserError(f"--text-encoder means nothing with {why}: it takes no states of a text encoder")


def small_models(options: VQAOptions, train: list[VQASample]) -> Parts:
    """Small models with random weights, and tokenizers learned from the questions."""
    kind, width = connector_class(options.connector), options.width
    text, decoder = own_tokenizers(train)
    shared: dict[str, Any] = {"dim": width, "heads": options.heads, "activation": "relu"}
    image: PixelPatches | ViT
    if kind.reads_pixels:
        image = PixelPatches(PixelPatchesConfig(options.patch_size))
    else:
        patches: dict[str, Any] = {"image_size": IMAGE_SIZE, "patch_size": options.patch_size}
        config = ViTConfig(layers=options.image_layers, hidden=4 * width, **patches, **shared)
        image = ViT(config, assembly.stem_for(config, options.stem))
    grid = image.places(IMAGE_SIZE, IMAGE_SIZE).grid
    sizes = kind.sizes_for(grid, options)
    text_config = BertConfig(
        layout="distilbert",
        vocab_size=len(text),
        layers=options.text_layers,
        hidden=4 * width,
        max_positions=max(64, options.max_question_tokens),
        token_types=0,
        pad_id=text.pad_id or 0,
        dropout=0.0,
        attention_dropout=0.0,
        **shared,
    )
    longest = options.max_question_tokens + options.max_answer_tokens + 1
    positions = max(64, longest) + kind.prefix_length(grid, sizes)
    words = Bert(text_config) if reads_question(options) else None
    writer = small_decoder(options, decoder, positions, cross_attention=kind.needs_cross_attention())
    connector = connect({"kind": options.connector, **sizes}, image, words, writer)
    if isinstance(image, ViT):
        assembly.start_from_places(image)
    connector.start_from_places(assembly.grid_waves(grid, width))
    if (laid_out := kind.prefix_grid(grid, sizes)) is not None:  # a sequence tells its rows apart, but not its columns
        places = assembly.grid_positions(laid_out, width)
        with torch.no_grad():
            writer.positions.weight[: len(places)] = places
    writer.open_gates(0.5)  # it has learned nothing yet that closed ones would protect
    tokenizers = assembly.tokenizers_for(options, text if words else None, decoder)
    return VQAModel(image, words, connector, writer), tokenizers, ImageProcessor(size=(IMAGE_SIZE, IMAGE_SIZE))


def released_models(options: VQAOptions, train: list[VQASample]) -> Parts:
    """Models, tokenizers and preprocessing from checkpoints; with `--init random` random weights of the same sizes."""
    kind = connector_class(options.connector)
    image: ImageEncoder
    writer: ReleasedDecoder
    text: Tokenizer | None
    if options.init == "random":
        text, decoder = own_tokenizers(train)
        image = PixelPatches(PixelPatchesConfig()) if kind.reads_pixels else ViT(ViTConfig())
        words = Bert(DISTILBERT) if reads_question(options) else None
        writer, processor = GPT2(GPT2Config(add_cross_attention=kind.needs_cross_attention())), ImageProcessor()
    else:
        looks = None if kind.reads_pixels else needed(options, "image_model")
        reads = needed(options, "text_model") if reads_question(options) else None
        writes = needed(options, "decoder_model")
        text = None if reads is None else Tokenizer.from_pretrained(reads)
        decoder = Tokenizer.from_pretrained(writes)
        image = PixelPatches(PixelPatchesConfig()) if looks is None else released.image_encoder(looks)
        words = None if reads is None else released.text_encoder(reads)
        writer = released.decoder(writes, cross_attention=kind.needs_cross_attention())
        processor = ImageProcessor() if looks is None else ImageProcessor.from_pretrained(looks)
    if words is not None:
        check_positions(options, ["max_question_tokens"], words.longest, options.text_model or "DistilBERT")
    if processor.output_size is None:
        raise UserError(f"training needs images of one size; {options.image_model} takes each at a size of its own")
    grid = image.places(*processor.output_size).grid
    sizes = kind.sizes_for(grid, options)
    written = [*(["max_question_tokens"] if options.question_prompt else []), "max_answer_tokens"]
    room = writer.config.max_positions - kind.prefix_length(grid, sizes)
    check_positions(options, written, room, options.decoder_model or "GPT-2")
    connector = connect({"kind": options.connector, **sizes}, image, words, writer)
    tokenizers = assembly.tokenizers_for(options, text if words else None, decoder)
    return VQAModel(image, words, connector, writer), tokenizers, processor
