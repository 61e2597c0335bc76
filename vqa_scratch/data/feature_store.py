"""Caches the states of a frozen encoder: they are computed once, written to a file, and mapped into memory.

The name of a file is a hash of everything that its content depends on: the encoder's weights, the number format, and
the inputs with their preprocessing. So changed weights or images make a new file, and nothing stale is ever read.

Shapes: I images, B questions, U different questions, N tokens an image, T tokens a question, D width of the encoder.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from vqa_scratch.data.batches import Questions
from vqa_scratch.data.images import Images
from vqa_scratch.data.mapped import mapped_array

IMAGES_AT_ONCE, QUESTIONS_AT_ONCE = 32, 256
WITHOUT = "--no-feature-cache"
# The number format in the file: NumPy has no bf16, so its bits are kept as integers.
ON_DISK = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.int16}


def weights_digest(encoder: nn.Module) -> str:
    """A hash of every parameter and buffer of a model, with their names."""
    key = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(encoder.state_dict().items()):
        key.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}\n".encode())
        key.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return key.hexdigest()


class Table:
    """Rows (n, D) in a file, computed on first use."""

    def __init__(self, folder: Path, kind: str, rows: int, width: int, dtype: torch.dtype) -> None:
        self.folder, self.kind, self.shape, self.dtype = folder, kind, (rows, width), dtype
        self._array: np.ndarray | None = None
        self._lock = Lock()  # batches are made in threads

    def ready(self, name: Callable[[], str], states: Callable[[], Iterator[Tensor]]) -> None:
        """Map the file; `name()` hashes what its content depends on, `states()` computes it, (n, D) at a time."""
        with self._lock:
            if self._array is None:
                key = hashlib.blake2b(f"{name()}|{self.shape}|{self.dtype}".encode(), digest_size=12).hexdigest()
                path = self.folder / f"features-{self.kind}-{key}.npy"
                self._array = mapped_array(
                    path, self.shape, ON_DISK[self.dtype], lambda: map(self._bits, states()), WITHOUT
                )

    def _bits(self, states: Tensor) -> np.ndarray:
        states = states.to(self.dtype).cpu()
        return (states.view(torch.int16) if self.dtype == torch.bfloat16 else states).numpy()

    def read(self, rows: np.ndarray) -> Tensor:
        """(..., D) for row numbers of any shape."""
        states = torch.from_numpy(self._array[rows])
        return states.view(torch.bfloat16) if self.dtype == torch.bfloat16 else states


class ImageFeatures:
    """Replaces `Images` in batches: holds the states of the image encoder instead of the pixels.

    encode -- bytes (I, H, W, 3) on the CPU -> states (I, N, D) to keep
    """

    def __init__(
        self,
        images: Images,
        encoder: nn.Module,
        encode: Callable[[Tensor], Tensor],
        folder: Path,
        sizes: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        self.images, self.encoder, self.encode = images, encoder, encode
        self.paths, self.processor = images.paths, images.processor
        self.tokens, width = sizes
        self.table = Table(folder, "image", len(images.paths) * self.tokens, width, dtype)

    def _states(self) -> Iterator[Tensor]:
        count = len(self.paths)
        with tqdm(desc="image features", total=count, unit="image") as bar:
            for start in range(0, count, IMAGES_AT_ONCE):
                positions = range(start, min(start + IMAGES_AT_ONCE, count))
                yield self.encode(self.images.batch(positions)).flatten(0, 1)  # (I * N, D)
                bar.update(len(positions))

    def ready(self) -> None:
        """Find the file, or make it."""
        self.table.ready(lambda: f"{weights_digest(self.encoder)}|{self.images.digest()}", self._states)

    def batch(self, positions: Sequence[int]) -> Tensor:
        """The states (I, N, D) of these images."""
        self.ready()
        first = np.asarray(positions)[:, None] * self.tokens
        return self.table.read(first + np.arange(self.tokens))


class TextFeatures:
    """The states of the text encoder for each different question, without padding.

    encode -- ids (B, T) and mask (B, T) on the CPU -> states (B, T, D)
    """

    def __init__(
        self,
        questions: Questions,
        encoder: nn.Module,
        encode: Callable[[Tensor, Tensor], Tensor],
        folder: Path,
        width: int,
        dtype: torch.dtype,
    ) -> None:
        self.encoder, self.encode = encoder, encode
        own = [tuple(part.tolist()) for part in np.split(questions.ids.flat, questions.ids.starts[1:])]
        self.unique = sorted(set(own), key=lambda ids: (len(ids), ids))  # sorted by length: little padding
        place = {ids: number for number, ids in enumerate(self.unique)}
        self.which = np.array([place[ids] for ids in own])  # (questions,): the number of each in `unique`
        self.lengths = np.array([len(ids) for ids in self.unique])
        self.starts = self.lengths.cumsum() - self.lengths
        self.table = Table(folder, "text", int(self.lengths.sum()), width, dtype)

    def _digest(self) -> str:
        key = hashlib.blake2b(weights_digest(self.encoder).encode(), digest_size=12)
        for ids in self.unique:
            key.update(f"{ids}\n".encode())
        return key.hexdigest()

    def _states(self) -> Iterator[Tensor]:
        count = len(self.unique)
        with tqdm(desc="question features", total=count, unit="question") as bar:
            for start in range(0, count, QUESTIONS_AT_ONCE):
                some = self.unique[start : start + QUESTIONS_AT_ONCE]
                lengths = torch.tensor([len(ids) for ids in some])
                mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, T)
                ids = torch.zeros(mask.shape, dtype=torch.long)
                ids[mask] = torch.tensor([token for row in some for token in row])
                yield self.encode(ids, mask)[mask]  # (tokens, D)
                bar.update(len(some))

    def ready(self) -> None:
        """Find the file, or make it."""
        self.table.ready(self._digest, self._states)

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """States (B, T, D), zeros where padded, and mask (B, T) of these questions."""
        self.ready()
        which = self.which[rows]
        lengths = self.lengths[which]
        columns = np.arange(lengths.max())
        inside = columns < lengths[:, None]  # (B, T)
        found = self.table.read((self.starts[which][:, None] + columns)[inside])
        states = found.new_zeros(*inside.shape, found.shape[-1])
        states[torch.from_numpy(inside)] = found
        return states, torch.from_numpy(inside)
