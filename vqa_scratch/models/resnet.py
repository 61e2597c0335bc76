"""ResNet, an image encoder: He et al. 2016, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385).

The stride of a bottleneck block is on its 3x3 convolution ("v1.5", as in torchvision's weights). There is no pooling
and no classifier: the output is the feature map, 7x7 for an image of 224 pixels, one vector a place.

The norm is an argument. `FrozenBatchNorm` always uses the statistics of its checkpoint: the statistics of small batches
are noise, and the model stays the same in training and in use. A ResNet without a checkpoint has no statistics, so it
gets `group_norm` (Wu and He 2018), which works on one image at a time.

Shapes: B batch, C channels, H x W pixels, h x w places of the map.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.nn.states import ImageEncoder, Places, States
from vqa_scratch.weights import maps
from vqa_scratch.weights.convert import load_into, to_hf, unwrapped
from vqa_scratch.weights.files import read_tensors, write_safetensors

Norm = Callable[[int], nn.Module]  # channels -> a module (B, C, h, w) -> the same
# The convolutions of each kind of block: kernel, whether it has the stride of the block, output width / block width
BLOCKS = {
    "basic": ((3, True, 1), (3, False, 1)),
    "bottleneck": ((1, False, 1), (3, True, 1), (1, False, 4)),
}


@dataclass(frozen=True)
class ResNetConfig:
    """Sizes of a ResNet. The defaults are ResNet-50; every stage after the first halves the map.

    The stem (7x7 convolution and max-pooling, each of stride 2) divides the sides by 4, so four stages make maps of
    1/32 of the image, and two stages maps of 1/8.
    """

    block: str = "bottleneck"  # or "basic": two 3x3 convolutions, as in ResNet-18 and -34
    depths: tuple[int, ...] = (3, 4, 6, 3)  # blocks of each stage
    widths: tuple[int, ...] = (64, 128, 256, 512)  # of the 3x3 convolutions of each stage; the first also of the stem
    channels: int = 3

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise UserError(f"block must be one of {', '.join(BLOCKS)}, got {self.block!r}")
        sizes = (*self.depths, *self.widths, self.channels)
        if not all(type(size) is int and 0 < size < 100_000 for size in sizes) or max(self.depths, default=0) > 1_000:
            raise UserError(f"depths, widths and channels must be usual numbers, got {sizes}")
        if len(self.depths) != len(self.widths) or not self.depths:
            raise UserError(f"depths and widths must be as many, got {self.depths} and {self.widths}")

    @property
    def dim(self) -> int:
        """Channels of the map."""
        return self.widths[-1] * BLOCKS[self.block][-1][-1]

    @property
    def stride(self) -> int:
        """Pixels from one place of the map to the next."""
        return 2 ** (1 + len(self.depths))

    def grid(self, pixels: int) -> int:
        """Places along a side of the map, from the pixels along that side: every halving rounds up."""
        return -(-pixels // self.stride)

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor], source: str) -> Self:
        """The sizes of weights in torchvision's layout. Raises UserError if they are not a ResNet's."""
        blocks: dict[int, set[int]] = {}
        for key in tensors:
            found = re.match(r"layer(\d+)\.(\d+)\.", key)
            if found:
                blocks.setdefault(int(found[1]), set()).add(int(found[2]))
        stages = range(1, 1 + len(blocks))
        keys = (f"layer{stage}.0.conv2.weight" for stage in stages)
        firsts = [tensors[key] for key in keys if key in tensors and tensors[key].ndim == 4]
        if not blocks or "conv1.weight" not in tensors or len(firsts) < len(blocks):
            raise UserError(f"{source} is not a ResNet in torchvision's layout: it lacks conv1 or layer1 ... layer4")
        return cls(
            block="bottleneck" if "layer1.0.conv3.weight" in tensors else "basic",
            depths=tuple(len(blocks.get(stage, ())) for stage in stages),
            widths=tuple(len(first) for first in firsts),
            channels=tensors["conv1.weight"].shape[1],
        )


class FrozenBatchNorm(nn.Module):
    """Batch norm with the statistics of the checkpoint, in training too; scale and shift still learn."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None].to(x.dtype) + shift[:, None, None].to(x.dtype)


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with 16 channels a group, or one group if the channels do not divide by 16."""
    return nn.GroupNorm(channels // 16 if channels % 16 == 0 else 1, channels)


NORMS: dict[str, Norm] = {"frozen_batch": FrozenBatchNorm, "group": group_norm}


def conv(narrow: int, wide: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias (the norm after it has one), initialised to keep the scale through ReLU."""
    layer = nn.Conv2d(narrow, wide, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


class Shortcut(nn.Module):
    """The shortcut of a block that changes the size: a 1x1 convolution of the block's stride, and a norm.

    Only the pixels that the stride leaves are given to the convolution. With the stride in the convolution, oneDNN 3.12
    (torch 2.13, AVX-512) writes out of bounds in its backward pass, for up to 16 channels on two or more threads.
    """

    def __init__(self, narrow: int, wide: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.stride, self.conv, self.norm = stride, conv(narrow, wide, 1, 1), norm(wide)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x[..., :: self.stride, :: self.stride]))


