"""LLaVA (Liu et al. 2023, arXiv 2304.08485; version 1.5, arXiv 2310.03744): a CLIP or SigLIP that a decoder reads.

The states of one block of the image encoder, without a last norm, go through a two-layer MLP and stand among the words,
where the prompt has tokens `image_token`.

Shapes: I images, N embeddings of an image, E width of the language model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from vqa_scratch.errors import UserError, naming
from vqa_scratch.models.hf_config import HFConfig, Layout
from vqa_scratch.models.image_text import ImageTextModel, check_place, end_tokens
from vqa_scratch.models.llama import Llama, LlamaConfig
from vqa_scratch.models.vit import ViT, ViTConfig
from vqa_scratch.nn.layers import activation
from vqa_scratch.storage import typed
from vqa_scratch.weights import maps_joined
from vqa_scratch.weights.maps import KeyMap

TOWERS = ("clip_vision_model", "siglip_vision_model")
_FIELDS = {
    "image_token": "image_token_index",
    "activation": "projector_hidden_act",
    "projector_bias": "multimodal_projector_bias",
}


@dataclass(frozen=True)
class LlavaConfig(HFConfig[Layout]):
    """Sizes of the two parts. The defaults of the rest are those of LLaVA 1.5."""

    LAYOUTS: ClassVar[Mapping[str, Layout]] = {"llava": Layout("LlavaForConditionalGeneration", _FIELDS)}

    vision: ViTConfig
    language: LlamaConfig
    image_token: int = 32000  # the place of each embedding of an image
    layer: int = -2  # the states after this many blocks of the encoder are read; -1 are those after the last
    whole: bool = False  # whether the class token is read too
    activation: str = "gelu"  # between the two layers of the projector
    projector_bias: bool = True
    layout: str = "llava"

    def __post_init__(self) -> None:
        layers = self.vision.layers
        if not -layers - 1 <= self.layer <= layers:
            raise UserError(f"vision_feature_layer {self.layer} is none of an image encoder with {layers} layers")
        if self.vision.layout not in TOWERS:
            raise UserError(f"the image encoder is a {self.vision.layout!r}; here it must be {' or '.join(TOWERS)}")
        if not self.whole and not self.vision.prefix_tokens:
            strategy = 'vision_feature_select_strategy "default"'
            raise UserError(f'{strategy} leaves out a class token, which a SigLIP does not have: it must be "full"')
        check_place(self.image_token, self.language.vocab_size)

    @property
    def key_map(self) -> KeyMap:
        return maps_joined.llava(self.vision.key_map, self.language.key_map)

    @classmethod
    def further_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        if "mm_vision_tower" in config:
            raise UserError("this is the layout of LLaVA's own repository, without the image encoder; convert it first")
        kinds: dict[str, Any] = {"vision_config": dict, "text_config": dict, "vision_feature_layer": int | None}
        kinds |= {"vision_feature_select_strategy": str | None, "tie_word_embeddings": bool | None}
        vision, text, layer, strategy, tied = typed("config.json", config, kinds)
        if strategy not in (None, "default", "full"):
            raise UserError(f'vision_feature_select_strategy must be "default" or "full", not {strategy!r}')
        with naming("vision_config"):
            vision = ViTConfig.from_hf({"model_type": TOWERS[0]} | vision)
        with naming("text_config"):
            text = {"model_type": "llama"} | text | ({"tie_word_embeddings": True} if tied else {})
            parts = {"vision": vision, "language": LlamaConfig.from_hf(text | end_tokens(config))}
        return parts | {"whole": strategy == "full", "layer": cls.layer if layer is None else layer}

    def to_hf(self) -> dict[str, Any]:
        return super().to_hf() | {
            "vision_config": self.vision.to_hf() | {"vision_use_head": False},
            "text_config": self.language.to_hf(),
            "vision_feature_layer": self.layer,
            "vision_feature_select_strategy": "full" if self.whole else "default",
            "tie_word_embeddings": self.language.tied,
        }


class Llava(ImageTextModel):
    """Image encoder, projector and language model. Files it saves lack the encoder's last norm, which nothing reads."""

    config_class = LlavaConfig
    config: LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = ViT(config.vision)
        self.up = nn.Linear(config.vision.dim, config.language.dim, bias=config.projector_bias)
        self.activation = activation(config.activation)
        self.down = nn.Linear(config.language.dim, config.language.dim, bias=config.projector_bias)
        self.language = Llama(config.language)
        layers, layer = config.vision.layers, config.layer
        self.blocks_read = layer if layer >= 0 else layers + 1 + layer
        self.skipped = 0 if config.whole else 1

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(I, C, H, W) -> (I, N, E). Raises UserError unless patches fit."""
        x = self.vision.embed(pixel_values.to(self.up.weight.dtype))
        for block in self.vision.blocks[: self.blocks_read]:
            x = block(x)
        return self.down(self.activation(self.up(x[:, self.skipped :])))
