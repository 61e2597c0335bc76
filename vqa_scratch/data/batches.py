"""From samples to batches. The questions of an image stay together, so that it is loaded and encoded once for all of
them; a thread makes batches ahead of time.

A batch holds images with the same number of questions each: so the decoder shares an image's keys without a copy.
The order of an epoch is a function of (seed, epoch) alone, so a run resumes by counting steps.

Shapes: I images, R questions an image, B = I*R questions, T question tokens, A decoder tokens, H x W pixels.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from vqa_scratch.data.images import Images
from vqa_scratch.data.tokenizers import Tokenizers, encode_unique
from vqa_scratch.data.vqa_v2 import VQASample

IGNORE = -100  # a label that asks for nothing, as F.cross_entropy has it
LENGTHS_OVER = 8  # batches among which rows are sorted by length
Item = TypeVar("Item")


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


@dataclass
class ImageBatch:
    """A batch whose fields are tensors (or None): those in `OF_IMAGES` have a row for each image, all others one for
    each question. `image_index` says which image a question is about."""

    OF_IMAGES: ClassVar[tuple[str, ...]] = ("images", "pixel_mask")

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
        for chosen in torch.arange(len(self.images)).chunk(number):
            at, until = int(chosen[0]), int(chosen[-1]) + 1
            # Not at * (questions an image): two pieces of one image may meet, and then it has twice as many.
            here = slice(*torch.searchsorted(self.image_index, self.image_index.new_tensor([at, until])).tolist())
            part = self._each(
                lambda name, tensor, at=at, until=until, here=here: (
                    tensor[at:until] if name in self.OF_IMAGES else tensor[here]
                )
            )
            part.image_index = part.image_index - at
            yield part


@dataclass
class Batch(ImageBatch):
    """What a system takes whose decoder writes. Padding is on the right and known by `attention_mask`, never by id.

    With cached features `images` and `question` hold the states of the frozen encoders instead of their inputs.
    """

    images: Tensor  # (I, H, W, 3) uint8
    question: Tensor | None  # (B, T) ids for the text encoder; None without one
    attention_mask: Tensor | None  # (B, T) bool
    decoder_input_ids: Tensor  # (B, A): the prompt if there is one, BOS, the answer
    labels: Tensor  # (B, A): the next token up to EOS, IGNORE elsewhere
    image_index: Tensor  # (B,): which image a question is about
    rows: Tensor  # (B,): which samples these are

    @property
    def counts(self) -> tuple[int, int]:
        """(samples, labelled tokens)."""
        return len(self.rows), int((self.labels >= 0).sum())

    def silent(self) -> Self:
        """The same inputs with nothing asked and nobody counted: its loss and its gradients are zero."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE), rows=self.rows[:0])


