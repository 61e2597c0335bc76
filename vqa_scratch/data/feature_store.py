"""Caches the states of a frozen encoder: they are computed once, written to a file, and mapped into memory.

The name of a file is a hash of everything that its content depends on: the encoder's weights, the number format, and
the inputs with their preprocessing. So changed weights or images make a new file, and nothing stale is ever read.

Shapes: I images, B questions, U different questions, N tokens an image, T tokens a question, D width of the encoder.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor, nn
from tqdm import tqdm

from vqa_scratch.data.batches import Questions, Ragged
from vqa_scratch.data.images import Images
from vqa_scratch.data.mapped import mapped_array
from vqa_scratch.data.tokenizers import distinct

IMAGES_AT_ONCE, QUESTIONS_AT_ONCE = 32, 256
WITHOUT = "--no-feature-cache"
# The number format in the file: NumPy has no bf16, so its bits are kept as integers.
ON_DISK: dict[torch.dtype, DTypeLike] = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.int16}


def weights_digest(encoder: nn.Module) -> str:
    """A hash of every parameter and buffer of a model, with their names."""
    key = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(encoder.state_dict().items()):
        key.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}\n".encode())
        key.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return key.hexdigest()


class Features(ABC):
    """The states (rows, D) of a frozen encoder for all inputs, in a file that is made on first use."""

    kind: ClassVar[str]  # in the name of the file
    unit: ClassVar[str]  # an input, in the progress bar

    def __init__(
        self, encoder: nn.Module, folder: Path, dtype: torch.dtype, shape: tuple[int, int], inputs: int, at_once: int
    ) -> None:
        self.encoder, self.folder, self.dtype, self.shape = encoder, folder, dtype, shape
        self.inputs, self.at_once = inputs, at_once  # how many there are, and go through the encoder together
        self._array: np.ndarray | None = None
        self._lock = Lock()  # batches are made in threads

    @abstractmethod
    def digest(self) -> str:
        """A hash of the encoder's weights and all inputs."""

    @abstractmethod
    def states(self, positions: np.ndarray) -> Tensor:
        """Run the encoder on these inputs: (n, D)."""

    def ready(self) -> np.ndarray:
        """What the file holds; it is made if there is none."""
        with self._lock:
            if self._array is None:
                key = hashlib.blake2b(f"{self.digest()}|{self.shape}|{self.dtype}".encode(), digest_size=12).hexdigest()
                path = self.folder / f"features-{self.kind}-{key}.npy"
                self._array = mapped_array(path, self.shape, ON_DISK[self.dtype], self._blocks, WITHOUT)
            return self._array

    def _blocks(self) -> Iterator[np.ndarray]:
        with tqdm(desc=f"{self.unit} features", total=self.inputs, unit=self.unit) as bar:
            for start in range(0, self.inputs, self.at_once):
                positions = np.arange(start, min(start + self.at_once, self.inputs))
                states = self.states(positions).to(self.dtype).cpu()
                yield (states.view(torch.int16) if self.dtype == torch.bfloat16 else states).numpy()
                bar.update(len(positions))

    def read(self, rows: np.ndarray) -> Tensor:
        """(..., D) for row numbers of any shape."""
        states = torch.from_numpy(self.ready()[rows])
        return states.view(torch.bfloat16) if self.dtype == torch.bfloat16 else states


class ImageFeatures(Features):
    """Replaces `Images` in batches: holds the states of the image encoder instead of the pixels.

    encode -- bytes (I, H, W, 3) on the CPU -> states (I, N, D) to keep; `sizes` are N and D
    """

    kind = unit = "image"

    def __init__(
        self,
        images: Images,
        encoder: nn.Module,
        encode: Callable[[Tensor], Tensor],
        folder: Path,
        sizes: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        self.images, self.encode, self.paths = images, encode, images.paths
        self.tokens, width = sizes
        count = len(self.paths)
        super().__init__(encoder, folder, dtype, (count * self.tokens, width), count, IMAGES_AT_ONCE)

    def digest(self) -> str:
        return f"{weights_digest(self.encoder)}|{self.images.digest()}"

    def states(self, positions: np.ndarray) -> Tensor:
        return self.encode(self.images.batch(positions)).flatten(0, 1)

    def batch(self, positions: np.ndarray) -> Tensor:
        """The states (I, N, D) of these images."""
        return self.read(np.asarray(positions)[:, None] * self.tokens + np.arange(self.tokens))


class TextFeatures(Features):
    """The states of the text encoder for each different question, without padding.

    encode -- ids (B, T) and mask (B, T) on the CPU -> states (B, T, D)
    """

    kind, unit = "text", "question"

    def __init__(
        self,
        questions: Questions,
        encoder: nn.Module,
        encode: Callable[[Tensor, Tensor], Tensor],
        folder: Path,
        width: int,
        dtype: torch.dtype,
    ) -> None:
        spans, which = distinct(zip(questions.ids.starts.tolist(), questions.ids.lengths.tolist(), strict=True))
        own = [tuple(questions.ids.flat[start : start + length].tolist()) for start, length in spans]
        self.unique = sorted(set(own), key=lambda ids: (len(ids), ids))  # sorted by length: little padding
        place = {ids: number for number, ids in enumerate(self.unique)}
        self.which = np.array([place[ids] for ids in own])[which]  # (questions,): the number of each in `unique`
        self.encode, self.ids = encode, Ragged(self.unique)
        super().__init__(encoder, folder, dtype, (len(self.ids.flat), width), len(self.unique), QUESTIONS_AT_ONCE)

    def digest(self) -> str:
        key = hashlib.blake2b(weights_digest(self.encoder).encode(), digest_size=12)
        for ids in self.unique:
            key.update(f"{ids}\n".encode())
        return key.hexdigest()

    def states(self, positions: np.ndarray) -> Tensor:
        ids, mask = self.ids.padded(positions, 0)
        return self.encode(ids, mask)[mask]

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """States (B, T, D), zeros where padded, and mask (B, T) of these questions."""
        places, inside = self.ids.places(self.which[rows])
        found, mask = self.read(places), torch.from_numpy(inside)
        states = found.new_zeros(*mask.shape, found.shape[-1])
        states[mask] = found
        return states, mask
