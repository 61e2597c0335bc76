"""Resized images as bytes: decoded when asked for, or kept in one file that is mapped into memory.

Shapes: I images of H x W pixels.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vqa_scratch.data.images import ImageProcessor, load_image
from vqa_scratch.data.mapped import mapped_array
from vqa_scratch.errors import UserError


class Images:
    """Resized images as bytes, by position: decoded when asked for, or read from a file mapped into memory."""

    def __init__(self, paths: Sequence[Path], processor: ImageProcessor, *, workers: int = 4) -> None:
        if processor.output_size is None:
            raise UserError("training needs images of one size; this processor's size depends on the image")
        self.paths, self.processor, self.workers = list(paths), processor, workers
        self.cached: np.ndarray | None = None

    def read(self, position: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        return self.processor.to_uint8(load_image(self.paths[position]))

    def __getitem__(self, positions: Sequence[int]) -> np.ndarray:
        """(I, H, W, 3) uint8."""
        return np.stack(self.decoded(positions)) if self.cached is None else self.cached[positions]

    def decoded(self, positions: Sequence[int]) -> list[np.ndarray]:
        """Each image by itself, (H, W, 3) uint8."""
        if len(positions) == 1:
            return [self.read(positions[0])]
        with ThreadPoolExecutor(self.workers) as pool:  # decoding leaves Python's lock
            return list(pool.map(self.read, positions))

    def load(self, positions: Sequence[int]) -> tuple[np.ndarray, np.ndarray | None]:
        """The images, (I, H, W, 3) uint8, and where in them there is one, (I, H, W) bool; None: everywhere."""
        return self[positions], None

    def batch(self, positions: Sequence[int]) -> Tensor:
        """What a batch holds of these images: (I, H, W, 3) uint8."""
        return torch.from_numpy(np.require(self[positions], requirements="W"))

    def inputs(self, batch: Tensor) -> Tensor:
        """What the model takes, from what `batch` holds, on its device: pixel values (I, 3, H, W)."""
        return self.processor.normalize(batch)

    def digest(self) -> str:
        """A hash of the preprocessing and of every path with its size and time: changed images have another."""
        key = hashlib.blake2b(repr(self.processor.to_hf()).encode(), digest_size=12)
        for path in self.paths:
            stat = path.stat()
            key.update(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
        return key.hexdigest()

    def cache_in(self, folder: Path, *, progress: bool = True) -> None:
        """Write all images once to a file below `folder` and map it; a finished file is found again by its name."""

        def blocks() -> Iterator[np.ndarray]:
            with ThreadPoolExecutor(self.workers) as pool:
                images = pool.map(self.read, range(len(self.paths)))
                yield from tqdm(images, "reading images", len(self.paths), unit="image", disable=not progress)

        shape = (len(self.paths), *self.processor.output_size, 3)
        path = folder / f"images-{self.digest()}.npy"
        self.cached = mapped_array(path, shape, np.uint8, blocks, "--no-image-cache")
