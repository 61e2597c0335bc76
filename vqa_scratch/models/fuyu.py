"""Fuyu (Adept 2023, "Fuyu-8B: A Multimodal Architecture for AI Agents"): a Persimmon that reads patches of pixels.

There is no image encoder and no table of places: one linear map of each patch, in raster order, and a newline token
after each row, so that an image of any size is a text. Adept published the weights and a page, no paper.

Shapes: I images, C channels, N patches of all images, p patch size, E width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from vqa_scratch.errors import UserError, naming
from vqa_scratch.models.hf_config import HFConfig, Layout
from vqa_scratch.models.image_text import ImageTextModel, check_place, end_tokens
from vqa_scratch.models.llama import Llama, LlamaConfig
from vqa_scratch.models.patches import cut
from vqa_scratch.storage import typed
from vqa_scratch.weights import maps_joined
from vqa_scratch.weights.maps import KeyMap

_FIELDS = {"patch_size": "patch_size", "channels": "num_channels", "image_token": "image_token_id"}
_PERSIMMON_8B = {
    "model_type": "persimmon",
    "vocab_size": 262144,
    "max_position_embeddings": 16384,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class FuyuConfig(HFConfig[Layout]):
    """Sizes. The defaults are those of Fuyu-8B."""

    LAYOUTS: ClassVar[Mapping[str, Layout]] = {"fuyu": Layout("FuyuForCausalLM", _FIELDS)}

    language: LlamaConfig = LlamaConfig.from_hf(_PERSIMMON_8B)
    patch_size: int = 30
    channels: int = 3
    image_token: int = 71011  # the place of a patch
    layout: str = "fuyu"

    def __post_init__(self) -> None:
        if self.language.layout != "persimmon":
            raise UserError(f"the language model of a Fuyu is a persimmon, not a {self.language.layout}")
        check_place(self.image_token, self.language.vocab_size)

    @property
    def key_map(self) -> KeyMap:
        return maps_joined.fuyu(self.language.key_map)

    @classmethod
    def further_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The decoder, whose sizes are in text_config, or in the file itself as in that of the Hub."""
        text, tied = typed("config.json", config, {"text_config": dict | None, "tie_word_embeddings": bool | None})
        flat = {name: value for name, value in config.items() if name != "model_type"}
        with naming("config.json" if text is None else "text_config"):
            sizes = _PERSIMMON_8B | (flat if text is None else text) | {"tie_word_embeddings": tied}
            return {"language": LlamaConfig.from_hf(sizes | end_tokens(config))}

    def to_hf(self) -> dict[str, Any]:
        return super().to_hf() | {"text_config": self.language.to_hf(), "tie_word_embeddings": self.language.tied}


class Fuyu(ImageTextModel):
    """A linear map of patches and a language model; `pixel_values` are patches, as `patches` cuts them."""

    config_class = FuyuConfig
    config: FuyuConfig

    def __init__(self, config: FuyuConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Linear(config.channels * config.patch_size**2, config.language.dim)
        self.language = Llama(config.language)

    def patches(self, images: Tensor) -> Tensor:
        """(I, C, h*p, w*p) -> (I, h*w, p*p*C): row, column, channel. Raises UserError unless patches fit.

        For a batch with images of several sizes, join those of each along the axis of the patches.
        """
        return cut(images, self.config.patch_size)

    def rows(self, height: int, width: int, newline: int) -> list[int]:
        """The tokens of an image of this size in pixels: a place for each patch, and `newline` after each row."""
        p = self.config.patch_size
        return ([self.config.image_token] * (width // p) + [newline]) * (height // p)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Patches (..., N, p*p*C) -> (..., N, E)."""
        return self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype))
