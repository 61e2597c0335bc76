"""Resized images as bytes: decoded when asked for, or kept in one file that is mapped into memory.

Shapes: I images of H x W pixels.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vqa_scratch.data.images import ImageProcessor, load_image
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
        if self.cached is not None:
            return self.cached[positions]
        if len(positions) == 1:
            return self.read(positions[0])[None]
        with ThreadPoolExecutor(self.workers) as pool:  # decoding leaves Python's lock
            return np.stack(list(pool.map(self.read, positions)))

    def cache_in(self, folder: Path, *, progress: bool = True) -> None:
        """Write all images once to a file below `folder` and map it; a finished file is found again by its name.

        The name hashes the preprocessing and every path with its size and time, so changed images make a new file.
        """
        key = hashlib.blake2b(repr(self.processor.to_hf()).encode(), digest_size=12)
        for path in self.paths:
            stat = path.stat()
            key.update(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
        target = folder / f"images-{key.hexdigest()}.npy"
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = target.with_suffix(f".{os.getpid()}.tmp")
            height, width = self.processor.output_size
            try:
                with open(unfinished, "wb") as file:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (len(self.paths), height, width, 3)}
                    np.lib.format.write_array_header_1_0(file, header)
                    with ThreadPoolExecutor(self.workers) as pool:
                        images = pool.map(self.read, range(len(self.paths)))
                        bar = tqdm(images, "reading images", len(self.paths), unit="image", disable=not progress)
                        for image in bar:
                            file.write(image.tobytes())
                os.replace(unfinished, target)
            except OSError as error:
                raise UserError(f"cannot write {target}: {error.strerror}; --no-image-cache does without it") from error
            finally:
                unfinished.unlink(missing_ok=True)
        self.cached = np.load(target, mmap_mode="r")
