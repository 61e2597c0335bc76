"""Makes batches of pairs: images, each with one of its captions.

Shapes: I images of H x W pixels and as many captions, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqa_scratch.data.batches import ImageBatch, ImageGroups, Ragged
from vqa_scratch.data.images import Images
from vqa_scratch.data.tokenizers import Tokenizers, distinct
from vqa_scratch.data.vqa_v2 import VQASample


@dataclass
class PairBatch(ImageBatch):
    """A batch of pairs; captions are padded on the right."""

    images: Tensor  # (I, H, W, 3) uint8
    input_ids: Tensor  # (I, T)
    texts: Tensor  # (I,) a number for each caption, the same for equal ones
    image_index: Tensor  # (I,): which image a caption is about
    rows: Tensor  # (I,): which samples these are; of a silent batch (0,)

    @property
    def counts(self) -> tuple[int, int]:
        """(pairs, pairs that carry a loss)."""
        return len(self.rows), len(self.rows)

    def silent(self) -> Self:
        """The same inputs, none of them a pair: loss and gradients are zero, and other ranks do not see them."""
        return replace(self, rows=self.rows[:0])


class Captions(ImageGroups):
    """Captions with their ids, grouped by image.

    They are padded on the right to `width` tokens; None: to the longest of a batch.
    """

    def __init__(self, samples: Sequence[VQASample], tokenizers: Tokenizers, width: int | None) -> None:
        super().__init__(samples)
        captions, self.texts = distinct(sample.answer for sample in samples)  # `texts`: the number of each caption
        self.pad, self.width = tokenizers.by_name["text"].pad_id or 0, width
        self.ids = Ragged(map(tokenizers.question, captions), self.texts)

    def pairs_of(self, seed: int, epoch: int, pairs_per_step: int) -> list[np.ndarray]:
        """The rows of every batch of an epoch: each image once, with one of its captions, about `pairs_per_step` a
        batch; it depends on the arguments alone."""
        rng = np.random.default_rng([seed, epoch])
        drawn = np.array([rng.choice(rows) for rows in self.of_image])
        return np.array_split(rng.permutation(drawn), max(1, round(len(drawn) / pairs_per_step)))

    def batch(self, rows: np.ndarray, images: Images, *, image_map: np.ndarray | None = None) -> PairBatch:
        """The batch of these rows, of different images; `image_map` as in `ImageGroups.images_of`."""
        rows = np.asarray(rows)
        shown, index = self.images_of(rows, image_map)
        ids, _ = self.ids.padded(rows, self.pad)
        return PairBatch(
            images=images.batch(shown),
            input_ids=ids if self.width is None else F.pad(ids, (0, self.width - ids.shape[1]), value=self.pad),
            texts=torch.from_numpy(self.texts[rows]),
            image_index=torch.from_numpy(index),
            rows=torch.from_numpy(rows.astype(np.int64)),
        )
