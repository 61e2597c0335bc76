"""A single stream: a ViLT reads question and image as one sequence and chooses its answer from a list.

Preset `vilt` trains a small one from random weights; `vilt-b32` fine-tunes the released one. Targets are soft, and
each answer has its own probability (`data/answers.py`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqa_scratch.data.answers import Answer, AnswerList, SoftTargets
from vqa_scratch.data.classes import ClassBatch, ClassQuestions
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.text import Tokenizer, train_wordpiece
from vqa_scratch.data.tokenizers import Tokenizers
from vqa_scratch.data.vilt_images import ViltImageProcessor, read_processor
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.models.hf_config import labels_from_hf
from vqa_scratch.models.vilt import ViLT, ViLTClassifier, ViLTConfig, answer_loss
from vqa_scratch.storage import typed
from vqa_scratch.study.opened import Opened
from vqa_scratch.systems.answering import How
from vqa_scratch.systems.assembly import (
    WithoutNumbers,
    check_images,
    check_positions,
    needed,
    start_from_places,
    stem_for,
    stem_of,
)
from vqa_scratch.systems.base import RunData, seed_everything
from vqa_scratch.systems.export import export_vilt
from vqa_scratch.systems.options import ViLTOptions
from vqa_scratch.systems.questions import QuestionSystem
from vqa_scratch.systems.splits import ANY_SAMPLE, augment_of
from vqa_scratch.systems.studied import choosing_subject
from vqa_scratch.systems.vqa_models import VOCABULARY
from vqa_scratch.training.precision import Precision


class ViLTSystem(QuestionSystem[ViLTOptions, ViLTClassifier, ClassQuestions]):
    """Questions about images, answered by a classifier over a list of answers."""

    loss_unit = "nats a question"
    left_out = 0  # training questions without an answer in the list

    def __init__(self, options: ViLTOptions, model: ViLTClassifier, tokenizers: Tokenizers, *more: Any) -> None:
        super().__init__(options, model, tokenizers, *more)
        check_images(model.vilt.tower, self.processor)
        tokenizers.by_name["text"].check_fits(model.vilt.config.vocab_size, "the ViLT")

    # ------------------------------------------------------------------------------------------- build, save, open

    @classmethod
    def check(cls, options: ViLTOptions) -> None:
        if options.model and augment_of(options):
            raise UserError("a released ViLT pads its images: leave out --flip, --rotate, --brightness and --contrast")
        if not options.model:
            with WithoutNumbers():
                small_model(options, [ANY_SAMPLE], ANY_SAMPLE.answers)

    @classmethod
    def build(cls, options: ViLTOptions, data: RunData, precision: Precision) -> Self:
        train = data.samples["train"]
        answers = AnswerList.from_samples(train + data.samples["val"], options.min_answer_count)
        kept = answers.answerable(train)
        seed_everything(options.seed)
        make = released_model if options.model else small_model
        model, text, processor = make(options, kept, answers.labels)
        system = cls(options, model, _tokenizers(options, text), processor, precision)
        # The head starts from how often each answer is right; a bias of 0 would give each of thousands one half.
        share = torch.from_numpy(SoftTargets(kept, answers).mean()).clamp(1e-4, 1 - 1e-4)
        with torch.no_grad():
            model.out.bias.copy_(share.logit())
        return system

    @classmethod
    def open(cls, folder: Path, sizes: dict[str, Any], options: ViLTOptions, precision: Precision) -> Self:
        tokenizers = _tokenizers(options, Tokenizer.from_pretrained(folder / "text_tokenizer"))
        model = model_of(sizes, str(folder / "config.json"))
        return cls(options, model, tokenizers, read_processor(folder), precision, folder)

    @property
    def sizes(self) -> dict[str, Any]:
        return self.model.to_hf() | {"stem": stem_of(self.model.vilt.tower)}

    # --------------------------------------------------------------------------------------------------- training

    def grouped(self, samples: Sequence[VQASample]) -> ClassQuestions:
        return ClassQuestions(samples, self.tokenizers, AnswerList(self.model.labels))

    def train_on(self, data: RunData) -> None:
        """Leaves out training questions with no answer in the list."""
        train = data.samples["train"]
        kept = AnswerList(self.model.labels).answerable(train)
        self.left_out = len(train) - len(kept)
        data.samples["train"] = kept
        super().train_on(data)

    def about(self) -> list[str]:
        parameters, train = sum(p.numel() for p in self.model.parameters()), len(self.data.samples["train"])
        return [
            f"{len(self.model.labels):,} answers; {self.left_out:,} of {train + self.left_out:,} training questions "
            "left out, which have none of them",
            f"trainable: {parameters:,} parameters",
            f"cut to the token limit: {self.tokenizers.cut['questions']} questions",
        ]

    def logits(self, batch: ClassBatch) -> Tensor:
        """(B, L) for a batch on the model's device."""
        return self.model(
            self.processor.normalize(batch.images),
            batch.input_ids,
            batch.attention_mask,
            pixel_mask=batch.pixel_mask,
            image_index=batch.image_index,
        )

    def loss(self, batch: ClassBatch) -> tuple[Tensor, Tensor]:
        """(sum of the loss over questions, sum of the targets of the chosen answers: soft accuracy times questions)."""
        logits, targets = self.logits(batch)[batch.asked], batch.targets[batch.asked]
        chosen = logits.detach().argmax(1, keepdim=True)
        return answer_loss(logits, targets), targets.gather(1, chosen).sum()

    # ---------------------------------------------------------------------------------------------------- answers

    def respond(self, questions: ClassQuestions, rows: np.ndarray, batch: ClassBatch, how: How) -> list[list[Answer]]:
        """The probability of an answer is the sigmoid of its logit: the share of the full score to expect."""
        if how.top > len(self.model.labels):
            raise UserError(f"--top {how.top} is more than the {len(self.model.labels):,} that {self.folder} knows")
        best = self.logits(batch).float().sigmoid().topk(how.top)
        return [
            [Answer(self.model.labels[i], score) for i, score in zip(places, scores, strict=True)]
            for places, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def finish(self, folder: Path) -> dict[str, Any]:
        figures = super().finish(folder)
        return figures | {"classification_accuracy": figures["accuracy"], "answers": len(self.model.labels)}

    def subject(self, image: Image.Image, question: str | None) -> Opened:
        return choosing_subject(self, image, self.checked(question))

    def export(self, folder: Path) -> list[str]:
        return export_vilt(self, folder)


# ------------------------------------------------------------------------------------------------ models

Parts = tuple[ViLTClassifier, Tokenizer, ImageProcessor]


def model_of(sizes: dict[str, Any], source: str) -> ViLTClassifier:
    """A classifier of random weights; the inverse of `ViLTSystem.sizes`. `source` is named in errors."""
    names, stem = typed(source, sizes, {"id2label": dict, "stem": str})
    labels = labels_from_hf(sizes, len(names), source)
    config = ViLTConfig.from_hf(sizes)
    return ViLTClassifier(ViLT(config, stem_for(config, stem)), labels)


def _tokenizers(options: ViLTOptions, text: Tokenizer) -> Tokenizers:
    return Tokenizers(text, None, max_question_tokens=options.max_question_tokens)


def small_model(options: ViLTOptions, train: list[VQASample], labels: tuple[str, ...]) -> Parts:
    """A small ViLT of random weights, with a tokenizer learned from the questions."""
    text = train_wordpiece(sorted({s.question for s in train}), VOCABULARY)
    sizes = ViLTConfig(
        vocab_size=len(text),
        max_positions=max(64, options.max_question_tokens),
        token_types=1,
        image_size=options.image_size,
        patch_size=options.patch_size,
        dim=options.width,
        layers=options.layers,
        heads=options.heads,
        hidden=4 * options.width,
        activation="relu",
        # The first word starts as a large constant; blocks as small as BERT's at the start would be lost beside it.
        init_std=options.width**-0.5,
    )
    model = ViLTClassifier(ViLT(sizes, stem_for(sizes, options.stem)), labels)
    start_from_places(model.vilt.tower)
    return model, text, ImageProcessor(size=(options.image_size, options.image_size))


def released_model(options: ViLTOptions, train: list[VQASample], labels: tuple[str, ...]) -> Parts:
    """A released ViLT under a new head, with its tokenizer and preprocessing."""
    source = needed(options, "model")
    vilt = ViLT.from_pretrained(source)
    check_positions(options, ["max_question_tokens"], vilt.config.max_positions, str(source))
    text, processor = Tokenizer.from_pretrained(source), ViltImageProcessor.from_pretrained(source)
    return ViLTClassifier(vilt, labels), text, processor
