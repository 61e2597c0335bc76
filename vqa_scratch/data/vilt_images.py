"""Prepares images for ViLT: they keep about their shape, so a batch is padded and a mask marks the real pixels.

The rule is that of Kim et al. 2021 and the public `preprocessor_config.json` files of ViLT: the shorter side becomes
384 pixels, the longer at most 1333/800 of that, and both are cut down to multiples of the patch. A very long image
keeps one patch along its shorter side and is stretched to it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from vqa_scratch.data.image_config import kind_of, read_fields
from vqa_scratch.data.images import CONFIG_NAME, ImageProcessor
from vqa_scratch.errors import UserError
from vqa_scratch.storage import read_object, typed

LONGEST = 1333 / 800  # the longer side in units of the shorter, at most


@dataclass(frozen=True)
class ViltImageProcessor(ImageProcessor):
    """`size` is the shorter side in pixels; both sides are multiples of `divisor`."""

    pads: ClassVar[bool] = True

    size: int = 384
    resample: int = Image.Resampling.BICUBIC.value
    divisor: int = 32
    kind: str = "ViltImageProcessor"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.size, int) or self.size < self.divisor or self.divisor < 1:
            least = f"{self.divisor} pixels (size_divisor)"
            raise UserError(f"size must be a shortest edge of {least} or more: {self.size}")

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ViltImageProcessor":
        """From the content of a preprocessor_config.json; UserError for another type or a missing step."""
        name, kind = kind_of(config)
        if kind != cls.kind:
            raise UserError(f"the images of a ViLT are prepared by a ViltImageProcessor, not by {name}")
        if config.get("do_resize") is False:
            raise UserError(f"{name} without do_resize leaves images that no patches fit")
        own = ("do_pad", "size_divisor", "image_processor_type", "feature_extractor_type")
        rest = {"size": 384} | {key: value for key, value in config.items() if key not in own}
        # All other steps are those of SigLIP: bicubic, to [-1, 1], a bare size is the shortest edge.
        fields = read_fields(rest | {"image_processor_type": "SiglipImageProcessor"}) | {"kind": cls.kind}
        (divisor,) = typed(name, config, {"size_divisor": int | None})
        return cls(**fields, divisor=divisor or 32)

    def to_hf(self) -> dict[str, Any]:
        return super().to_hf() | {"size_divisor": self.divisor, "do_pad": True}

    def target(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in pixels after resizing."""
        longest = int(LONGEST * self.size)
        scale = self.size / min(width, height)
        sides = [self.size if side == min(width, height) else scale * side for side in (width, height)]
        if max(sides) > longest:
            sides = [longest / max(sides) * side for side in sides]
        across, down = (max(int(side + 0.5) // self.divisor, 1) * self.divisor for side in sides)
        return across, down


def read_processor(folder: Path) -> ImageProcessor:
    """The preprocessing of a run, of either kind."""
    kind = read_object(folder / CONFIG_NAME).get("image_processor_type")
    return (ViltImageProcessor if kind == ViltImageProcessor.kind else ImageProcessor).from_pretrained(folder)
