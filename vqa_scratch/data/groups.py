"""Questions grouped by image, so that every image is loaded and encoded once for all its questions.

The order of an epoch is a function of (seed, epoch) alone, so a run resumes by counting steps.

Shapes: I images, B questions, T question tokens.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from vqa_scratch.data.text import Tokenizer
from vqa_scratch.data.vqa_v2 import VQASample

LENGTHS_OVER = 8  # batches among which rows are sorted by length


class Ragged:
    """Many short id sequences in one flat array."""

    def __init__(self, rows: Iterable[Sequence[int]]) -> None:
        rows = list(rows)
        self.lengths = np.array([len(row) for row in rows], dtype=np.int64)
        self.starts = np.concatenate([[0], self.lengths.cumsum()[:-1]]) if rows else np.zeros(0, np.int64)
        self.flat = np.fromiter((token for row in rows for token in row), dtype=np.int32, count=self.lengths.sum())

    def padded(self, rows: np.ndarray, pad: int) -> tuple[np.ndarray, np.ndarray]:
        """ids (B, T) int64 and lengths (B,) of the chosen rows, padded on the right to the longest of them."""
        lengths = self.lengths[rows]
        columns = np.arange(lengths.max())
        inside = columns < lengths[:, None]  # (B, T)
        ids = np.full(inside.shape, pad, dtype=np.int64)
        ids[inside] = self.flat[(self.starts[rows][:, None] + columns)[inside]]
        return ids, lengths


def encode_unique(texts: Sequence[str], encode: Callable[[str], list[int]]) -> list[list[int]]:
    """`encode` of every text, called once for each different one."""
    known: dict[str, list[int]] = {}
    return [known[text] if text in known else known.setdefault(text, encode(text)) for text in texts]


class TextEncoder:
    """Turns questions into ids; `cut` counts those that were longer than the limit."""

    def __init__(self, text: Tokenizer | None, *, max_question_tokens: int) -> None:
        self.text, self.max_question_tokens = text, max_question_tokens
        self.cut = {"questions": 0}

    def question(self, text: str) -> list[int]:
        """Ids for the text tower, its special tokens around them kept when cut; none without a text tower."""
        if self.text is None:
            return []
        ids = self.text.encode(text)
        if len(ids) > self.max_question_tokens:
            self.cut["questions"] += 1
            around = self.text.backend.num_special_tokens_to_add(False)
            bare = self.text.encode(text, add_special_tokens=False)[: self.max_question_tokens - around]
            first, last = ids[: ids.index(bare[0])], ids[len(ids) - (around - ids.index(bare[0])) :]
            ids = first + bare + (last if around > len(first) else [])
        return ids

    def is_cut(self, question: str) -> bool:
        """Whether a question is longer than what is read of it."""
        return self.text is not None and len(self.text.encode(question)) > self.max_question_tokens

    def notes_on(self, question: str) -> list[str]:
        """What whoever asks should know about the way one question is read: that it is cut, or has unknown parts."""
        notes = []
        if self.is_cut(question):
            notes.append(f"the question is longer than {self.max_question_tokens} tokens; only its beginning was read")
        unknown = [] if self.text is None else list(dict.fromkeys(self.text.unknown(question)))
        if unknown:
            shown = ", ".join(part if len(part) <= 20 else f"{part[:20]}..." for part in unknown[:5])
            shown += ", ..." if len(unknown) > 5 else ""
            notes.append(f"the text tower has no tokens for {shown}, and reads one and the same token in their place")
        return notes


@dataclass
class ImageBatch:
    """A batch whose fields are tensors (or None): those in `OF_IMAGES` have a row for each image, all others one for
    each question, in the order of `image_index`, which says the image of each."""

    OF_IMAGES: ClassVar[tuple[str, ...]] = ("pixels", "pixel_mask")

    def _each(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{name: None if value is None else change(name, value) for name, value in values.items()})

    def to(self, device: torch.device) -> Self:
        """Copied to the device; without waiting where the memory is pinned."""
        return self._each(lambda name, tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Self:
        """In page-locked memory, which a GPU reads while the program goes on."""
        return self._each(lambda name, tensor: tensor.pin_memory())

    def parts(self, number: int) -> Iterator[Self]:
        """At most `number` batches of whole images, about equal in size, that together are this one."""
        if number == 1:
            yield self
            return
        for chosen in torch.arange(len(self.pixels)).chunk(number):
            at, until = int(chosen[0]), int(chosen[-1]) + 1
            # Not at * (questions an image): two hands of one image may meet, and then it has twice as many.
            here = slice(*torch.searchsorted(self.image_index, self.image_index.new_tensor([at, until])).tolist())
            part = self._each(
                lambda name, tensor, at=at, until=until, here=here: (
                    tensor[at:until] if name in self.OF_IMAGES else tensor[here]
                )
            )
            part.image_index = part.image_index - at
            yield part


def deal(
    groups: Iterable[Sequence[int]],
    rng: np.random.Generator,
    questions_per_step: int,
    questions_per_image: int,
    lengths: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Batches of row numbers from the rows of each image, each row once.

    The rows of an image are dealt into hands of at most `questions_per_image`; a batch takes hands of one size, about
    `questions_per_step` rows in all. With the `lengths` of all rows, hands of about one length come together (within
    `LENGTHS_OVER` batches), which saves padding where texts are long.
    """
    hands: dict[int, list[np.ndarray]] = defaultdict(list)
    for rows in groups:
        mixed = rng.permutation(rows)
        for at in range(0, len(mixed), questions_per_image):
            hand = mixed[at : at + questions_per_image]
            hands[len(hand)].append(hand)
    batches = []
    for size in sorted(hands):
        order = [hands[size][i] for i in rng.permutation(len(hands[size]))]
        take = max(1, questions_per_step // size)
        for window in range(0, len(order), LENGTHS_OVER * take):
            some = order[window : window + LENGTHS_OVER * take]
            if lengths is not None:
                some.sort(key=lambda hand: lengths[hand].max())
            batches += [np.concatenate(some[at : at + take]) for at in range(0, len(some), take)]
    return [batches[i] for i in rng.permutation(len(batches))]


class ImageGroups:
    """Samples grouped by image; an image is known by its position in `image_paths`."""

    def __init__(self, samples: Sequence[VQASample]) -> None:
        if not samples:
            raise ValueError("no samples")
        self.samples = list(samples)
        positions: dict[int, int] = {}
        self.image_of = np.array([positions.setdefault(s.image_id, len(positions)) for s in samples])
        first = {}
        for sample in samples:
            first.setdefault(sample.image_id, sample.image_path)
        self.image_paths = [first[image_id] for image_id in positions]
        self.of_image: list[list[int]] = [[] for _ in positions]
        for row, image in enumerate(self.image_of):
            self.of_image[image].append(row)

    def images_of(self, rows: np.ndarray, image_map: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """(the images of a batch (I,), which of them each row is about (B,)); the rows must come image by image.

        `image_map` shows another image in place of each: that of position i is `image_map[i]`.
        """
        image_of = self.image_of[rows]
        first = np.flatnonzero(np.r_[True, image_of[1:] != image_of[:-1]])
        index = np.cumsum(np.r_[False, image_of[1:] != image_of[:-1]])
        return image_of[first] if image_map is None else image_map[image_of[first]], index

    def by_image(self, rows: np.ndarray) -> list[np.ndarray]:
        """The rows of a batch, cut where one image ends and the next begins."""
        image_of = self.image_of[rows]
        return np.split(rows, np.flatnonzero(image_of[1:] != image_of[:-1]) + 1)

    def epoch(self, seed: int, epoch: int, questions_per_step: int, questions_per_image: int) -> list[np.ndarray]:
        """The row numbers of every batch of one epoch, each question once; a function of the arguments alone."""
        return deal(self.of_image, np.random.default_rng([seed, epoch]), questions_per_step, questions_per_image)

    def in_order(self, limit: int, questions_per_step: int) -> list[np.ndarray]:
        """Batches for scoring: whole images in order, up to about `limit` questions, images of one count together."""
        hands: dict[int, list[list[int]]] = defaultdict(list)
        taken = 0
        for rows in self.of_image:
            if taken >= limit:
                break
            hands[len(rows)].append(rows)
            taken += len(rows)
        batches = []
        for size, groups in sorted(hands.items()):
            take = max(1, questions_per_step // size)
            batches += [np.concatenate(groups[at : at + take]) for at in range(0, len(groups), take)]
        return batches
