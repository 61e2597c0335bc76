"""Makes batches of images with questions, ahead of time in a thread.

The questions about an image stay together, so that it is loaded and encoded once for all of them.
`data/groups.py` chooses the rows of each batch from (seed, epoch) alone, so a run resumes by counting steps. Every
image of a batch has the same number of questions, so that the decoder can share an image's keys without a copy.

Shapes: I images, R questions an image, B = I*R questions, T question tokens, A decoder tokens, H x W pixels.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import ClassVar, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from vqa_scratch.data.groups import batches_by_image, batches_in_order
from vqa_scratch.data.images import Images
from vqa_scratch.data.tokenizers import Tokenizers, distinct
from vqa_scratch.data.vqa_v2 import VQASample

IGNORE = -100  # the label of a token without a loss, as in F.cross_entropy
Item = TypeVar("Item")


class Ragged:
    """Many short id sequences in one flat array; with `which`, row i is `rows[which[i]]`: equal ones are kept once."""

    def __init__(self, rows: Iterable[Sequence[int]], which: np.ndarray | slice = slice(None)) -> None:
        rows = list(rows)
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        self.flat = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=lengths.sum())
        self.lengths, self.starts = lengths[which], (lengths.cumsum() - lengths)[which]

    def places(self, rows: np.ndarray, *, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Where the ids of the chosen rows are in `flat`, row by row, and the mask (B, T) of a batch of them.

        The batch is as wide as the longest row; the others are padded on the right, or on the `left`.
        """
        lengths = self.lengths[rows][:, None]
        columns = np.arange(lengths.max()) - (lengths.max() - lengths if left else 0)
        inside = (columns >= 0) & (columns < lengths)
        return (self.starts[rows][:, None] + columns)[inside], inside

    def padded(self, rows: np.ndarray, pad: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
        """ids (B, T) int64 and mask (B, T) of the chosen rows, padded as in `places`."""
        places, inside = self.places(rows, left=left)
        ids = np.full(inside.shape, pad, dtype=np.int64)
        ids[inside] = self.flat[places]
        return torch.from_numpy(ids), torch.from_numpy(inside)


class TensorBatch:
    """A base of dataclasses whose fields are tensors (or None) with a row a sample; only `rows` may have fewer."""

    def _each(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        values = vars(self).items()
        return type(self)(**{name: None if value is None else change(name, value) for name, value in values})

    def to(self, device: torch.device) -> Self:
        """A copy on the device; pinned memory is copied without waiting."""
        return self._each(lambda name, tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Self:
        """A copy in page-locked memory, which a GPU reads while the program goes on."""
        return self._each(lambda name, tensor: tensor.pin_memory())

    def parts(self, number: int) -> Iterator[Self]:
        """Split the batch into at most `number` batches, about equal in size; one of images into whole images."""
        if number == 1:
            yield self
            return
        first = next(iter(vars(self).values()))
        for chosen in torch.arange(len(first)).chunk(number):
            yield self._part(int(chosen[0]), int(chosen[-1]) + 1)

    def _part(self, start: int, stop: int) -> Self:
        return self._each(lambda name, tensor: tensor[start:stop])


class ImageBatch(TensorBatch):
    """A base of those that begin with `images`. Fields in `OF_IMAGES` have a row an image, others a row a question;
    `image_index` says which image a question is about.
    """

    OF_IMAGES: ClassVar[tuple[str, ...]] = ("images", "pixel_mask")
    images: Tensor
    image_index: Tensor

    def _part(self, start: int, stop: int) -> Self:
        # Not start * (questions an image): two pieces of an image may meet in a batch; then it has twice as many.
        rows = slice(*torch.searchsorted(self.image_index, self.image_index.new_tensor([start, stop])).tolist())
        part = self._each(lambda name, tensor: tensor[slice(start, stop) if name in self.OF_IMAGES else rows])
        part.image_index = part.image_index - start
        return part


@dataclass
class Batch(ImageBatch):
    """A batch for a system whose decoder writes. Padding is on the right; `attention_mask` marks it, never an id.

    With cached features, `images` and `question` hold the states of the frozen encoders instead of their inputs.
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
        """The same inputs without labels or counted samples: loss and gradients are zero."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE), rows=self.rows[:0])


class ImageGroups(ABC):
    """Samples grouped by image; an image is known by its position in `image_paths`."""

    def __init__(self, samples: Sequence[VQASample]) -> None:
        if not samples:
            raise ValueError("no samples")
        self.samples = list(samples)
        self.upright = samples[0].upright  # the same for all samples of a source
        paths: dict[int | str, Path] = {}
        for sample in samples:
            paths.setdefault(sample.image_id, sample.image_path)
        positions = {image_id: position for position, image_id in enumerate(paths)}
        self.image_paths = list(paths.values())
        self.image_of = np.array([positions[sample.image_id] for sample in samples])  # the position of each row's image
        self.of_image: list[list[int]] = [[] for _ in positions]
        for row, image in enumerate(self.image_of.tolist()):
            self.of_image[image].append(row)

    @abstractmethod
    def batch(self, rows: np.ndarray, images: Images, *, image_map: np.ndarray | None = None) -> ImageBatch:
        """The batch of these rows, which must come image by image; `image_map` as in `images_of`."""

    def images_of(self, rows: np.ndarray, image_map: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """(the images of a batch (I,), which of them each row is about (B,)); the rows must come image by image.

        With `image_map`, image `image_map[i]` is shown in place of image i.
        """
        image_of = self.image_of[rows]
        begins = np.r_[True, image_of[1:] != image_of[:-1]]
        images = image_of[begins]
        return images if image_map is None else image_map[images], np.cumsum(begins) - 1

    def by_image(self, rows: np.ndarray) -> list[np.ndarray]:
        """The rows of a batch, cut where one image ends and the next begins."""
        image_of = self.image_of[rows]
        return np.split(rows, np.flatnonzero(image_of[1:] != image_of[:-1]) + 1)

    def epoch(self, seed: int, epoch: int, rows_per_step: int, rows_per_image: int) -> list[np.ndarray]:
        """The row numbers of every batch of one epoch, each question once; it depends on the arguments alone."""
        return batches_by_image(self.of_image, np.random.default_rng([seed, epoch]), rows_per_step, rows_per_image)

    def in_order(self, limit: int, rows_per_step: int) -> list[np.ndarray]:
        """Batches for scoring, as `batches_in_order` makes them."""
        return batches_in_order(self.of_image, limit, rows_per_step)


class Questions(ImageGroups):
    """Samples with the ids of their questions, prompts and answers, grouped by image.

    In a batch with `words` those of a prompt are labels too, each to be told from the image and the words before it.
    """

    def __init__(self, samples: Sequence[VQASample], tokenizers: Tokenizers) -> None:
        super().__init__(samples)
        self.tokenizers = tokenizers
        self.fill = tokenizers.decoder.pad_id or 0
        self.cached: Callable[[np.ndarray], tuple[Tensor, Tensor]] | None = None  # states of the frozen text encoder
        questions, asked = distinct(s.question for s in samples)
        answers, said = distinct(s.answer for s in samples)
        self.ids, start = Ragged(map(tokenizers.question, questions), asked), tokenizers.start_id
        prompts = [[*tokenizers.prompt(text), start] for text in questions]
        self.prompts, written = Ragged(prompts, asked), list(map(tokenizers.answer, answers))  # BOS first, EOS last
        pairs, which = distinct(zip(asked.tolist(), said.tolist(), strict=True))
        both = [(prompts[question], written[answer]) for question, answer in pairs]
        self.decoder_ids = Ragged((prompt + answer[1:-1] for prompt, answer in both), which)
        self.labels = Ragged((prompt[1:] + answer[1:] for prompt, answer in both), which)

    def prompt_batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """What the decoder reads before the answer: ids (B, P) and mask (B, P), padded on the left, BOS last."""
        return self.prompts.padded(rows, self.fill, left=True)

    def batch(
        self, rows: np.ndarray, images: Images, *, image_map: np.ndarray | None = None, words: bool = False
    ) -> Batch:
        """As in `ImageGroups`; of each image the same number of rows. Without `words` the answers alone have labels."""
        rows = np.asarray(rows)
        labels = self.labels.padded(rows, IGNORE)[0]
        if not words:
            in_prompt = np.arange(labels.shape[1]) < self.prompts.lengths[rows][:, None] - 1  # BOS asks for the answer
            labels[torch.from_numpy(in_prompt)] = IGNORE
        shown, index = self.images_of(rows, image_map)
        question, mask = None, None
        if self.cached is not None:
            question, mask = self.cached(rows)
        elif self.tokenizers.text is not None:
            question, mask = self.ids.padded(rows, self.tokenizers.text.pad_id or 0)
        return Batch(
            images=images.batch(shown),
            question=question,
            attention_mask=mask,
            decoder_input_ids=self.decoder_ids.padded(rows, self.fill)[0],
            labels=labels,
            image_index=torch.from_numpy(index),
            rows=torch.from_numpy(rows.astype(np.int64)),
        )


def prefetch(items: Iterable[Item], ahead: int = 3) -> Generator[Item, None, None]:
    """The same items, made in a thread up to `ahead` items in advance. Its errors are raised here."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(list, islice(iterator, 1)) for _ in range(ahead))
        try:
            while found := waiting.popleft().result():
                waiting.append(pool.submit(list, islice(iterator, 1)))
                yield from found
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
