"""A convolutional stem in place of a ViT's linear patching. Xiao et al. 2021, "Early Convolutions Help Transformers
See Better" (arXiv 2106.14881): a few strided 3x3 convolutions make small ViTs learn faster.

Shapes: B batch, C channels, h x w patches, N = h*w image tokens, D width, p patch size.
"""

import math

from torch import Tensor, nn

from vqa_scratch.errors import UserError


class ConvStem(nn.Module):
    """log2(p) convolutions of stride 2 with GELU between them; the width doubles up to D at the last."""

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
            # torch's default shrinks the signal at every layer, and the position table would drown what is left.
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)
            layers += [conv, nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, C, h*p, w*p) -> (B, N, D), tokens in raster order."""
        return self.layers(pixel_values).flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, N, D)
