"""Vision transformer: an image is a sequence of patches. Dosovitskiy et al. 2021 (arXiv 2010.11929), pre-LN.

Loads google/vit and DINO (Caron et al. 2021) checkpoints, which share one layout.

Shapes: B batch, C channels, N image tokens in raster order (h rows of w), D width, p patch size.
"""

from dataclasses import dataclass
from os import PathLike
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.models.hf_config import check_heads, fields_from_hf
from vqa_scratch.nn import taps
from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.nn.layers import MLP, activation, init_weights
from vqa_scratch.weights import maps
from vqa_scratch.weights.convert import load_into, to_hf
from vqa_scratch.weights.files import read_checkpoint, write_checkpoint

FIELDS = {  # ours: a ViT checkpoint's; ViLT and BLIP-2 add to them
    "image_size": "image_size",
    "patch_size": "patch_size",
    "channels": "num_channels",
    "dim": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "activation": "hidden_act",
    "qkv_bias": "qkv_bias",
    "norm_eps": "layer_norm_eps",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "init_std": "initializer_range",
}


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a ViT. The defaults are ViT-B/16 at 224 pixels."""

    image_size: int = 224  # pixels a side that the position table is made for
    patch_size: int = 16
    channels: int = 3
    dim: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072  # inner width of the MLP
    activation: str = "gelu"
    qkv_bias: bool = True
    norm_eps: float = 1e-12
    dropout: float = 0.0
    attention_dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        check_heads(self.dim, self.heads)
        if not isinstance(self.image_size, int) or not isinstance(self.patch_size, int):
            raise UserError(f"image and patch must be square, got {self.image_size} and {self.patch_size}")
        if self.image_size % self.patch_size:
            raise UserError(f"image size {self.image_size} is not a multiple of the patch size {self.patch_size}")

    @property
    def grid(self) -> int:
        """Patches a side at the image size."""
        return self.image_size // self.patch_size

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        """From a config.json of model type "vit". Raises UserError if it asks for something this model is not."""
        return cls(**fields_from_hf(config, FIELDS, "vit"))

    def to_hf(self) -> dict[str, Any]:
        """The inverse of `from_hf`."""
        fields = {theirs: getattr(self, ours) for ours, theirs in FIELDS.items()}
        return {"architectures": ["ViTModel"], "model_type": "vit", **fields}


def resize_grid(table: Tensor, grid: int, size: tuple[int, int]) -> Tensor:
    """A table of places (1, grid*grid, D) for a map of (h, w) places: resized bicubically if need be, (1, h*w, D)."""
    if size == (grid, grid):
        return table
    places = table.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)  # (1, D, grid, grid)
    places = F.interpolate(places, size=size, mode="bicubic", align_corners=False)
    return places.flatten(2).transpose(1, 2)


def resize_positions(table: Tensor, grid: int, size: tuple[int, int]) -> Tensor:
    """A position table (1, 1 + grid*grid, D), class token first, for (h, w) patches: resized bicubically if need be."""
    if size == (grid, grid):
        return table
    return torch.cat([table[:, :1], resize_grid(table[:, 1:], grid, size)], 1)


class PatchEmbed(nn.Module):
    """Cut an image into patches and map each linearly: a convolution with stride = kernel, written as one product."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        p = config.patch_size
        # Kept in the shape of that convolution, (D, C, p, p), which is how checkpoints hold it.
        self.weight = nn.Parameter(torch.empty(config.dim, config.channels, p, p).normal_(std=config.init_std))
        self.bias = nn.Parameter(torch.zeros(config.dim))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, C, h*p, w*p) -> (B, N, D)."""
        p = self.weight.shape[-1]
        cut = pixel_values.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, h, p, w, p)
        patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, C*p*p)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class ViTBlock(nn.Module):
    """Pre-LN: x + attention(norm(x)), then x + MLP(norm(x))."""

    tap_prefix: str | None = None

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attn = MultiHeadAttention(
            config.dim, config.heads, bias=config.qkv_bias, out_bias=True, dropout=config.attention_dropout
        )
        self.norm2 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = MLP(config.dim, config.hidden, activation(config.activation), dropout=config.dropout)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, key_mask: Tensor | None = None, first: int | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D), or (B, first, D): what is read of the first tokens only needs no MLP of the rest."""
        x = taps.tap(self.tap_prefix, "resid_pre", x)
        x = x[:, :first] + self.dropout(self.attn(self.norm1(x), key_mask=key_mask)[:, :first])
        x = taps.tap(self.tap_prefix, "resid_mid", x)
        return taps.tap(self.tap_prefix, "resid_post", x + self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Class token and patches, learned positions, pre-LN blocks, a last norm.

    `patch_embed` replaces the linear patching: any module (B, C, H, W) -> (B, N, D) with one token for each
    patch_size x patch_size square in raster order, for example a convolutional stem (Xiao et al. 2021, 2106.14881).
    """

    def __init__(self, config: ViTConfig, patch_embed: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config) if patch_embed is None else patch_embed
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.positions = nn.Parameter(torch.empty(1, 1 + config.grid**2, config.dim))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        nn.init.trunc_normal_(self.cls_token, std=config.init_std)
        nn.init.trunc_normal_(self.positions, std=config.init_std)
        self.blocks.apply(lambda module: init_weights(module, config.init_std))
        taps.name_modules(self, "image")

    def patches_of(self, pixel_values: Tensor) -> tuple[int, int]:
        """(h, w) patches of an image (B, C, H, W). Raises ValueError unless they fit."""
        height, width = pixel_values.shape[2:]
        p = self.config.patch_size
        if height % p or width % p:
            raise ValueError(f"image of {height}x{width} pixels does not divide into patches of {p}x{p}")
        return height // p, width // p

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1 + N, D), the class token first. Raises ValueError unless patches fit the image."""
        if pixel_values.ndim != 4:
            raise ValueError(f"pixel_values must be (batch, channels, height, width), got {tuple(pixel_values.shape)}")
        positions = resize_positions(self.positions, self.config.grid, self.patches_of(pixel_values))
        x = self.patch_embed(pixel_values)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + positions  # (B, 1 + N, D)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    @classmethod
    def from_pretrained(cls, source: str | PathLike[str]) -> Self:
        """From a checkpoint folder or Hub id, in eval mode. Raises UserError when something does not fit."""
        config, tensors = read_checkpoint(source)
        model = cls(ViTConfig.from_hf(config))
        load_into(model, tensors, maps.VIT, source=str(source))
        return model.eval()

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """config.json and model.safetensors that `from_pretrained` and `transformers` read.

        Raises ValueError for a model with its own `patch_embed`: the layout has no place for it.
        """
        write_checkpoint(folder, self.config.to_hf(), to_hf(self, maps.VIT))
