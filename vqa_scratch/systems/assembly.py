"""Builds a model of encoder, connector and decoder from the sizes in a run's config.json, and gives its sizes."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vqa_scratch.connectors import connect, connector_sizes
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.text import Tokenizer
from vqa_scratch.data.tokenizers import Tokenizers
from vqa_scratch.errors import UserError, note
from vqa_scratch.models.bert import Bert, BertConfig
from vqa_scratch.models.hearing import Hearing
from vqa_scratch.models.patches import PixelPatches, PixelPatchesConfig
from vqa_scratch.models.released import decoder_of
from vqa_scratch.models.resnet import NORMS, ResNet, ResNetConfig
from vqa_scratch.models.vit import ConvStem, ViT, ViTConfig
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.models.whisper import WhisperConfig
from vqa_scratch.nn.neighbours import GridWaves
from vqa_scratch.nn.states import ImageEncoder, TextEncoder
from vqa_scratch.options import flag
from vqa_scratch.storage import typed
from vqa_scratch.systems.older import todays_sizes
from vqa_scratch.systems.run_options import RunOptions

MANY = 1024  # patches of an image; with more, attention takes most of a small tower's time and memory


class WithoutNumbers(TorchFunctionMode):
    """Inside, models are built in no time and little memory: no random numbers are drawn, so most pages stay untouched.

    The device "meta" would do, but torch imports its compiler to work there, which takes as long as torch itself.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if function.__name__.endswith(("normal_", "uniform_")):
            return args[0].zero_() if args else named["tensor"]  # a method of a tensor, or of nn.init
        return function(*args, **named)


def stem_for(config: ViTConfig, stem: str) -> ConvStem | None:
    """What turns pixels into tokens: convolutions ("conv"), or None for the linear map of the tower itself."""
    return ConvStem(config.channels, config.dim, config.patch_size) if stem == "conv" else None


def stem_of(image: ImageEncoder) -> str:
    """The name of what turns pixels into tokens, as `stem_for` takes it."""
    return "conv" if isinstance(image.patch_embed, ConvStem) else "linear"


def image_encoder(sizes: dict[str, Any]) -> ImageEncoder:
    """An image encoder of random weights; the inverse of `image_sizes`. Raises UserError if there is none of them."""
    if sizes.get("model_type") == "patches":
        return PixelPatches(PixelPatchesConfig(*typed("the patches", sizes, {"patch_size": int, "channels": int})))
    if sizes.get("model_type") == "resnet":
        types = {"block": str, "depths": list, "widths": list, "channels": int, "norm": str}
        block, depths, widths, channels, norm = typed("the image encoder", sizes, types)
        if norm not in NORMS:
            raise UserError(f"there is no norm {norm!r}; there are {', '.join(NORMS)}")
        return ResNet(ResNetConfig(block, tuple(depths), tuple(widths), channels), NORMS[norm])
    (stem,) = typed("the image encoder", sizes, {"stem": str | None})
    config = ViTConfig.from_hf(sizes)
    return ViT(config, stem_for(config, stem or "linear"))


def image_sizes(image: ImageEncoder) -> dict[str, Any]:
    """The sizes of an image encoder, as config.json holds them."""
    if isinstance(image, PixelPatches):
        return {"model_type": "patches", **asdict(image.config)}
    if isinstance(image, ResNet):
        (norm,) = (name for name, make in NORMS.items() if type(make(16)) is type(image.norm1))
        return {"model_type": "resnet", **asdict(image.config), "norm": norm}
    return image.config.to_hf() | {"stem": stem_of(image)}


def text_encoder(sizes: dict[str, Any]) -> TextEncoder:
    """A text encoder of random weights: one that reads, or one that hears."""
    if sizes.get("model_type") == "whisper":
        return Hearing(WhisperConfig.from_hf(sizes))
    return Bert(BertConfig.from_hf(sizes))


