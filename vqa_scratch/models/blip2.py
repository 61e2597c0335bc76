"""BLIP-2 (Li et al. 2023, arXiv 2301.12597): a frozen ViT, a Q-Former that reads it, and a frozen OPT that answers.

The outputs of the Q-Former, projected to the width of the language model, are a prefix before the words. The image
encoder is that of EVA-CLIP (Fang et al. 2022, 2211.07636), which is a ViT.

Shapes: B batch, N image tokens, Q queries, T text tokens, E width of the language model, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.models.hf_config import HFConfig, Layout, fields_from_hf
from vqa_scratch.models.image_text import ImageTextModel
from vqa_scratch.models.opt import OPT, OPTConfig
from vqa_scratch.models.qformer import QFormer, QFormerConfig
from vqa_scratch.models.vit import ViT, ViTConfig
from vqa_scratch.storage import typed
from vqa_scratch.weights import fields, maps_joined

VISION_TYPE = "blip_2_vision_model"
_VISION = ViTConfig(patch_size=14, dim=1408, layers=39, heads=16, hidden=6144, norm_eps=1e-6)  # ViT-g of EVA-CLIP
_FIELDS = {"queries": "num_query_tokens", "image_token": "image_token_index"}


@dataclass(frozen=True)
class Blip2Config(HFConfig[Layout]):
    """Sizes of the three parts. The defaults are those of blip2-opt-2.7b, except for the language model."""

    LAYOUTS: ClassVar[Mapping[str, Layout]] = {
        "blip-2": Layout("Blip2ForConditionalGeneration", _FIELDS, maps_joined.BLIP2)
    }

    vision: ViTConfig = _VISION
    qformer: QFormerConfig = QFormerConfig()
    language: OPTConfig = OPTConfig()
    queries: int = 32  # tokens that an image becomes
    image_token: int | None = None  # id of an image in the prompts of other programs; files before 2024 have none
    layout: str = "blip-2"

    def __post_init__(self) -> None:
        object.__setattr__(self, "qformer", replace(self.qformer, context_dim=self.vision.dim))
        if self.language.embedding_dim != self.language.dim or not self.language.norm_first:
            raise UserError("BLIP-2 needs an OPT whose embedding is as wide as its blocks, with norms before sublayers")

    @classmethod
    def further_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The three parts. Raises UserError on another language model."""
        parts = typed("config.json", config, {f"{part}_config": dict | None for part in ("vision", "qformer", "text")})
        vision, qformer, text = (part or {} for part in parts)
        if text.get("model_type", "opt") != "opt":
            raise UserError(f"the language model of config.json is a {text['model_type']!r}; here it must be an 'opt'")
        return {
            "vision": replace(_VISION, **fields_from_hf(vision, fields.BLIP2_VISION, ViTConfig)),
            "qformer": QFormerConfig.from_hf({"model_type": "blip_2_qformer"} | qformer),
            "language": OPTConfig.from_hf({"model_type": "opt"} | text),
        }

    def to_hf(self) -> dict[str, Any]:
        vision = {theirs: getattr(self.vision, ours) for ours, theirs in fields.BLIP2_VISION.items()}
        return super().to_hf() | {
            "vision_config": {"model_type": VISION_TYPE, **vision},
            "qformer_config": self.qformer.to_hf(),
            "text_config": self.language.to_hf(),
        }


class Blip2(ImageTextModel):
    """Image encoder, Q-Former, projection and language model.

    To generate, give the language model the image as its prefix:
    `generate(model.language, ids, mask, Conditioning(prefix=model.encode_image(pixels)), options=...)`.
    """

    config_class = Blip2Config
    config: Blip2Config

    def __init__(self, config: Blip2Config) -> None:
        super().__init__()
        self.config = config
        self.vision = ViT(config.vision)
        self.qformer = QFormer(config.qformer, config.queries)
        self.projection = nn.Linear(config.qformer.dim, config.language.dim)
        self.language = OPT(config.language)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, Q, E): the prefix of the language model.

        Each part computes in the type of its weights: the Q-Former may be in fp32 when the rest is not.
        """
        states = self.vision(pixel_values.to(self.vision.positions.dtype))
        asked = self.qformer(states.to(self.qformer.queries.dtype))
        return self.projection(asked.to(self.projection.weight.dtype))

    def forward(  # type: ignore[override]  # its ids have no places
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Images (B, C, H, W) and words (B, T), the start token first -> logits (B, Q + T, V).

        attention_mask (B, T), True = a real word; padding may stand on either side.
        """
        image = self.encode_image(pixel_values)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask.new_ones(image.shape[:2]), attention_mask], 1)
        return self.read(torch.cat([image, self.language.embed(input_ids)], 1), attention_mask)

    def to_precision(self, dtype: torch.dtype) -> Self:
        """Convert all but the Q-Former to `dtype`; the Q-Former is small, was trained in fp32 and stays in it."""
        self.to(dtype)
        self.qformer.float()
        return self
