"""Prepares images as each released vision encoder expects them, and loads those of a data set in batches.

The steps are those of the public `preprocessor_config.json` files (ViT, DeiT, DINO, CLIP, BLIP, SigLIP): resize, crop
the centre, scale to [0, 1], subtract a mean and divide by a deviation. Everything after the crop depends on one byte
and its channel alone, so it is looked up in a table of 3 x 256 values. A batch kept as bytes and normalised on the
device therefore equals the full path bit for bit.

Shapes: B batch, I images, H image height, W image width, 3 colour channels.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vqa_scratch.data.image_config import HALF, read_fields, write_fields
from vqa_scratch.data.image_files import load_image, pad, to_rgb
from vqa_scratch.data.mapped import mapped_array, stamps
from vqa_scratch.errors import UserError, naming
from vqa_scratch.storage import read_object, typed, write_json
from vqa_scratch.weights.hub import locate

__all__ = ["ImageProcessor", "Images", "load_image", "to_rgb"]

CONFIG_NAME = "preprocessor_config.json"
JOINT_CONFIG_NAME = "processor_config.json"  # of a model with several inputs; it has a part for each


def _crop_start(length: int, wanted: int) -> int:
    """Where a centre crop begins; negative if the image is shorter than the crop.

    Rounding down puts the extra row of an odd padding at the start, as the reference does.
    """
    return (length - wanted) // 2


@dataclass(frozen=True)
class ImageProcessor:
    """Preprocessing of one vision encoder; a step whose field is None is left out.

    size           -- (height, width) to resize to; an int is the length of the shortest edge
    resample       -- Pillow's number of the filter: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming
    crop_size      -- (height, width) cut from the centre; a smaller image is padded with zeros
    rescale_factor -- multiplies the bytes
    mean, std      -- per channel, after rescaling
    kind           -- the processor type that `to_hf` names
    Images are always converted to RGB by `to_rgb`.
    """

    pads: ClassVar[bool] = False  # whether images keep their own sizes, and are padded to batches

    size: tuple[int, int] | int | None = (224, 224)
    resample: int = Image.Resampling.BILINEAR.value
    crop_size: tuple[int, int] | None = None
    rescale_factor: float | None = 1 / 255
    mean: tuple[float, float, float] | None = HALF
    std: tuple[float, float, float] | None = HALF
    kind: str = "ViTImageProcessor"

    def __post_init__(self) -> None:
        if not isinstance(self.resample, int) or self.resample not in range(6):
            raise UserError(f"resample must be one of Pillow's filters 0 to 5, not {self.resample!r}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together: give both, or None for both")
        if self.std is not None and not all(self.std):
            raise UserError(f"image_std must not hold a zero: {self.std}")

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ImageProcessor":
        """From the content of a preprocessor_config.json; UserError for an unknown type, step or size."""
        return cls(**read_fields(config))

    def to_hf(self) -> dict[str, Any]:
        """The content of a preprocessor_config.json; `from_hf` reads it back into an equal processor."""
        return write_fields(vars(self))

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | Path) -> "ImageProcessor":
        """Reads preprocessor_config.json, or the image part of processor_config.json, which newer files have instead.

        Raises UserError if both are missing or cannot be followed.
        """
        folder = locate(folder_or_hub_id, [CONFIG_NAME, JOINT_CONFIG_NAME], CONFIG_NAME)
        path = next((folder / name for name in (CONFIG_NAME, JOINT_CONFIG_NAME) if (folder / name).is_file()), None)
        if path is None:
            raise UserError(f"{folder} has no {CONFIG_NAME}")
        config = read_object(path)
        if path.name == JOINT_CONFIG_NAME:
            (config,) = typed(path, config, {"image_processor": dict})
        with naming(path):
            return cls.from_hf(config)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes preprocessor_config.json."""
        write_json(Path(folder) / CONFIG_NAME, self.to_hf(), compact=True)

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of every result, or None if it depends on the image."""
        return self.crop_size or (self.size if isinstance(self.size, tuple) else None)

    @cached_property
    def table(self) -> torch.Tensor:
        """(3, 256) float32: the value of each byte in each channel."""
        values = np.arange(256, dtype=np.float64)
        # In float64 as far as here, like the reference processors; every later step is in float32.
        values = (values if self.rescale_factor is None else values * self.rescale_factor).astype(np.float32)
        if self.mean is None:
            return torch.from_numpy(np.tile(values, (3, 1)))
        mean, std = (np.asarray(v, dtype=np.float32)[:, None] for v in (self.mean, self.std))
        return torch.from_numpy((values - mean) / std)

    def target(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in pixels after resizing, before the crop."""
        if self.size is None:
            return width, height
        if isinstance(self.size, tuple):
            return self.size[1], self.size[0]
        longer = int(self.size * max(width, height) / min(width, height))
        return (self.size, longer) if width <= height else (longer, self.size)

    def box(self, box: Sequence[float], height: int, width: int) -> tuple[float, float, float, float]:
        """A box (left, top, right, bottom) of an image of that size, in the result; what the crop cuts off is gone."""
        edges = []
        for axis, length in enumerate((width, height)):
            resized = self.target(width, height)[axis]
            wanted = resized if self.crop_size is None else self.crop_size[1 - axis]
            shift = _crop_start(resized, wanted)
            edges.append([min(max(box[i] * resized / length - shift, 0), wanted) for i in (axis, axis + 2)])
        (left, right), (top, bottom) = edges
        return left, top, right, bottom

    def _bytes(self, image: Image.Image | np.ndarray) -> np.ndarray:
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(f"an array must be uint8 (H, W, 3), not {image.dtype} {image.shape}")
            image = Image.fromarray(image)
        image = to_rgb(image)
        if self.size is not None:
            image = image.resize(self.target(*image.size), resample=self.resample)
        if self.crop_size is not None:
            height, width = self.crop_size
            left, top = _crop_start(image.width, width), _crop_start(image.height, height)
            image = image.crop((left, top, left + width, top + height))  # zeros outside the image
        return np.asarray(image)

    def to_uint8(self, image: Image.Image | np.ndarray | Sequence[Image.Image | np.ndarray]) -> np.ndarray:
        """uint8 (H, W, 3), or (B, H, W, 3) for a list: resized and cropped, for `normalize`."""
        if isinstance(image, (Image.Image, np.ndarray)):
            return self._bytes(image)
        batch = [self._bytes(one) for one in image]
        if len({one.shape for one in batch}) != 1:
            raise ValueError("a batch needs at least one image, and all of one size after resizing and cropping")
        return np.stack(batch)

    def normalize(self, pixels: torch.Tensor | np.ndarray) -> torch.Tensor:
        """float32 (..., 3, H, W) from uint8 (..., H, W, 3), on the device of `pixels`; the last step of `__call__`."""
        pixels = torch.as_tensor(pixels)
        if pixels.dtype != torch.uint8 or pixels.ndim < 3 or pixels.shape[-1] != 3:
            raise ValueError(f"pixels must be uint8 (..., H, W, 3), not {pixels.dtype} {tuple(pixels.shape)}")
        table = self.table.to(pixels.device)
        planes = pixels.unbind(-1)  # 3 x (..., H, W)
        values = [row.index_select(0, plane.flatten().int()) for row, plane in zip(table, planes, strict=True)]
        return torch.stack([value.view(pixels.shape[:-1]) for value in values], dim=-3)  # (..., 3, H, W)

    def __call__(self, image: Image.Image | np.ndarray | Sequence[Image.Image | np.ndarray]) -> torch.Tensor:
        """float32 (3, H, W), or (B, 3, H, W) for a list. Arrays are uint8 (H, W, 3)."""
        return self.normalize(np.array(self.to_uint8(image)))


