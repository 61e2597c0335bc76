"""Systems whose model is an encoder, a connector and a decoder: what they train on, their loss, how they write."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image
from torch import Tensor

from vqa_scratch.data.answers import Answer, Answers
from vqa_scratch.data.batches import Batch, Questions
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.text import Tokenizer
from vqa_scratch.data.tokenizers import Tokenizers
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.models.vqa import VQAModel, labelled_loss
from vqa_scratch.nn.connecting import Conditioning
from vqa_scratch.nn.states import States
from vqa_scratch.study.opened import Opened
from vqa_scratch.systems import assembly
from vqa_scratch.systems.answering import AnsweringSystem, How
from vqa_scratch.systems.experts import ExpertTraining, expert_training
from vqa_scratch.systems.export import export_writer
from vqa_scratch.systems.splits import IO, Key
from vqa_scratch.systems.studied import writing_subject
from vqa_scratch.systems.writing import write, writing_figures
from vqa_scratch.training.optimizers import Optimizers
from vqa_scratch.training.precision import Precision


class WritingSystem(AnsweringSystem[IO, VQAModel, Questions]):
    """A system that writes token by token what it says about an image."""

    writes = True
    question_loss = 0  # for how many steps it learns to tell a question's words too
    experts: ExpertTraining | None = None  # while those of its decoder train

    def __init__(self, options: IO, model: VQAModel, tokenizers: Tokenizers, *more: Any) -> None:
        super().__init__(options, model, tokenizers, *more)
        assembly.check_parts(model, tokenizers, self.processor)

    @classmethod
    def open(cls, folder: Path, sizes: dict[str, Any], options: IO, precision: Precision) -> Self:
        model = assembly.assemble(sizes)
        text = None if model.text is None else Tokenizer.from_pretrained(folder / "text_tokenizer")
        decoder = Tokenizer.from_pretrained(folder / "decoder_tokenizer")
        tokenizers = assembly.tokenizers_for(options, text, decoder)
        return cls(options, model, tokenizers, ImageProcessor.from_pretrained(folder), precision, folder)

    @property
    def sizes(self) -> dict[str, Any]:
        return assembly.sizes_of(self.model)

    def grouped(self, samples: Sequence[VQASample]) -> Questions:
        return Questions(samples, self.tokenizers)

    def batch(self, key: Key) -> Batch:
        train = self.splits["train"]
        batch = train.questions.batch(key.rows, train.images, words=key.step < self.question_loss)
        return self.augmented(self.augment, batch, key) if self.augment else batch

    def trained_by(self, optimizers: Optimizers) -> None:
        self.experts = expert_training(self, optimizers)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of the cross-entropy over the labelled tokens, how many of them are right)."""
        image = self.encode_image(batch.images)
        text = self.encode_text(batch.question, batch.attention_mask)
        if self.experts is not None and self.model.training:
            return self.experts.loss(image, text, batch)
        hidden = self.model.hidden(image, text, batch.decoder_input_ids, batch.image_index)
        return labelled_loss(hidden, self.model.decoder.head, batch.labels)

    def encode_image(self, images: Tensor) -> States:
        """Bytes (I, H, W, 3) -> states (I, N, ...)."""
        return self.model.image.states(self.processor.normalize(images))

    def encode_text(self, question: Tensor | None, attention_mask: Tensor | None) -> States | None:
        """Ids (B, T) -> states (B, T, ...); None without a text encoder."""
        if self.model.text is None:
            return None
        assert question is not None, "a text encoder reads the question"
        return self.model.text.states(question, attention_mask)

    def condition(self, batch: Batch) -> Conditioning:
        """What the connector gives the decoder for a batch."""
        text = self.encode_text(batch.question, batch.attention_mask)
        return self.model.connector(self.encode_image(batch.images), text, batch.image_index)

    def respond(self, questions: Questions, rows: np.ndarray, batch: Batch, how: How) -> list[list[Answer]]:
        """One answer each, written."""
        return write(self, questions, rows, self.condition(batch), how.decoding)

    def figures(self, answers: Answers) -> dict[str, float]:
        return writing_figures(answers)

    def subject(self, image: Image.Image, question: str | None) -> Opened:
        return writing_subject(self, image, self.checked(question))

    def export(self, folder: Path) -> list[str]:
        return export_writer(self, folder)
