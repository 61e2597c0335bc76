"""From samples to batches for a system whose decoder writes the answer; and a thread that makes them beforehand.

A batch holds images with the same number of questions each (`data/groups.py`); that lets the decoder share an image's
keys without a copy.

Shapes: I images, R questions an image, B = I*R questions, T question tokens, A decoder tokens, H x W pixels.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from vqa_scratch.data.groups import ImageBatch, ImageGroups, Ragged, TextEncoder, encode_unique
from vqa_scratch.data.image_store import Images
from vqa_scratch.data.text import Tokenizer, answer_ids
from vqa_scratch.data.vqa_v2 import VQASample

IGNORE = -100  # a label that asks for nothing, as F.cross_entropy has it
Item = TypeVar("Item")


@dataclass
class Batch(ImageBatch):
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

    def silent(self) -> "Batch":
        """The same inputs with nothing asked and nobody counted: its loss and its gradients are zero."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE), rows=self.rows[:0])


class Encoder(TextEncoder):
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
        super().__init__(text, max_question_tokens=max_question_tokens)
        self.decoder, self.max_answer_tokens = decoder, max_answer_tokens
        self.question_prompt = question_prompt
        self.cut["answers"] = 0

    def _whole_prompt(self, text: str) -> list[int]:
        if not self.question_prompt or not text:
            return []
        return self.decoder.encode(f" {text}" if self.decoder.byte_level else text, add_special_tokens=False)

    def prompt(self, text: str) -> list[int]:
        """Ids that the decoder reads before BOS: the question, or nothing."""
        return self._whole_prompt(text)[: self.max_question_tokens]

    def is_cut(self, question: str) -> bool:
        return super().is_cut(question) or len(self._whole_prompt(question)) > self.max_question_tokens

    def answer(self, text: str) -> list[int]:
        """BOS, the answer, EOS. EOS stays when the answer is cut."""
        ids = answer_ids(self.decoder, text)
        if len(ids) - 1 > self.max_answer_tokens:
            self.cut["answers"] += 1
            ids = ids[: self.max_answer_tokens] + ids[-1:]
        return ids


class Questions(ImageGroups):
    """Samples with their ids, grouped by image."""

    def __init__(self, samples: Sequence[VQASample], encoder: Encoder) -> None:
        super().__init__(samples)
        self.encoder = encoder
        self.states: Callable[[np.ndarray], tuple[Tensor, Tensor]] | None = None  # a frozen text tower's, if kept
        self.ids = Ragged(encode_unique([s.question for s in samples], encoder.question))
        self.prompts = Ragged(encode_unique([s.question for s in samples], encoder.prompt))
        self.answers = Ragged(encode_unique([s.answer for s in samples], encoder.answer))

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
        shown, index = self.images_of(rows, image_map)
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
        return Batch(
            pixels=images.batch(shown),
            input_ids=ids,
            attention_mask=mask,
            decoder_input_ids=torch.from_numpy(decoder),
            labels=torch.from_numpy(labels),
            image_index=torch.from_numpy(index),
            rows=torch.from_numpy(rows.astype(np.int64)),
        )


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
