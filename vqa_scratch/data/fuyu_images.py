"""Prepares images for Fuyu: they keep their size unless it is above 1080 x 1920, and are padded to whole patches.

The rule is that of the public `preprocessor_config.json` of Fuyu-8B: a larger image is shrunk until it fits, a smaller
one is never enlarged. The padding, to the right and below, is a byte of 1 and is normalised like a pixel, so it is
nearly black.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from vqa_scratch.data.image_config import kind_of, read_fields
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.errors import UserError
from vqa_scratch.storage import typed


@dataclass(frozen=True)
class FuyuImageProcessor(ImageProcessor):
    """`size` (height, width) is the largest in pixels; sides become multiples of `patch_size`, filled with `fill`."""

    pads: ClassVar[bool] = True

    size: tuple[int, int] = (1080, 1920)
    patch_size: int = 30
    fill: int = 1
    kind: str = "FuyuImageProcessor"

    def __post_init__(self) -> None:
        super().__post_init__()
        pair, patch = isinstance(self.size, tuple), self.patch_size
        if patch < 1 or not pair or any(side % patch for side in self.size):
            raise UserError(f"size must be a height and a width of whole patches of {self.patch_size}: {self.size}")

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "FuyuImageProcessor":
        """From the content of a preprocessor_config.json; UserError for another type or a missing step."""
        name, kind = kind_of(config)
        if kind != cls.kind:
            raise UserError(f"the images of a Fuyu are prepared by a FuyuImageProcessor, not by {name}")
        kinds = {"patch_size": dict | None, "padding_value": int | float | None, "padding_mode": str | None}
        patch, fill, mode, *steps = typed(name, config, kinds | {"do_pad": bool | None, "do_resize": bool | None})
        patch, fill = patch or {"height": 30, "width": 30}, 1 if fill is None else fill
        height, width = typed(f"{name}: patch_size", patch, {"height": int, "width": int})
        if False in steps or mode not in (None, "constant") or fill not in range(256) or height != width:
            raise UserError(f"{name}: images must be resized, padded with one byte, and cut into square patches")
        own = (*kinds, "do_pad", "do_resize")
        rest = {"size": {"height": 1080, "width": 1920}} | {k: v for k, v in config.items() if k not in own}
        # All other steps are those of ViT: bilinear, to [-1, 1].
        fields = read_fields(rest | {"image_processor_type": "ViTImageProcessor"}) | {"kind": cls.kind}
        return cls(**fields, patch_size=height, fill=int(fill))

    def to_hf(self) -> dict[str, Any]:
        sides = {"height": self.patch_size, "width": self.patch_size}
        return super().to_hf() | {"patch_size": sides, "do_pad": True, "padding_value": float(self.fill)}

    @property
    def output_size(self) -> None:
        """It depends on the image."""

    def target(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in pixels after resizing, before the padding."""
        scale = min(self.size[0] / height, self.size[1] / width, 1.0)
        return max(int(width * scale), 1), max(int(height * scale), 1)

    def _bytes(self, image: Image.Image | np.ndarray) -> np.ndarray:
        pixels = super()._bytes(image)
        right, below = (-side % self.patch_size for side in pixels.shape[1::-1])
        return np.pad(pixels, ((0, below), (0, right), (0, 0)), constant_values=self.fill)