class Block(nn.Module):
    """Convolutions with norms, ReLU between them, the input added, ReLU."""

    def __init__(self, kind: str, narrow: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        inner, self.number = narrow, len(BLOCKS[kind])
        for i, (kernel, strided, factor) in enumerate(BLOCKS[kind], 1):
            outer = factor * width
            self.add_module(f"conv{i}", conv(inner, outer, kernel, stride if strided else 1))
            self.add_module(f"norm{i}", norm(outer))
            inner = outer
        self.shortcut = Shortcut(narrow, inner, stride, norm) if stride > 1 or narrow != inner else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.number + 1):
            y = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(y))
            y = F.relu(y) if i < self.number else y
        return F.relu(y + self.shortcut(x))


class ResNet(ImageEncoder):
    """Stem and stages `layer1`, `layer2`, ..., as torchvision names them."""

    prefix_tokens = 0  # every token is a place

    def __init__(self, config: ResNetConfig, norm: Norm = FrozenBatchNorm) -> None:
        super().__init__()
        self.config, self.dim = config, config.dim
        narrow = config.widths[0]
        self.conv1, self.norm1 = conv(config.channels, narrow, 7, 2), norm(narrow)
        self.stages = []
        for stage, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True), 1):
            blocks = []
            for i in range(depth):
                blocks.append(Block(config.block, narrow, width, 2 if i == 0 and stage > 1 else 1, norm))
                narrow = width * BLOCKS[config.block][-1][-1]
            self.add_module(f"layer{stage}", nn.ModuleList(blocks))
            self.stages.append(f"layer{stage}")

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, dim, h, w). Raises ValueError unless that is the shape of the pixels."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.channels:
            raise ValueError(
                f"pixel_values must be (batch, {self.config.channels}, height, width), got {tuple(pixel_values.shape)}"
            )
        # This memory layout is fastest on CPUs and tensor cores; the values are the same.
        x = pixel_values.contiguous(memory_format=torch.channels_last)
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 3, 2, padding=1)
        for stage in self.stages:
            for block in getattr(self, stage):
                x = block(x)
        return x

    def places(self, height: int, width: int) -> Places:
        """The places of the map, for an image of this size in pixels.

        Every strided layer has an odd kernel, padded by half its size, so place i is centred on pixel i * stride.
        """
        return Places((self.config.grid(height), self.config.grid(width)), 0.5, self.config.stride)

    def states(self, pixel_values: Tensor) -> States:
        """(B, C, H, W) -> states (B, h*w, dim): the map of `forward`, in raster order."""
        tokens = self(pixel_values).flatten(2).transpose(1, 2)
        return States(tokens, places=self.places(*pixel_values.shape[2:]))

    @classmethod
    def from_pretrained(cls, file: str | PathLike[str]) -> Self:
        """From a file with torchvision's weights (.safetensors, or .pth read as tensors only), of any depth and width.

        In eval mode, with frozen statistics. Raises UserError if the file is not a ResNet or does not fit.
        """
        tensors = {unwrapped(key): tensor for key, tensor in read_tensors(Path(file)).items()}
        model = cls(ResNetConfig.of_tensors(tensors, str(file)))
        load_into(model, tensors, maps.RESNET, source=str(file))
        return model.eval()

    def save_pretrained(self, file: str | PathLike[str]) -> None:
        """Write one safetensors file with torchvision's names, without a classifier, which this model does not have."""
        write_safetensors(Path(file), to_hf(self, maps.RESNET))