class Images:
    """The images of a data set as bytes, by position: decoded on demand, or read from a file mapped into memory."""

    def __init__(
        self, paths: Sequence[Path], processor: ImageProcessor, *, workers: int = 4, upright: bool = True
    ) -> None:
        if processor.output_size is None and not processor.pads:
            raise UserError("training needs images of one size; this processor's size depends on the image")
        self.paths, self.processor, self.workers, self.upright = list(paths), processor, workers, upright
        self.cached: np.ndarray | None = None

    def read(self, position: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        return self.processor.to_uint8(load_image(self.paths[position], upright=self.upright))

    def decoded(self, positions: np.ndarray) -> list[np.ndarray]:
        """Each image by itself, (H, W, 3) uint8."""
        if len(positions) == 1:
            return [self.read(positions[0])]
        with ThreadPoolExecutor(self.workers) as pool:  # decoding leaves Python's lock
            return list(pool.map(self.read, positions))

    def load(self, positions: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """The images, (I, H, W, 3) uint8, and a mask of their real pixels, (I, H, W) bool; None: all are real."""
        if not self.processor.pads:
            return self.batch(positions), None
        pixels, mask = pad(self.decoded(positions))
        return torch.from_numpy(pixels), torch.from_numpy(mask)

    def batch(self, positions: np.ndarray) -> Tensor:
        """The images of a batch: (I, H, W, 3) uint8."""
        return torch.from_numpy(np.stack(self.decoded(positions)) if self.cached is None else self.cached[positions])

    def digest(self) -> str:
        """A hash of the preprocessing and of every path with its size and time; it changes with the images."""
        key = hashlib.blake2b(repr(self.processor.to_hf()).encode(), digest_size=12)
        if self.upright:  # without it the name is that of earlier versions, whose files stay good
            key.update(b"upright\n")
        for stamp in stamps(self.paths):
            key.update(stamp)
        return key.hexdigest()

    def cache_in(self, folder: Path, *, progress: bool = True) -> None:
        """Write all images to a file below `folder` and map it; later runs find the finished file by its name."""
        if (size := self.processor.output_size) is None:
            raise UserError("images of many sizes are not kept as bytes in one file: give --no-image-cache")

        def blocks() -> Iterator[np.ndarray]:
            with ThreadPoolExecutor(self.workers) as pool:
                images = pool.map(self.read, range(len(self.paths)))
                yield from tqdm(images, "reading images", len(self.paths), unit="image", disable=not progress)

        shape = (len(self.paths), *size, 3)
        path = folder / f"images-{self.digest()}.npy"
        self.cached = mapped_array(path, shape, np.uint8, blocks, "--no-image-cache")
