"""From samples to batches: questions grouped by image, so that every image is encoded once for all its questions.

A batch holds images with the same number of questions each; that lets the decoder share an image's keys without a
copy. The order of an epoch is a function of (seed, epoch) alone, so a run resumes by counting steps.

Shapes: I images, R questions an image, B = I*R questions, T question tokens, A decoder tokens, H x W pixels.
"""

import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from vqa_scratch.data.image_store import Images
from vqa_scratch.data.text import Tokenizer, answer_ids
from vqa_scratch.data.vqa_v2 import VQASample

IGNORE = -100  # a label that asks for nothing, as F.cross_entropy has it
LENGTHS_OVER = 8  # batches among which rows are sorted by length
Item = TypeVar("Item")


@dataclass
class Batch:
    """What the model takes. Padding is on the right and known by `attention_mask`, never by id."""

    pixels: Tensor  # (I, H, W, 3) uint8, or what a frozen tower made of them; `Images.inputs` makes model inputs of it
    input_ids: Tensor | None  # (B, T), or a frozen text tower's states (B, T, D); None without a text tower
    attention_mask: Tensor | None  # (B, T) bool
    decoder_input_ids: Tensor  # (B, A): the prompt if there is one, BOS, the answer
    labels: Tensor  # (B, A): the next token up to EOS, IGNORE elsewhere
    image_index: Tensor  # (B,): which image a question is about
    rows: Tensor  # (B,): which samples these are

    @property
    def reading(self) -> dict[str, Tensor]:
        """What a model's `memory` and `hidden` take by these names, beside the pixels: the question for a text tower,
        if there is one, and which image it is about."""
        question = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return ({} if self.input_ids is None else question) | {"image_index": self.image_index}

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = (getattr(self, f.name) for f in fields(self))
        return type(self)(*(None if value is None else change(value) for value in values))

    def to(self, device: torch.device) -> "Batch":
        """Copied to the device; without waiting where the memory is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "Batch":
        """In page-locked memory, which a GPU reads while the program goes on."""
        return self._each(Tensor.pin_memory)

    def silent(self) -> "Batch":
        """The same inputs with nothing asked and nobody counted: its loss and its gradients are zero."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE), rows=self.rows[:0])

    def parts(self, number: int) -> Iterator["Batch"]:
        """At most `number` batches of whole images, about equal in size, that together are this one."""
        if number == 1:
            yield self
            return
        for chosen in torch.arange(len(self.pixels)).chunk(number):
            at, until = int(chosen[0]), int(chosen[-1]) + 1
            # Not at * (questions an image): two hands of one image may meet, and then it has twice as many.
            here = slice(*torch.searchsorted(self.image_index, self.image_index.new_tensor([at, until])).tolist())
            yield Batch(
                self.pixels[at:until],
                None if self.input_ids is None else self.input_ids[here],
                None if self.attention_mask is None else self.attention_mask[here],
                self.decoder_input_ids[here],
                self.labels[here],
                self.image_index[here] - at,
                self.rows[here],
            )


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


def _encode_unique(texts: Sequence[str], encode: Callable[[str], list[int]]) -> list[list[int]]:
    known: dict[str, list[int]] = {}
    return [known[text] if text in known else known.setdefault(text, encode(text)) for text in texts]


class Encoder:
    """Turns questions and answers into ids: one tokenizer for the text tower, one for the decoder.

    Without a text tower (`text` None) the question goes to the decoder alone. With `question_prompt` the decoder gets
    the question's tokens before BOS. `cut` counts questions and answers that were longer than their limit.
    """

    def __init__(
        self,
        text: Tokenizer | None,
        decoder: Tokenizer,
        *,
        max_question_tokens: int,
        max_answer_tokens: int,
        question_prompt: bool,
    ) -> None:
        self.text, self.decoder = text, decoder
        self.max_question_tokens, self.max_answer_tokens = max_question_tokens, max_answer_tokens
        self.question_prompt = question_prompt
        self.cut = {"questions": 0, "answers": 0}

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

    def prompt(self, text: str) -> list[int]:
        """Ids that the decoder reads before BOS: the question, or nothing."""
        if not self.question_prompt or not text:
            return []
        ids = self.decoder.encode(f" {text}" if self.decoder.byte_level else text, add_special_tokens=False)
        return ids[: self.max_question_tokens]

    def answer(self, text: str) -> list[int]:
        """BOS, the answer, EOS. EOS stays when the answer is cut."""
        ids = answer_ids(self.decoder, text)
        if len(ids) - 1 > self.max_answer_tokens:
            self.cut["answers"] += 1
            ids = ids[: self.max_answer_tokens] + ids[-1:]
        return ids


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


