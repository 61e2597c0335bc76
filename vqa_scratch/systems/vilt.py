"""The single-stream system: a ViLT that chooses its answer from a list (`models/vilt.py`). Presets vilt and vilt-b32.

`vilt` trains a small one from random weights, on the embedded data set or on VQA v2 files; `vilt-b32` fine-tunes the
released one. Targets are soft, and every answer has a probability of its own (`data/answers.py`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqa_scratch.data.answers import AnswerList
from vqa_scratch.data.classes import ClassBatch, ClassQuestions
from vqa_scratch.data.groups import TextEncoder
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.text import Tokenizer, train_wordpiece
from vqa_scratch.data.vilt_images import ViltImageProcessor, images_for
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.models.vilt import ViLT, ViLTClassifier, ViLTConfig, answer_loss
from vqa_scratch.systems.base import System, check_positions, seed_everything
from vqa_scratch.systems.options import ViLTOptions
from vqa_scratch.systems.questions import QuestionJob, Splits, read_splits
from vqa_scratch.systems.vilt_run import build_vilt, open_trained, save_parts
from vqa_scratch.systems.vqa import VOCABULARY, grid_positions
from vqa_scratch.training.classify import classify_questions, logits_of
from vqa_scratch.training.evaluation import Answer
from vqa_scratch.training.precision import Precision

Parts = tuple[ViLTClassifier, TextEncoder, ImageProcessor]


# ------------------------------------------------------------------------------------------------ model


def small_system(config: ViLTOptions, train: list[VQASample], labels: tuple[str, ...]) -> Parts:
    """A small ViLT of random weights, with a tokenizer learned from the questions."""
    text = train_wordpiece(sorted({s.question for s in train}), VOCABULARY)
    sizes = ViLTConfig(
        vocab_size=len(text),
        max_positions=max(64, config.max_question_tokens),
        token_types=1,
        image_size=config.image_size,
        patch_size=config.patch_size,
        dim=config.width,
        layers=config.layers,
        heads=config.heads,
        hidden=4 * config.width,
        activation="relu",
        # The first word is a large constant at first; blocks that begin as small as BERT's would be lost beside it.
        init_std=config.width**-0.5,
    )
    model = ViLTClassifier(build_vilt(sizes, config.stem), labels)
    with torch.no_grad():
        model.vilt.tower.positions[0, 1:] = 0.5 * grid_positions(sizes.tower.grid, config.width)
    encoder = TextEncoder(text, max_question_tokens=config.max_question_tokens)
    return model, encoder, ImageProcessor(size=(config.image_size, config.image_size))


def released_system(config: ViLTOptions, labels: tuple[str, ...]) -> Parts:
    """A released ViLT under a new head, with its tokenizer and preprocessing."""
    vilt = ViLT.from_pretrained(config.model)
    check_positions(config, ["max_question_tokens"], vilt.config.max_positions, config.model)
    encoder = TextEncoder(Tokenizer.from_pretrained(config.model), max_question_tokens=config.max_question_tokens)
    return ViLTClassifier(vilt, labels), encoder, ViltImageProcessor.from_pretrained(config.model)


def start_at_prior(model: ViLTClassifier, share: np.ndarray) -> None:
    """Let the head begin with how often each answer is right (L,), instead of one half for each of thousands."""
    share = torch.from_numpy(share).clamp(1e-4, 1 - 1e-4)
    with torch.no_grad():
        model.out.bias.copy_(share.logit())


# ------------------------------------------------------------------------------------------------ job


class ViLTJob(QuestionJob):
    """Training on soft targets, and the classifier's accuracy."""

    loss_unit = "nats a question"

    def __init__(
        self,
        config: ViLTOptions,
        model: ViLTClassifier,
        encoder: TextEncoder,
        processor: ImageProcessor,
        splits: Splits,
        precision: Precision,
        notes: Sequence[str] = (),
    ) -> None:
        self.encoder, self.processor, self.notes = encoder, processor, notes
        answers = AnswerList(model.labels)
        questions = {name: ClassQuestions(some, encoder, answers) for name, some in splits.samples.items()}
        images = {name: images_for(q.image_paths, processor) for name, q in questions.items()}
        super().__init__(config, model, splits, questions, images, precision)
        # torch.compile wraps the forward pass alone, so that checkpoints keep the plain names.
        self.forward = torch.compile(model, dynamic=True) if config.compile else model

    def about(self) -> list[str]:
        parameters = sum(p.numel() for p in self.model.parameters())
        return [
            *self.notes,
            f"trainable: {parameters:,} parameters",
            f"cut to the token limit: {self.encoder.cut['questions']} questions",
        ]

    def batch(self, key: np.ndarray) -> ClassBatch:
        return self.questions["train"].batch(key, self.images["train"])

    def size(self, batch: ClassBatch) -> tuple[int, int]:
        return len(batch.rows), int(batch.asked.sum())

    def loss(self, batch: ClassBatch) -> tuple[Tensor, Tensor]:
        """The second figure is the sum of the targets of the answers chosen: soft accuracy, times questions."""
        logits = logits_of(self.forward, self.processor, batch)[batch.asked]
        targets = batch.targets[batch.asked]
        chosen = logits.detach().argmax(1, keepdim=True)
        return answer_loss(logits, targets), targets.gather(1, chosen).sum()

    def answers(
        self, split: str, batches: Sequence[np.ndarray], image_map: np.ndarray | None, progress: str | None
    ) -> dict[int, Answer]:
        questions, images = self.questions[split], self.images[split]
        found = classify_questions(
            self.model, questions, images, self.precision, batches, image_map=image_map, progress=progress
        )
        return {number: best for number, (best,) in found.items()}

    def save_parts(self, folder: Path) -> None:
        save_parts(folder, self.config, self.model, self.encoder, self.processor)

    def finish(self, folder: Path) -> dict[str, Any]:
        figures = super().finish(folder)
        return figures | {"classification_accuracy": figures["accuracy"], "answers": len(self.model.labels)}


def prepare(config: ViLTOptions, precision: Precision) -> ViLTJob:
    """Read the data, list the answers, build the model. Raises UserError where one of them cannot be had."""
    splits = read_splits(config)
    train = splits.samples["train"]
    answers = AnswerList.from_samples(train + splits.samples["val"], config.min_answer_count)
    splits.samples["train"] = kept = answers.answerable(train)
    seed_everything(config.seed)
    parts = released_system(config, answers.labels) if config.model else small_system(config, kept, answers.labels)
    notes = [
        f"{len(answers.labels):,} answers; {len(train) - len(kept):,} of {len(train):,} training questions left out, "
        "which have none of them"
    ]
    job = ViLTJob(config, *parts, splits, precision, notes)
    start_at_prior(job.model, job.questions["train"].targets.mean())
    return job


VILT = System("vilt", ViLTOptions, prepare, open_trained)
