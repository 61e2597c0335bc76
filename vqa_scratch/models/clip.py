"""CLIP and SigLIP: an image and a text become vectors of one space, in which what belongs together is close.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (2103.00020); Zhai et al.
2023, "Sigmoid Loss for Language Image Pre-Training" (2303.15343). Both are a ViT, a text tower and a head for each:
CLIP projects the class token and the end token; in SigLIP a learned probe reads the patches, and a last layer the last
token. `training/contrastive.py` has their losses.

Shapes: I images, B texts, T tokens, N image tokens, D width of a tower, P width of the common space.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.models.clip_text import CLIPText, CLIPTextConfig
from vqa_scratch.models.hf_config import HFConfig, Layout, Released, fields_from_hf
from vqa_scratch.models.vit import PatchEmbed, ViT, ViTConfig
from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.nn.layers import MLP, activation
from vqa_scratch.nn.states import Stem
from vqa_scratch.storage import typed
from vqa_scratch.weights import maps_clip


class ImageTextOutput(NamedTuple):
    """Embeddings of length 1, and how well each image and text fit."""

    image_embeds: Tensor  # (I, P)
    text_embeds: Tensor  # (B, P)
    logits_per_image: Tensor  # (I, B)


def logits_of(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """(I, P) and (B, P), of length 1 -> (I, B): exp(scale) times their similarity, plus a bias.

    In fp32 at least: at a scale of 100 the rounding of bf16 would be a tenth of a nat and more.
    """
    with torch.autocast(images.device.type, enabled=False):
        logits = precise(scale).exp() * (precise(images) @ precise(texts).T)
    return logits if bias is None else logits + precise(bias)


def precise(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ClassTokenHead(nn.Module):
    """CLIP's: the class token, normed and projected. (I, N, D) -> (I, P)."""

    def __init__(self, config: "CLIPConfig") -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.image.dim, eps=config.image.norm_eps)
        self.projection = nn.Linear(config.image.dim, config.projection_dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.projection(self.norm(tokens[:, 0]))


class ProbeAttention(MultiHeadAttention):
    """Cross-attention whose three projections are one matrix, `qkv`, as released SigLIPs keep it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.is_cross = True

    def q(self, x: Tensor) -> Tensor:  # type: ignore[override]  # there it is a layer, here rows of one
        dim = x.shape[-1]
        return F.linear(x, self.qkv.weight[:dim], self.qkv.bias[:dim])

    def kv(self, x: Tensor) -> Tensor:  # type: ignore[override]
        dim = x.shape[-1]
        return F.linear(x, self.qkv.weight[dim:], self.qkv.bias[dim:])


class ProbeHead(nn.Module):
    """SigLIP's: a learned probe reads all tokens by attention, then a residual MLP. (I, N, D) -> (I, D)."""

    def __init__(self, config: "CLIPConfig") -> None:
        super().__init__()
        sizes = config.image
        self.probe = nn.Parameter(torch.empty(1, 1, sizes.dim))
        self.cross = ProbeAttention(sizes.dim, sizes.heads)
        self.norm = nn.LayerNorm(sizes.dim, eps=sizes.norm_eps)
        self.mlp = MLP(sizes.dim, sizes.hidden, activation(sizes.activation))
        nn.init.xavier_uniform_(self.probe)
        self.cross.tap_prefix, self.mlp.tap_prefix = "probe.0.cross", "probe.0.mlp"

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.cross(self.probe.expand(len(tokens), -1, -1), tokens)
        return (x + self.mlp(self.norm(x)))[:, 0]


@dataclass(frozen=True, eq=False)
class CLIPLayout(Layout):
    """What differs between the two. `fields` has only the name of P."""

    width_of_text: bool = False  # whether P is a field of text_config, and by default its width
    image: str = "clip_vision_model"  # layouts of the towers
    text: str = "clip_text_model"
    image_head: type[nn.Module] = ClassTokenHead
    text_bias: bool = False  # of the last layer of the text
    scale: float = math.log(1 / 0.07)  # at the start of training
    bias: float | None = None  # likewise; None: logits have no bias


LAYOUTS = {
    "clip": CLIPLayout("CLIPModel", {"projection_dim": "projection_dim"}, maps_clip.CLIP),
    "siglip": CLIPLayout(
        "SiglipModel",
        {"projection_dim": "projection_size"},
        maps_clip.SIGLIP,
        width_of_text=True,
        image="siglip_vision_model",
        text="siglip_text_model",
        image_head=ProbeHead,
        text_bias=True,
        scale=math.log(10),
        bias=-10.0,
    ),
}


@dataclass(frozen=True)
class CLIPConfig(HFConfig[CLIPLayout]):
    """Sizes of the two towers. The defaults are those of CLIP ViT-B/32."""

    LAYOUTS: ClassVar[Mapping[str, CLIPLayout]] = LAYOUTS

    image: ViTConfig = field(default_factory=lambda: ViTConfig.from_hf({"model_type": "clip_vision_model"}))
    text: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    projection_dim: int = 512  # P
    layout: str = "clip"  # a key of LAYOUTS

    def __post_init__(self) -> None:
        for part in ("image", "text"):
            found, wanted = getattr(self, part).layout, getattr(self.family, part)
            if found != wanted:
                raise UserError(f"the {part} tower of a {self.layout} must be a {wanted}, not a {found}")
        if self.family.image_head is ProbeHead and self.projection_dim != self.image.dim:
            raise UserError(
                f"a {self.layout} makes texts {self.projection_dim} wide (projection_size of text_config) and images "
                f"{self.image.dim} (hidden_size of vision_config): they must be equal"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """From the content of a config.json. Raises UserError if it asks for something that is not supported.

        Old files also have `text_config_dict` and `vision_config_dict`, which take the place of the others.
        """
        kind = cls.layout_in(config)
        layout = cls.LAYOUTS[kind]
        names = [f"{part}_config{older}" for part in ("vision", "text") for older in ("_dict", "")]
        found = typed("config.json", config, dict.fromkeys(names, dict | None))
        vision, text = ({} if (x, y) == (None, None) else y if x is None else x for x, y in (found[:2], found[2:]))
        towers = (
            ViTConfig.from_hf({"model_type": layout.image} | vision),
            CLIPTextConfig.from_hf({"model_type": layout.text} | text),
        )
        width = fields_from_hf(text if layout.width_of_text else config, layout.fields, cls)
        default = {"projection_dim": towers[1].dim} if layout.width_of_text else {}
        return cls(*towers, layout=kind, **default | width)

    def to_hf(self) -> dict[str, Any]:
        layout, parts = self.family, super().to_hf()
        text, vision = self.text.to_hf(), self.image.to_hf()
        if layout.width_of_text:
            text |= {name: parts.pop(name) for name in layout.fields.values()}
        return parts | {"text_config": text, "vision_config": vision}


class CLIP(Released[CLIPConfig]):
    """Two towers, a head for each, and the scale of their similarity; in SigLIP also its bias.

    `patch_embed` as in `ViT`.
    """

    config_class = CLIPConfig

    def __init__(self, config: CLIPConfig, patch_embed: Stem | None = None) -> None:
        super().__init__()
        self.config, layout = config, config.family
        self.image, self.text = ViT(config.image, patch_embed), CLIPText(config.text)
        self.image_head = layout.image_head(config)
        self.text_head = nn.Linear(config.text.dim, config.projection_dim, bias=layout.text_bias)
        self.logit_scale = nn.Parameter(torch.full((1,), layout.scale))  # its logarithm
        self.logit_bias = None if layout.bias is None else nn.Parameter(torch.full((1,), layout.bias))
        start_as_released(self)

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """(I, C, H, W) -> (I, P), of length 1 and in fp32 at least. A zero vector stays zero: similar to nothing."""
        return F.normalize(precise(self.image_head(self.image(pixel_values))), dim=-1)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, P), as `embed_images`.

        attention_mask (B, T), True = may be attended to. CLIP needs none for texts padded on the right; SigLIP was
        trained without one, on texts of `self.text.longest` tokens. Raises UserError for a CLIP's text without end
        token, ValueError for one with more tokens than positions.
        """
        return F.normalize(precise(self.text_head(self.text(input_ids, attention_mask))), dim=-1)

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """(I, P) and (B, P), of length 1 -> (I, B): their similarity times the scale, plus SigLIP's bias."""
        return logits_of(images, texts, self.logit_scale, self.logit_bias)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> ImageTextOutput:
        """Images (I, C, H, W) and texts (B, T) -> embeddings and logits; arguments as in `embed_texts`."""
        images, texts = self.embed_images(pixel_values), self.embed_texts(input_ids, attention_mask)
        return ImageTextOutput(images, texts, self.logits(images, texts))


@torch.no_grad()
def start_as_released(model: CLIP) -> None:
    """Weights as OpenAI's code starts them; D is the width of a tower, L its layers.

    Texts: tokens 0.02, positions 0.01; in the blocks q, k, v D^-0.5, up (2 D)^-0.5, and what is added to the residual
    stream, out and down, D^-0.5 (2 L)^-0.5. Images: class token and positions D^-0.5, all else by torch's defaults,
    with those of its MultiheadAttention in the blocks. Projections D^-0.5. All biases of attention are zero.
    """
    text, image = model.text, model.image
    nn.init.normal_(text.tokens.weight, std=0.02)
    nn.init.normal_(text.positions.weight, std=0.01)
    added = text.dim**-0.5 * (2 * len(text.blocks)) ** -0.5
    for part in text.blocks.modules():
        if isinstance(part, MultiHeadAttention):
            nn.init.normal_(part.qkv.weight, std=text.dim**-0.5)
            nn.init.normal_(part.out.weight, std=added)
        if isinstance(part, MLP):
            nn.init.normal_(part.up.weight, std=(2 * text.dim) ** -0.5)
            nn.init.normal_(part.down.weight, std=added)
    for table in (*(getattr(image, name) for name in image.layout.tokens), image.positions):
        nn.init.normal_(table, std=image.dim**-0.5)
    if isinstance(image.patch_embed, PatchEmbed):
        nn.init.kaiming_uniform_(image.patch_embed.weight, math.sqrt(5))
    for part in image.blocks.modules():
        if isinstance(part, MultiHeadAttention):
            nn.init.xavier_uniform_(part.qkv.weight)
            part.out.reset_parameters()
        if isinstance(part, MLP):
            part.up.reset_parameters()
            part.down.reset_parameters()
    for part in (*text.blocks.modules(), *image.blocks.modules()):
        if isinstance(part, MultiHeadAttention):
            nn.init.zeros_(part.qkv.bias)
            nn.init.zeros_(part.out.bias)
    nn.init.normal_(model.text_head.weight, std=text.dim**-0.5)
    if isinstance(model.image_head, ClassTokenHead):
        nn.init.normal_(model.image_head.projection.weight, std=image.dim**-0.5)
