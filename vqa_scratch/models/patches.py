"""Patches of pixels, as Fuyu reads them (see `fuyu.py`): how an image is cut, and an image encoder that does no more.

Shapes: I images, C channels, h rows of w patches, N = h * w, p patch size.
"""

from dataclasses import dataclass

from torch import Tensor

from vqa_scratch.errors import UserError
from vqa_scratch.models.vit import patch_grid
from vqa_scratch.nn.states import ImageEncoder, Places, States


def cut(images: Tensor, patch_size: int) -> Tensor:
    """(I, C, h*p, w*p) -> (I, N, p*p*C): patches in raster order, each by row, column and channel.

    Raises UserError unless patches fit.
    """
    patch_grid(images.shape[2], images.shape[3], patch_size)
    blocks = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (I, C, h, p, w, p)
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


@dataclass(frozen=True)
class PixelPatchesConfig:
    """Sizes. Raises UserError for patches that cannot be."""

    patch_size: int = 16
    channels: int = 3

    def __post_init__(self) -> None:
        if not (0 < self.patch_size <= 1024 and self.channels > 0):
            raise UserError(f"there are no patches of {self.patch_size} pixels a side with {self.channels} channels")


class PixelPatches(ImageEncoder):
    """The state of a patch is its pixels. It has no parameters, and takes images of any size that patches divide."""

    prefix_tokens = 0

    def __init__(self, config: PixelPatchesConfig) -> None:
        super().__init__()
        self.config, self.dim = config, config.patch_size**2 * config.channels

    def places(self, height: int, width: int) -> Places:
        p = self.config.patch_size
        return Places(patch_grid(height, width, p), p / 2, p)

    def states(self, pixel_values: Tensor) -> States:
        return States(cut(pixel_values, self.config.patch_size), places=self.places(*pixel_values.shape[2:]))
