"""Prepares images for Fuyu: they keep their size unless it is above 1080 x 1920, and are padded to whole patches.

The rule is that of the public `preprocessor_config.json` of Fuyu-8B: a larger image is shrunk until it fits, a smaller
one is never enlarged. The padding, to the right and below, is a byte of 1 and is normalised like a pixel, so it is
nearly black.
"""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image

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
        if self.patch_size < 1 or any(side % self.patch_size for side in self.size):
            raise UserError(f"the largest size {self.size} must divide into patches of {self.patch_size} pixels")

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "FuyuImageProcessor":
        """From the content of a preprocessor_config.json; UserError for another type or a missing step."""
        name = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
        if re.sub(r"(FeatureExtractor|ImageProcessor)(Fast|Pil)?$", "", name) != "Fuyu":
            raise UserError(f"the images of a Fuyu are prepared by a FuyuImageProcessor, not by {name}")
        own = ("do_resize", "do_pad", "patch_size", "padding_value", "padding_mode")
        kinds = {"patch_size": dict | int | None, "padding_value": int | float | None, "padding_mode": str | None}
        kinds |= {"do_pad": bool | None, "do_resize": bool | None}
        patch, fill, mode, *steps = typed(name, config, kinds)
        sides = set(patch.values()) if isinstance(patch, dict) else {30 if patch is None else patch}
        fill = 1 if fill is None else fill
        if False in steps or mode not in (None, "constant") or fill not in range(256) or len(sides) != 1:
            raise UserError(f"{name}: images must be resized, padded with one byte, and cut into square patches")
        rest = {"size": {"height": 1080, "width": 1920}} | {k: v for k, v in config.items() if k not in own}
        # All other steps are those of ViT: bilinear, to [-1, 1].
        base = ImageProcessor.from_hf(rest | {"image_processor_type": "ViTImageProcessor"})
        shared = ("size", "resample", "crop_size", "rescale_factor", "mean", "std")
        (side,) = typed(f"{name}: patch_size", {"side": sides.pop()}, {"side": int})
        return cls(**{field: getattr(base, field) for field in shared}, patch_size=side, fill=int(fill))

    def to_hf(self) -> dict[str, Any]:
        sides = {"height": self.patch_size, "width": self.patch_size}
        return super().to_hf() | {"patch_size": sides, "do_pad": True, "padding_value": float(self.fill)}

    def target(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in pixels after resizing, before the padding."""
        scale = min(self.size[0] / height, self.size[1] / width, 1.0)
        return max(int(width * scale), 1), max(int(height * scale), 1)

    def _bytes(self, image: Image.Image | np.ndarray) -> np.ndarray:
        pixels = super()._bytes(image)
        right, below = (-side % self.patch_size for side in pixels.shape[1::-1])
        return np.pad(pixels, ((0, below), (0, right), (0, 0)), constant_values=self.fill)
