"""Augments training images without making their texts wrong: mirroring, a small turn, brightness and contrast.

Mirroring swaps left and right, so an image is mirrored only if none of its texts depends on a side. Hue and saturation
stay as they are: a text may name a colour.

A batch is changed at once, as bytes. The caller passes the random numbers, so that a resumed run, or one on several
ranks, sees the same images as a single process that was never stopped.

Shapes: I images of H x W pixels.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# English, and Chinese, which writes no spaces. For texts in other languages, switch mirroring off.
_SIDE_WORDS = re.compile(r"\b(left|right|leftmost|rightmost|clockwise|anticlockwise|counterclockwise)\b|[左右]", re.I)


def depends_on_side(text: str) -> bool:
    """Whether a text says left or right, and would be wrong about the mirrored image."""
    return _SIDE_WORDS.search(text) is not None


def rotate(pixels: Tensor, degrees: Tensor) -> Tensor:
    """(I, C, H, W) float turned about the centre by (I,) degrees, counterclockwise; border pixels fill the corners."""
    angle = torch.deg2rad(degrees)
    height, width = pixels.shape[2:]
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # Where each pixel comes from, in coordinates from -1 to 1 whose units differ if the image is not square.
    rows = [[cos, -sin * height / width, zero], [sin * width / height, cos, zero]]
    places = torch.stack([torch.stack(row, -1) for row in rows], 1)  # (I, 2, 3)
    grid = F.affine_grid(places, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class Augment:
    """The strength of each change; 0 leaves it out.

    flip                 -- probability of mirroring an image, where allowed
    degrees              -- largest turn either way
    brightness, contrast -- largest relative change, both uniform around 1
    """

    flip: float = 0.0
    degrees: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0

    def __call__(self, pixels: Tensor, may_flip: Tensor, chance: Tensor) -> Tensor:
        """(I, H, W, 3) uint8 to the same, every image changed on its own.

        may_flip (I,) bool; chance (I, 4), uniform from 0 to 1: for mirroring, turn, brightness and contrast.
        """
        flip = may_flip & (chance[:, 0] < self.flip)
        degrees, brightness, contrast = (
            (2 * chance[:, i] - 1) * limit for i, limit in ((1, self.degrees), (2, self.brightness), (3, self.contrast))
        )
        x = torch.where(flip[:, None, None, None], pixels.flip(2), pixels).permute(0, 3, 1, 2).float()  # (I, 3, H, W)
        if self.degrees:
            x = rotate(x, degrees)
        if self.brightness or self.contrast:
            middle = x.mean((1, 2, 3), keepdim=True)
            x = ((x - middle) * (1 + contrast[:, None, None, None]) + middle) * (1 + brightness[:, None, None, None])
        return x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
