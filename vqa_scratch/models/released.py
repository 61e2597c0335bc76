"""Opens an encoder of any family: tables from the `model_type` in config.json to the class that loads it.

A new layout of a family is a line in its `LAYOUTS`; a new family of encoders is a line here.
"""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from vqa_scratch.errors import UserError
from vqa_scratch.models.bert import Bert, BertConfig
from vqa_scratch.models.hf_config import Released
from vqa_scratch.models.resnet import ResNet
from vqa_scratch.models.vit import ViT, ViTConfig
from vqa_scratch.weights.files import read_checkpoint

IMAGE_ENCODERS: dict[str, type[Released]] = dict.fromkeys(ViTConfig.LAYOUTS, ViT)
TEXT_ENCODERS: dict[str, type[Released]] = dict.fromkeys(BertConfig.LAYOUTS, Bert)


def image_encoder(source: str | PathLike[str]) -> ViT | ResNet:
    """An image encoder in eval mode, from a checkpoint folder, a Hub id, or a file of ResNet weights.

    Raises UserError, one line, for another kind of model or if something does not fit.
    """
    return ResNet.from_pretrained(source) if Path(source).is_file() else _open(source, IMAGE_ENCODERS, "image")


def text_encoder(source: str | PathLike[str]) -> Bert:
    """A text encoder in eval mode, from a checkpoint folder or a Hub id. Raises UserError as `image_encoder`."""
    return _open(source, TEXT_ENCODERS, "text")


def _open(source: str | PathLike[str], table: Mapping[str, type[Released]], kind: str) -> Released:
    config, tensors = read_checkpoint(source)
    found = config.get("model_type")
    if found not in table:
        raise UserError(f"{source} holds a model of type {found!r}; {kind} encoders are {', '.join(table)}")
    return table[found].from_checkpoint(config, tensors, str(source))
