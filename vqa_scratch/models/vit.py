"""Vision transformer: an image is a sequence of patches. Dosovitskiy et al. 2021 (arXiv 2010.11929), pre-LN.

One class and a table of layouts. google/vit and DINO (Caron et al. 2021) are a plain ViT; DeiT (Touvron et al. 2021,
2012.12877) has a distillation token after the class token; DINOv2 (Oquab et al. 2023, 2304.07193) scales the output of
every sublayer, and may have registers (Darcet et al. 2024, 2309.16588), tokens without a place in the image; CLIP
(Radford et al. 2021, 2103.00020) norms what its first block reads; SigLIP (Zhai et al. 2023, 2303.15343) has patches
alone. `vit_layouts.py` is that table.

Shapes: B batch, C channels, N patches in raster order (h rows of w), P prefix tokens (class token and the like), D
width, p patch size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.models.hf_config import HFConfig, Released, check_heads
from vqa_scratch.models.vit_layouts import LAYOUTS, ViTLayout
from vqa_scratch.nn import taps
from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.nn.dino import LayerScale, SwiGLU
from vqa_scratch.nn.layers import MLP, activation, init_weights
from vqa_scratch.nn.states import ImageEncoder, Places, States, Stem


@dataclass(frozen=True)
class ViTConfig(HFConfig[ViTLayout]):
    """Sizes of a ViT. The defaults are ViT-B/16 at 224 pixels."""

    LAYOUTS: ClassVar[Mapping[str, ViTLayout]] = LAYOUTS

    image_size: int | tuple[int, int] = 224  # pixels a side, or (height, width), of the position table
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
    layout: str = "vit"  # a key of LAYOUTS
    mlp_ratio: int | None = None  # if given, `hidden` is this many times the width
    swiglu: bool = False  # a gated MLP
    layer_scale: float | None = None  # initial value of the learned factors on each sublayer; None: no factors
    registers: int = 0  # learned tokens without a position

    def __post_init__(self) -> None:
        check_heads(self.dim, self.heads)
        if isinstance(self.image_size, list):  # as JSON has it
            object.__setattr__(self, "image_size", tuple(self.image_size))
        if self.mlp_ratio is not None:
            object.__setattr__(self, "hidden", int(self.dim * self.mlp_ratio))
        sizes = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,)
        if any(side % self.patch_size for side in sizes):
            raise UserError(f"image size {self.image_size} is not a multiple of the patch size {self.patch_size}")
        self.family  # noqa: B018 (it checks the layout)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches in the position table."""
        size = self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)
        return size[0] // self.patch_size, size[1] // self.patch_size

    @property
    def prefix_tokens(self) -> int:
        """How many tokens stand before the patches: class token, distillation token, registers."""
        return len(self.family.tokens) + self.registers


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """(h, w) patches of an image of this size in pixels. Raises UserError unless they fit."""
    if height % patch_size or width % patch_size:
        raise UserError(
            f"an image of {height}x{width} pixels does not divide into patches of {patch_size}x{patch_size}"
        )
    return height // patch_size, width // patch_size


