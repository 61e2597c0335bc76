"""Makes batches for a classifier: questions whose answers are chosen from a list.

Shapes: I images of H x W pixels, B questions, T question tokens, L answers in the list.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from vqa_scratch.data.answers import AnswerList, SoftTargets
from vqa_scratch.data.batches import ImageBatch, ImageGroups, Ragged
from vqa_scratch.data.images import Images
from vqa_scratch.data.tokenizers import Tokenizers, distinct
from vqa_scratch.data.vqa_v2 import VQASample


@dataclass
class ClassBatch(ImageBatch):
    """A batch for a classifier. Words are padded on the right, images on the right and below."""

    images: Tensor  # (I, H, W, 3) uint8; the processor's `normalize` makes pixel_values of them
    pixel_mask: Tensor | None  # (I, H, W) bool: where the image is; None: everywhere
    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T) bool
    targets: Tensor  # (B, L) how far each answer is right, 0 to 1
    asked: Tensor  # (B,) bool: whether the question carries a loss
    image_index: Tensor  # (B,): which image a question is about
    rows: Tensor  # (B,): which samples these are

    @property
    def counts(self) -> tuple[int, int]:
        """(samples, questions that carry a loss)."""
        return len(self.rows), int(self.asked.sum())

    def silent(self) -> Self:
        """The same inputs without asked or counted questions: loss and gradients are zero."""
        return replace(self, asked=torch.zeros_like(self.asked), rows=self.rows[:0])


class ClassQuestions(ImageGroups):
    """Samples with the ids of their questions and the scores of the answers in the list, grouped by image."""

    def __init__(self, samples: Sequence[VQASample], tokenizers: Tokenizers, answers: AnswerList) -> None:
        super().__init__(samples)
        self.tokenizers = tokenizers
        questions, which = distinct(s.question for s in samples)
        self.ids = Ragged(map(tokenizers.question, questions), which)
        self.targets = SoftTargets(samples, answers)

    def batch(self, rows: np.ndarray, images: Images, *, image_map: np.ndarray | None = None) -> ClassBatch:
        """The batch of these rows, which must come image by image; `image_map` as in `ImageGroups.images_of`."""
        rows = np.asarray(rows)
        shown, index = self.images_of(rows, image_map)
        ids, attention_mask = self.ids.padded(rows, self.tokenizers.by_name["text"].pad_id or 0)
        pixels, mask = images.load(shown)
        return ClassBatch(
            images=pixels,
            pixel_mask=mask,
            input_ids=ids,
            attention_mask=attention_mask,
            targets=torch.from_numpy(self.targets.dense(rows)),
            asked=torch.ones(len(rows), dtype=torch.bool),
            image_index=torch.from_numpy(index),
            rows=torch.from_numpy(rows.astype(np.int64)),
        )
