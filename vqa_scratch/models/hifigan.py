"""HiFi-GAN, the vocoder of Kong et al. 2020 (arXiv 2010.05646), in the layout of SpeechT5: log-mel frames to a wave.

Transposed convolutions stretch the frames, in the released model 4 x 4 x 4 x 4 = 256 samples each. After each the mean
of several residual blocks, which see different lengths of time, refines them.

Shapes: B batch, F frames, M mel bins, C channels, N samples, F times the product of `stretch`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.models.hf_config import HFConfig, Layout, Released, sizes_in
from vqa_scratch.weights import fields, maps_speech

_LISTS = {"stretch": "upsample_rates", "stretch_kernels": "upsample_kernel_sizes", "kernels": "resblock_kernel_sizes"}
_LAYOUT = Layout("SpeechT5HifiGan", fields.HIFIGAN, maps_speech.HIFIGAN, lists=_LISTS)
_DILATIONS = "resblock_dilation_sizes"
_GAIN = re.compile(r"(.*\.)(?:weight_g|parametrizations\.weight\.original0)")


@dataclass(frozen=True)
class HifiGANConfig(HFConfig[Layout]):
    """Sizes of a HiFi-GAN. The defaults are those of microsoft/speecht5_hifigan."""

    LAYOUTS: ClassVar[Mapping[str, Layout]] = dict.fromkeys(("speecht5_hifigan", "hifigan"), _LAYOUT)

    layout: str = "speecht5_hifigan"  # or the older name; they differ in nothing else
    mels: int = 80
    rate: int = 16_000  # samples a second
    channels: int = 512  # before the first stretching, each of which halves them
    stretch: tuple[int, ...] = (4, 4, 4, 4)
    stretch_kernels: tuple[int, ...] = (8, 8, 8, 8)
    kernels: tuple[int, ...] = (3, 7, 11)  # of the residual blocks after a stretching
    dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3
    slope: float = 0.1
    normalize: bool = True  # the frames, by mean and scale of the checkpoint
    init_std: float = 0.01

    def __post_init__(self) -> None:
        if len(self.stretch) != len(self.stretch_kernels) or len(self.kernels) != len(self.dilations):
            raise UserError(f"a HiFi-GAN has a kernel for each of upsample_rates, and one for each of {_DILATIONS}")
        if self.channels % 2 ** len(self.stretch):
            raise UserError(f"{self.channels} channels cannot be halved {len(self.stretch)} times")

    @classmethod
    def further_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        each = config.get(_DILATIONS, cls.dilations)
        each = each if isinstance(each, (list, tuple)) else [each]
        return {"dilations": tuple(sizes_in({_DILATIONS: one}, _DILATIONS) for one in each)}

    def to_hf(self) -> dict[str, Any]:
        return super().to_hf() | {_DILATIONS: self.dilations}


class HifiGANBlock(nn.Module):
    """x + conv(leaky(dilated conv(leaky(x)))), once for each dilation. (B, C, N) -> (B, C, N)."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...], slope: float) -> None:
        super().__init__()

        def conv(dilation: int) -> nn.Conv1d:
            return nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=dilation * (kernel - 1) // 2)

        self.dilated, self.plain = nn.ModuleList(map(conv, dilations)), nn.ModuleList(conv(1) for _ in dilations)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        for dilated, plain in zip(self.dilated, self.plain, strict=True):
            x = x + plain(F.leaky_relu(dilated(F.leaky_relu(x, self.slope)), self.slope))
        return x


class HifiGAN(Released[HifiGANConfig]):
    """Convolution, stretchings with their residual blocks, convolution, tanh."""

    config_class = HifiGANConfig
    mean: Tensor
    scale: Tensor

    def __init__(self, config: HifiGANConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels >> level for level in range(len(config.stretch) + 1)]
        sizes = zip(widths, widths[1:], config.stretch_kernels, config.stretch, strict=False)
        kinds = list(zip(config.kernels, config.dilations, strict=True))
        self.first = nn.Conv1d(config.mels, config.channels, 7, padding=3)
        self.ups = nn.ModuleList(nn.ConvTranspose1d(a, b, k, s, padding=(k - s) // 2) for a, b, k, s in sizes)
        self.blocks = nn.ModuleList(HifiGANBlock(c, *kind, config.slope) for c in widths[1:] for kind in kinds)
        self.last = nn.Conv1d(widths[-1], 1, 7, padding=3)
        self.register_buffer("mean", torch.zeros(config.mels))
        self.register_buffer("scale", torch.ones(config.mels))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=config.init_std) if parameter.ndim > 1 else nn.init.zeros_(parameter)

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], tensors: dict[str, Tensor], source: str) -> Self:
        """As in `Released`; weights saved with weight norm, in either spelling, are multiplied out."""
        return super().from_checkpoint(config, without_weight_norm(tensors), source)

    def forward(self, frames: Tensor) -> Tensor:
        """Log-mel frames (B, F, M) -> waves (B, N) in [-1, 1]."""
        if self.config.normalize:
            frames = (frames - self.mean) / self.scale
        x, each = self.first(frames.transpose(1, 2)), len(self.config.kernels)
        for level, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, self.config.slope))
            refined = [block(x) for block in self.blocks[level * each : (level + 1) * each]]
            x = sum(refined[1:], start=refined[0]) / each
        return self.last(F.leaky_relu(x)).tanh().squeeze(1)  # this slope is 0.01, torch's own, as in the release


def without_weight_norm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with each pair of gain g (C, 1, 1) and direction v as the weight g v / |v| (Salimans and Kingma 2016,
    arXiv 1602.07868, equation 2), the norm over all axes but the first."""
    result = dict(tensors)
    for name in tensors:
        other = name.replace("weight_g", "weight_v").replace("original0", "original1")
        if (found := _GAIN.fullmatch(name)) and other in tensors:
            gain, direction = result.pop(name), result.pop(other)
            result[f"{found[1]}weight"] = direction * (gain / direction.flatten(1).norm(dim=1).view_as(gain))
    return result