def resize_positions(table: Tensor, grid: tuple[int, int], size: tuple[int, int], *, antialias: bool = False) -> Tensor:
    """Resize a table (1, P + rows*columns, D) of `grid` to (h, w) patches: (1, P + h*w, D).

    The first P rows stay; the others are resized bicubically, with `antialias` smoothed when they become fewer.
    """
    if size == grid:
        return table
    prefix, places = table.tensor_split([table.shape[1] - math.prod(grid)], 1)
    places = places.unflatten(1, grid).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    places = F.interpolate(places, size=size, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([prefix, places.flatten(2).transpose(1, 2)], 1)


class PatchEmbed(Stem):
    """Cut an image into patches and map each linearly: a convolution with stride = kernel, as one matrix product."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.first = p / 2  # the middle of the first patch
        # In the shape of that convolution, (D, C, p, p), as in checkpoints.
        self.weight = nn.Parameter(torch.empty(config.dim, config.channels, p, p).normal_(std=config.init_std))
        self.bias = nn.Parameter(torch.zeros(config.dim)) if config.family.patch_bias else None

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, C, h*p, w*p) -> (B, N, D)."""
        p = self.weight.shape[-1]
        cut = pixel_values.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, h, p, w, p)
        patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, C*p*p)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class ConvStem(Stem):
    """log2(p) convolutions, 3x3 with stride 2, GELU between them; each doubles the width, up to D.

    A small ViT learns faster with it than with linear patches (Xiao et al. 2021, "Early Convolutions Help Transformers
    See Better", 2106.14881). Each kernel is centred on every second pixel from the first on, so token (i, j) is centred
    on pixel (p*i, p*j), the corner of its patch, not the middle.
    """

    first = 0.5  # the middle of the first pixel

    def __init__(self, channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        halvings = int(math.log2(patch_size))
        if 2**halvings != patch_size or halvings == 0:
            raise UserError(f"a convolutional stem needs a patch size that is a power of two above 1, not {patch_size}")
        if dim % 2 ** (halvings - 1):
            raise UserError(f"a stem of {halvings} convolutions needs a width divisible by {2 ** (halvings - 1)}")
        widths = [channels] + [dim >> (halvings - 1 - i) for i in range(halvings)]
        layers: list[nn.Module] = []
        for narrow, wide in zip(widths[:-1], widths[1:], strict=True):
            conv = nn.Conv2d(narrow, wide, kernel_size=3, stride=2, padding=1)
            weight, bias = conv.parameters()
            # torch's default shrinks the signal at every layer until the position table drowns it.
            nn.init.kaiming_normal_(weight, nonlinearity="relu")
            nn.init.zeros_(bias)
            layers += [conv, nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, C, h*p, w*p) -> (B, N, D)."""
        return self.layers(pixel_values).flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, N, D)


class ViTBlock(taps.Tapped):
    """Pre-LN: x + attention(norm(x)), then x + MLP(norm(x)); in DINOv2 a learned scale comes before each sum."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()

        def scale() -> nn.Module:
            return nn.Identity() if config.layer_scale is None else LayerScale(config.dim, config.layer_scale)

        self.norm1 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attn = MultiHeadAttention(config.dim, config.heads, bias=config.qkv_bias, dropout=config.attention_dropout)
        self.scale1 = scale()
        self.norm2 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        if config.swiglu:
            self.mlp: SwiGLU | MLP = SwiGLU(config.dim, config.hidden)
        else:
            self.mlp = MLP(config.dim, config.hidden, activation(config.activation), dropout=config.dropout)
        self.scale2 = scale()
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, key_mask: Tensor | None = None, first: int | None = None, causal: bool = False
    ) -> Tensor:
        """(B, T, D) -> (B, T, D), or (B, first, D) if only the first tokens are needed: the others skip the MLP."""
        x = taps.tap(self.tap_prefix, "resid_pre", x)
        attended = self.attn(self.norm1(x), key_mask=key_mask, causal=causal)
        x = x[:, :first] + self.dropout(self.scale1(attended[:, :first]))
        x = taps.tap(self.tap_prefix, "resid_mid", x)
        return taps.tap(self.tap_prefix, "resid_post", x + self.scale2(self.mlp(self.norm2(x))))


class ViT(Released[ViTConfig], ImageEncoder):
    """Prefix tokens and patches, learned positions, pre-LN blocks, a last norm (in CLIP that is part of its head).

    `patch_embed` replaces the linear patches.
    """

    config_class = ViTConfig

    def __init__(self, config: ViTConfig, patch_embed: Stem | None = None) -> None:
        super().__init__()
        self.config, self.layout = config, config.family
        self.dim, self.prefix_tokens = config.dim, config.prefix_tokens
        self.patch_embed = PatchEmbed(config) if patch_embed is None else patch_embed
        tokens = self.layout.tokens
        for name in tokens:
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, config.dim)))
        if config.registers:
            self.registers = nn.Parameter(torch.zeros(1, config.registers, config.dim))
        self.positions = nn.Parameter(torch.empty(1, len(tokens) + math.prod(config.grid), config.dim))
        self.dropout = nn.Dropout(config.dropout)
        norms = [nn.LayerNorm(config.dim, config.norm_eps) if has else nn.Identity() for has in self.layout.norms]
        self.first_norm = norms[0]
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.layers))
        self.norm = norms[1]
        for table in (*(getattr(self, name) for name in tokens), self.positions):
            nn.init.trunc_normal_(table, std=config.init_std)
        self.blocks.apply(lambda module: init_weights(module, config.init_std))
        taps.name_modules(self.blocks, "image")

    def places(self, height: int, width: int) -> Places:
        """The places of the patches of an image of this size in pixels. Raises ValueError unless patches fit."""
        p = self.config.patch_size
        return Places(patch_grid(height, width, p), self.patch_embed.first, p)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, P + N, D): the input of the first block. Raises ValueError unless patches fit."""
        if pixel_values.ndim != 4:
            raise ValueError(f"pixel_values must be (batch, channels, height, width), got {tuple(pixel_values.shape)}")
        config, size = self.config, self.places(*pixel_values.shape[2:]).grid
        positions = resize_positions(self.positions, config.grid, size, antialias=self.layout.antialias)
        x = self.patch_embed(pixel_values)
        prefix = [getattr(self, name).expand(len(x), -1, -1) for name in self.layout.tokens]
        x = torch.cat([*prefix, x], 1) + positions
        if config.registers:
            before, after = x.tensor_split([len(prefix)], 1)
            x = torch.cat([before, self.registers.expand(len(x), -1, -1), after], 1)
        return self.first_norm(self.dropout(x))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, P + N, D), the class token first. Raises ValueError unless patches fit the image."""
        return self.states(pixel_values).tokens

    def states(self, pixel_values: Tensor) -> States:
        """The states of `forward`, with the places of the patches."""
        x = self.embed(pixel_values)
        for block in self.blocks:
            x = block(x)
        return States(self.norm(x), places=self.places(*pixel_values.shape[2:]))