def batches_by_image(
    groups: Iterable[Sequence[int]],
    rng: np.random.Generator,
    rows_per_step: int,
    rows_per_image: int,
    lengths: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Batches of row numbers from the rows of each image; each row occurs once.

    The rows of an image are split, in random order, into pieces of at most `rows_per_image`; a batch takes pieces of
    one size, about `rows_per_step` rows in all. With the `lengths` of all rows, pieces of about one length come
    together (within `LENGTHS_OVER` batches), which saves padding where texts are long.
    """
    pieces: dict[int, list[np.ndarray]] = defaultdict(list)
    for rows in groups:
        mixed = rng.permutation(rows)
        for at in range(0, len(mixed), rows_per_image):
            piece = mixed[at : at + rows_per_image]
            pieces[len(piece)].append(piece)
    batches = []
    for size in sorted(pieces):
        order = [pieces[size][i] for i in rng.permutation(len(pieces[size]))]
        take = max(1, rows_per_step // size)
        for window in range(0, len(order), LENGTHS_OVER * take):
            some = order[window : window + LENGTHS_OVER * take]
            if lengths is not None:
                some.sort(key=lambda piece: lengths[piece].max())
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

    def epoch(self, seed: int, epoch: int, rows_per_step: int, rows_per_image: int) -> list[np.ndarray]:
        """The row numbers of every batch of one epoch, each question once; a function of the arguments alone."""
        return batches_by_image(self.of_image, np.random.default_rng([seed, epoch]), rows_per_step, rows_per_image)

    def in_order(self, limit: int, rows_per_step: int) -> list[np.ndarray]:
        """Batches for scoring: whole images in order, up to about `limit` questions, images of one count together."""
        same_size: dict[int, list[list[int]]] = defaultdict(list)
        taken = 0
        for rows in self.of_image:
            if taken >= limit:
                break
            same_size[len(rows)].append(rows)
            taken += len(rows)
        batches = []
        for size, groups in sorted(same_size.items()):
            take = max(1, rows_per_step // size)
            batches += [np.concatenate(groups[at : at + take]) for at in range(0, len(groups), take)]
        return batches


class Questions(ImageGroups):
    """Samples with their ids, grouped by image."""

    def __init__(self, samples: Sequence[VQASample], tokenizers: Tokenizers) -> None:
        super().__init__(samples)
        self.tokenizers = tokenizers
        self.cached: Callable[[np.ndarray], tuple[Tensor, Tensor]] | None = None  # states of a frozen text encoder
        self.ids = Ragged(encode_unique([s.question for s in samples], tokenizers.question))
        self.prompts = Ragged(encode_unique([s.question for s in samples], tokenizers.prompt))
        self.answers = Ragged(encode_unique([s.answer for s in samples], tokenizers.answer))

    @property
    def eos_id(self) -> int:
        """The id that ends an answer."""
        return int(self.answers.flat[self.answers.lengths[0] - 1])

    def prompt_batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """What the decoder reads before it answers: ids (B, P) and mask (B, P), padded on the left, BOS last."""
        prompts, lengths = self.prompts.padded(rows, self.tokenizers.decoder.pad_id or 0)
        width = prompts.shape[1]
        columns = np.arange(width) - (width - lengths[:, None])  # (B, P-1), negative where padded
        ids = np.take_along_axis(prompts, np.maximum(columns, 0), 1) if width else prompts
        bos = np.full((len(rows), 1), self.answers.flat[0])
        mask = np.concatenate([columns >= 0, np.ones_like(bos, dtype=bool)], 1)
        return torch.from_numpy(np.concatenate([ids, bos], 1)), torch.from_numpy(mask)

    def _question(self, rows: np.ndarray) -> tuple[Tensor | None, Tensor | None]:
        """What a batch holds for the text encoder, and its mask (B, T)."""
        if self.tokenizers.text is None:
            return None, None
        if self.cached is not None:
            return self.cached(rows)
        ids, lengths = self.ids.padded(rows, self.tokenizers.text.pad_id or 0)
        return torch.from_numpy(ids), torch.from_numpy(np.arange(ids.shape[1]) < lengths[:, None])

    def batch(self, rows: np.ndarray, images: Images, *, image_map: np.ndarray | None = None) -> Batch:
        """The rows must come image by image, the same number each.

        `image_map` shows another image in place of each: that of position i is `image_map[i]`.
        """
        rows = np.asarray(rows)
        shown, index = self.images_of(rows, image_map)
        ids, mask = self._question(rows)
        fill = self.tokenizers.decoder.pad_id or 0
        prompts, prompt_lengths = self.prompts.padded(rows, fill)
        answers, answer_lengths = self.answers.padded(rows, fill)
        total = prompt_lengths + answer_lengths - 1  # the decoder reads all but the last token of the answer
        decoder = np.full((len(rows), total.max()), fill, dtype=np.int64)
        labels = np.full(decoder.shape, IGNORE, dtype=np.int64)
        for row in range(len(rows)):
            p, a = prompt_lengths[row], answer_lengths[row]
            decoder[row, :p] = prompts[row, :p]
            decoder[row, p : p + a - 1] = answers[row, : a - 1]
            labels[row, p : p + a - 1] = answers[row, 1:a]
        return Batch(
            images=images.batch(shown),
            question=ids,
            attention_mask=mask,
            decoder_input_ids=torch.from_numpy(decoder),
            labels=torch.from_numpy(labels),
            image_index=torch.from_numpy(index),
            rows=torch.from_numpy(rows.astype(np.int64)),
        )


def prefetch(items: Iterable[Item], ahead: int = 3) -> Iterator[Item]:
    """The same items, made in a thread that works up to `ahead` items in advance. Its errors surface here."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, iterator, end) for _ in range(ahead))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(pool.submit(next, iterator, end))
                yield item
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
