"""The text towers of CLIP (Radford et al. 2021, 2103.00020) and SigLIP (Zhai et al. 2023, 2303.15343).

The blocks are those of a ViT. CLIP runs them causally and reads the end token, the only one that sees the whole text.
In SigLIP every token sees every other, and the last position is read: texts are padded to `longest` tokens, as in its
training, and the padding is attended like any word.

Shapes: B texts, T tokens, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.models.hf_config import HFConfig, Layout, Released, check_heads, fields_of
from vqa_scratch.models.vit import ViTBlock, ViTConfig
from vqa_scratch.nn import taps
from vqa_scratch.nn.states import States
from vqa_scratch.weights import fields, maps_clip

HIGHEST_ID = 2  # as `eos_id`: OpenAI's configs say 2 and mean that the end token is the highest id of a text


@dataclass(frozen=True, eq=False)
class CLIPTextLayout(Layout):
    """What differs between the two."""

    causal: bool = True  # and the end token is read; else all tokens see each other, and the last one is read


LAYOUTS = {
    "clip_text_model": CLIPTextLayout("CLIPTextModel", fields.CLIP_TEXT, maps_clip.CLIP_TEXT),
    "siglip_text_model": CLIPTextLayout(
        "SiglipTextModel",
        fields.CLIP_TEXT,
        maps_clip.SIGLIP_TEXT,
        {
            "vocab_size": 32000,
            "max_positions": 64,
            "dim": 768,
            "heads": 12,
            "hidden": 3072,
            "activation": "gelu_pytorch_tanh",
            "norm_eps": 1e-6,
        },
        causal=False,
    ),
}


@dataclass(frozen=True)
class CLIPTextConfig(HFConfig[CLIPTextLayout]):
    """Sizes of a text tower. The defaults are those of CLIP ViT-B/32."""

    LAYOUTS: ClassVar[Mapping[str, CLIPTextLayout]] = LAYOUTS

    vocab_size: int = 49408
    max_positions: int = 77
    dim: int = 512
    layers: int = 12
    heads: int = 8
    hidden: int = 2048  # inner width of the MLP
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    eos_id: int = 49407  # the end token; see HIGHEST_ID
    layout: str = "clip_text_model"  # a key of LAYOUTS

    def __post_init__(self) -> None:
        check_heads(self.dim, self.heads)
        self.family  # noqa: B018 (it checks the layout)

    @property
    def blocks(self) -> ViTConfig:
        """A ViT of these blocks."""
        return ViTConfig(**fields_of(self, ViTConfig))


class CLIPText(Released[CLIPTextConfig]):
    """Embeddings of tokens and positions, pre-LN blocks, a last norm."""

    config_class = CLIPTextConfig

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config, self.layout = config, config.family
        self.dim, self.longest = config.dim, config.max_positions  # at most so many tokens
        self.tokens = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Embedding(config.max_positions, config.dim)
        self.blocks = nn.ModuleList(ViTBlock(config.blocks) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        taps.name_modules(self.blocks, "text")

    def states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> States:
        """(B, T) -> states (B, T, D) and their mask.

        attention_mask (B, T), True = may be attended to. Raises ValueError on more tokens than positions.
        """
        if input_ids.shape[1] > self.longest:
            raise ValueError(f"{input_ids.shape[1]} tokens, but the position table serves {self.longest}")
        x = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x, attention_mask, causal=self.layout.causal)
        return States(self.norm(x), None if attention_mask is None else attention_mask.bool())

    def read_position(self, input_ids: Tensor) -> Tensor:
        """(B,): the position whose state stands for the text. Raises UserError for a text without an end token."""
        if not self.layout.causal:
            return torch.full_like(input_ids[:, 0], input_ids.shape[1] - 1)
        if self.config.eos_id == HIGHEST_ID:
            place = input_ids.argmax(1)
            found = place > 0  # at 0 it is a token that starts the text, or one that pads all of it
        else:
            ends = input_ids == self.config.eos_id
            place, found = ends.int().argmax(1), ends.any(1)
        if not found.all():
            row = int(found.int().argmin())
            end = "the highest id" if self.config.eos_id == HIGHEST_ID else f"id {self.config.eos_id}"
            raise UserError(f"text {row} has no end token ({end}): cut it before the end token is added")
        return place

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, D): the state that stands for each text; arguments as in `states`, UserError as in
        `read_position`."""
        place = self.read_position(input_ids)
        return self.states(input_ids, attention_mask).tokens[torch.arange(len(place), device=place.device), place]
