"""Opens an encoder or a decoder of any family: tables from the `model_type` in config.json to the class that loads it.

A new layout of a family is a line in its `LAYOUTS`; a new family is a line here.
"""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from vqa_scratch.errors import UserError, naming
from vqa_scratch.models.bert import Bert, BertConfig
from vqa_scratch.models.clip import CLIP, CLIPConfig
from vqa_scratch.models.gpt2 import GPT2
from vqa_scratch.models.gpt2_experts import GPT2Experts
from vqa_scratch.models.hf_config import Released, ReleasedDecoder
from vqa_scratch.models.llama import Llama, LlamaConfig
from vqa_scratch.models.opt import OPT
from vqa_scratch.models.resnet import ResNet
from vqa_scratch.models.vit import ViT, ViTConfig
from vqa_scratch.storage import typed
from vqa_scratch.weights.files import read_checkpoint

M = TypeVar("M", bound=Released)
IMAGE_ENCODERS: dict[str, type[ViT] | type[CLIP]] = {
    **dict.fromkeys(ViTConfig.LAYOUTS, ViT),
    **dict.fromkeys(CLIPConfig.LAYOUTS, CLIP),
}
TEXT_ENCODERS: dict[str, type[Bert]] = dict.fromkeys(BertConfig.LAYOUTS, Bert)
DECODERS: dict[str, type[ReleasedDecoder]] = {"gpt2": GPT2, "opt": OPT, **dict.fromkeys(LlamaConfig.LAYOUTS, Llama)}


def image_encoder(source: str | PathLike[str]) -> ViT | ResNet:
    """An image encoder in eval mode, from a checkpoint folder, a Hub id, or a file of ResNet weights.

    Of a CLIP or SigLIP it is the image tower, without the head. Raises UserError, one line, for another kind of model
    or if something does not fit.
    """
    if Path(source).is_file():
        return ResNet.from_pretrained(source)
    opened = _open(source, IMAGE_ENCODERS, "image encoders")
    return opened.image if isinstance(opened, CLIP) else opened


def text_encoder(source: str | PathLike[str]) -> Bert:
    """A text encoder in eval mode, from a checkpoint folder or a Hub id. Raises UserError as `image_encoder`."""
    return _open(source, TEXT_ENCODERS, "text encoders")


def decoder(source: str | PathLike[str], *, cross_attention: bool) -> ReleasedDecoder:
    """A decoder in eval mode, from a checkpoint folder or a Hub id. Cross-attention can be had with GPT-2 only; it is
    random where the checkpoint has none. Raises UserError as `image_encoder`."""
    if cross_attention:
        return _open(source, {"gpt2": GPT2}, "decoders with cross-attention", add_cross_attention=True)
    return _open(source, DECODERS, "decoders")


def decoder_of(sizes: Mapping[str, Any]) -> ReleasedDecoder:
    """A decoder of random weights, from the content of a config.json."""
    (found,) = typed("the decoder", sizes, {"model_type": str})
    decoders = DECODERS | {"gpt2_experts": GPT2Experts}  # of runs; no checkpoint is one
    if found not in decoders:
        raise UserError(f"the decoder is of type {found!r}; decoders are {', '.join(decoders)}")
    kind = decoders[found]
    return kind(kind.config_class.from_hf(sizes))


def _open(source: str | PathLike[str], table: Mapping[str, type[M]], kinds: str, **options: Any) -> M:
    config, tensors = read_checkpoint(source)
    (found,) = typed(f"{source}: config.json", config, {"model_type": str | None})
    if found not in table:
        raise UserError(f"{source} holds a model of type {found!r}; {kinds} are {', '.join(table)}")
    with naming(source):
        return table[found].from_checkpoint(config, tensors, str(source), **options)