class Questions:
    """Samples with their ids, grouped by image."""

    def __init__(self, samples: Sequence[VQASample], encoder: Encoder) -> None:
        if not samples:
            raise ValueError("no samples")
        self.samples, self.encoder = list(samples), encoder
        self.states: Callable[[np.ndarray], tuple[Tensor, Tensor]] | None = None  # a frozen text tower's, if kept
        self.ids = Ragged(_encode_unique([s.question for s in samples], encoder.question))
        self.prompts = Ragged(_encode_unique([s.question for s in samples], encoder.prompt))
        self.answers = Ragged(_encode_unique([s.answer for s in samples], encoder.answer))
        positions: dict[int, int] = {}
        self.image_of = np.array([positions.setdefault(s.image_id, len(positions)) for s in samples])
        first = {}
        for sample in samples:
            first.setdefault(sample.image_id, sample.image_path)
        self.image_paths = [first[image_id] for image_id in positions]
        self.of_image: list[list[int]] = [[] for _ in positions]
        for row, image in enumerate(self.image_of):
            self.of_image[image].append(row)

    @property
    def eos_id(self) -> int:
        """The id that ends an answer."""
        return int(self.answers.flat[self.answers.lengths[0] - 1])

    def prompt_batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """What the decoder reads before it answers: ids (B, P) and mask (B, P), padded on the left, BOS last."""
        prompts, lengths = self.prompts.padded(rows, self.encoder.decoder.pad_id or 0)
        width = prompts.shape[1]
        columns = np.arange(width) - (width - lengths[:, None])  # (B, P-1), negative where padded
        ids = np.take_along_axis(prompts, np.maximum(columns, 0), 1) if width else prompts
        bos = np.full((len(rows), 1), self.answers.flat[0])
        mask = np.concatenate([columns >= 0, np.ones_like(bos, dtype=bool)], 1)
        return torch.from_numpy(np.concatenate([ids, bos], 1)), torch.from_numpy(mask)

    def _question(self, rows: np.ndarray) -> tuple[Tensor | None, Tensor | None]:
        """ids (B, T) and mask (B, T) for the text tower, or its states (B, T, D) in their place; None without one."""
        if self.encoder.text is None:
            return None, None
        if self.states is not None:
            return self.states(rows)
        ids, lengths = self.ids.padded(rows, self.encoder.text.pad_id or 0)
        return torch.from_numpy(ids), torch.from_numpy(np.arange(ids.shape[1]) < lengths[:, None])

    def batch(self, rows: np.ndarray, images: Images, *, image_map: np.ndarray | None = None) -> Batch:
        """The rows must come image by image, the same number each.

        `image_map` shows another image in place of each: that of position i is `image_map[i]`.
        """
        rows = np.asarray(rows)
        image_of = self.image_of[rows]
        first = np.flatnonzero(np.r_[True, image_of[1:] != image_of[:-1]])
        index = np.cumsum(np.r_[False, image_of[1:] != image_of[:-1]])
        ids, mask = self._question(rows)
        fill = self.encoder.decoder.pad_id or 0
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
        shown = image_of[first] if image_map is None else image_map[image_of[first]]
        return Batch(
            pixels=images.batch(shown),
            input_ids=ids,
            attention_mask=mask,
            decoder_input_ids=torch.from_numpy(decoder),
            labels=torch.from_numpy(labels),
            image_index=torch.from_numpy(index),
            rows=torch.from_numpy(rows.astype(np.int64)),
        )

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


def prefetch(items: Iterable[Item], ahead: int = 3) -> Iterator[Item]:
    """The same items, made in a thread that works up to `ahead` items in advance. Its errors surface here."""
    ready: queue.Queue = queue.Queue(ahead)
    stopped = threading.Event()

    def put(kind: str, value: object) -> bool:
        while not stopped.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # handed over to the thread that asked
            put("error", error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
