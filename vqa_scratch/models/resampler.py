"""The Perceiver resampler: learned latents read an image of any number of tokens, and stand for it from then on.

Flamingo (Alayrac et al. 2022, arXiv 2204.14198, section 2.1 and figure 5), after the Perceiver (Jaegle et al. 2021,
2103.03206). Each block: l += attention of norm(l) to [norm(image); norm(l)]; l += MLP(norm(l)). No biases but those of
the norms.

Shapes: I images, N image tokens, R latents, C width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.nn import taps
from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.nn.layers import MLP, activation, init_weights
from vqa_scratch.nn.memory import Memory


@dataclass(frozen=True)
class ResamplerConfig:
    """Sizes and parts. The defaults but for the width are OpenFlamingo's (Awadalla et al. 2023, arXiv 2308.01390)."""

    dim: int  # of the image tokens, and of the latents
    latents: int = 64
    layers: int = 6
    heads: int = 8
    head_dim: int = 64
    hidden: int | None = None  # inner width of the MLP; None: 4 * dim
    activation: str = "gelu"
    head_norm: bool = False  # LayerNorms of the queries and keys of each head, as in Idefics


class ResamplerBlock(taps.Tapped):
    """The latents read the image and themselves, then their MLP."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm_image, self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        size = config.head_dim
        before = (nn.LayerNorm(size), nn.LayerNorm(size), nn.Identity()) if config.head_norm else ()
        self.cross = MultiHeadAttention(
            dim,
            config.heads,
            head_dim=config.head_dim,
            context_dim=dim,
            bias=False,
            out_bias=False,
            before=before,
        )
        self.mlp = MLP(dim, config.hidden or 4 * dim, activation(config.activation), bias=False)

    def forward(self, latents: Tensor, image: Tensor, seen: Tensor | None = None) -> Tensor:
        """(I, R, C) and (I, N, C) -> (I, R, C); `seen` (I, R, N + R): what each latent may read, None: all."""
        latents = taps.tap(self.tap_prefix, "resid_pre", latents)
        normed = self.norm1(latents)
        latents = latents + self.cross(normed, Memory(torch.cat([self.norm_image(image), normed], 1), seen=seen))
        latents = taps.tap(self.tap_prefix, "resid_mid", latents)
        return taps.tap(self.tap_prefix, "resid_post", latents + self.mlp(self.norm2(latents)))


class Resampler(nn.Module):
    """Latents, blocks and a last norm."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.latents = nn.Parameter(torch.randn(config.latents, config.dim))
        self.blocks = nn.ModuleList(ResamplerBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.blocks.apply(init_weights)
        taps.name_modules(self.blocks, "resampler")

    def forward(self, image: Tensor, seen: Tensor | None = None) -> Tensor:
        """(I, N, C) -> (I, R, C). `seen` (R, N) says which tokens each latent may read; None: all."""
        latents = self.latents.expand(len(image), -1, -1)
        if seen is not None:  # the latents are keys too, for all of them
            seen = F.pad(seen, (0, len(self.latents)), value=True).expand(len(image), -1, -1)
        for block in self.blocks:
            latents = block(latents, image, seen)
        return self.norm(latents)