def assemble(sizes: dict[str, Any]) -> VQAModel:
    """A model of random weights; the inverse of `sizes_of`. Also takes the sizes of older versions."""
    types = {"image": dict, "text": dict | None, "connector": dict, "decoder": dict}
    image_is, text_is, connector_is, decoder_is = typed("the model", todays_sizes(sizes), types)
    image, decoder = image_encoder(image_is), decoder_of(decoder_is)
    text = None if text_is is None else text_encoder(text_is)
    return VQAModel(image, text, connect(connector_is, image, text, decoder), decoder)


def sizes_of(model: VQAModel) -> dict[str, Any]:
    """The "model" of a run's config.json."""
    return {
        "image": image_sizes(model.image),
        "text": None if model.text is None else model.text.config.to_hf(),
        "connector": connector_sizes(model.connector),
        "decoder": model.decoder.config.to_hf(),
    }


def tokenizers_for(options: RunOptions, text: Tokenizer | None, decoder: Tokenizer) -> Tokenizers:
    """The tokenizers with the limits of a run."""
    names = ("max_question_tokens", "max_answer_tokens", "question_prompt")
    return Tokenizers(text, decoder, **{name: getattr(options, name) for name in names})


def check_parts(model: VQAModel, tokenizers: Tokenizers, processor: ImageProcessor) -> None:
    """Raise UserError unless images and tokens of a run fit its model."""
    check_images(model.image, processor)
    tokenizers.decoder.check_fits(len(model.decoder.head), "the decoder")
    if model.text is not None and tokenizers.text is not None:
        tokenizers.text.check_fits(model.text.config.vocab_size, "the text encoder")


def check_images(image: ImageEncoder, processor: ImageProcessor) -> None:
    """Raise UserError unless an image encoder can read what the processor makes: colours, in a size that it divides."""
    if image.config.channels != 3:
        raise UserError(f"the image encoder reads {image.config.channels} channels; images have 3")
    if processor.output_size is not None:
        image.places(*processor.output_size)


def grid_of(image: ImageEncoder, processor: ImageProcessor) -> tuple[int, int]:
    """(rows, columns) of the places of an image. Raises UserError if images keep sizes of their own."""
    if processor.output_size is None:
        raise UserError("this takes images of one size; here it depends on the image")
    return image.places(*processor.output_size).grid


def grid_waves(grid: tuple[int, int], dim: int) -> GridWaves:
    """The waves from which positions begin.

    A position table that starts this way tells left from right before training (as in MAE, He et al. 2022, which keeps
    it fixed; ours is trained). Wavelengths go to 4 grids: with the usual 10,000 most channels would be constant over so
    small a grid, and the longest one here falls steadily from one side to the other. Raises UserError unless the width
    divides by 4; a note says so if the patches of an image are very many.
    """
    if dim % 4:
        raise UserError(f"--width {dim} is not divisible by 4, as a table of places in two directions needs it")
    if (patches := math.prod(grid)) > MANY:
        note(f"an image has {patches:,} patches, each compared with all others: slow; a larger --patch-size has fewer")
    return GridWaves(grid, dim)


def grid_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """(rows * columns, D): their table. Raises UserError as `grid_waves`."""
    return grid_waves(grid, dim).table()


@torch.no_grad()
def start_from_places(tower: ViT) -> None:
    """Begin with `grid_positions` as the positions of a tower's patches."""
    tower.positions[0, tower.prefix_tokens :] = grid_positions(tower.config.grid, tower.dim)


def check_positions(options: RunOptions, names: Sequence[str], limit: int | None, model: str) -> None:
    """Raise UserError if the sum of these options, in tokens, is more than the positions of a released model."""
    if limit is not None and sum(getattr(options, name) for name in names) > limit:
        flags = " and ".join(f"--{name.replace('_', '-')} {getattr(options, name)}" for name in names)
        verb = "is" if len(names) == 1 else "are"
        raise UserError(f"{flags} {verb} more than the {limit} positions of {model}")


def needed(options: RunOptions, name: str) -> str | Path:
    """The value of an option that names a checkpoint. Raises UserError if it is missing."""
    value = getattr(options, name)
    if value is None:
        raise UserError(f"give {flag(name)}, a checkpoint to start from")
    return value
