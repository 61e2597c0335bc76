"""Visual question answering: image encoder, text encoder, connector, and a decoder that writes the answer.

Preset `shapes` trains small random models on the built-in data set; `book` starts from released ones
(`systems/vqa_models.py`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqa_scratch.connectors.base import Conditioning
from vqa_scratch.data.answers import Answer
from vqa_scratch.data.batches import Batch, Questions
from vqa_scratch.data.feature_store import ImageFeatures, TextFeatures
from vqa_scratch.data.images import ImageProcessor, Images
from vqa_scratch.data.text import Tokenizer
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.models.vqa import VQAModel, labelled_loss
from vqa_scratch.nn.states import States
from vqa_scratch.rl.options import RLHFOptions
from vqa_scratch.rl.tasks import Task
from vqa_scratch.storage import read_json, write_json
from vqa_scratch.study.opened import Opened
from vqa_scratch.systems import assembly
from vqa_scratch.systems.base import seed_everything
from vqa_scratch.systems.export import export_writer
from vqa_scratch.systems.frozen import cache_features
from vqa_scratch.systems.options import VQAOptions
from vqa_scratch.systems.policy import answering_task, run_options
from vqa_scratch.systems.questions import QuestionData, QuestionSystem, needs_question
from vqa_scratch.systems.scoring import common_answers
from vqa_scratch.systems.studied import writing_subject
from vqa_scratch.systems.vqa_models import check_question, released_models, small_models, tokenizers_for
from vqa_scratch.systems.writing import Split, choose, write, writing_figures
from vqa_scratch.training.precision import Precision

CANDIDATES = "answers.json"  # of a run folder: the training answers to choose from, the most frequent first
CANDIDATES_KEPT = 1000
# Questions that are also ranked: at most so many, and so many times candidates; a pass per question and candidate.
RANKED_QUESTIONS, RANKED_PAIRS = 2_000, 120_000


class VQASystem(QuestionSystem):
    """Questions about images, answered by a decoder."""

    name = "vqa"
    writes = True
    loss_unit = "nats a token"
    model: VQAModel
    candidates: list[str]  # training answers that it can also choose from; none in runs of older versions
    kept: Sequence[ImageFeatures | TextFeatures] = ()  # cached features of frozen encoders

    # ------------------------------------------------------------------------------------------- build, save, open

    @classmethod
    def build(cls, options: VQAOptions, data: QuestionData, precision: Precision) -> Self:
        check_question(options)
        seed_everything(options.seed)
        make = small_models if options.preset == "shapes" else released_models
        image, text, connector, decoder, tokenizers, processor = make(options, data.samples["train"])
        model = VQAModel(image, text, connector, decoder)
        system = cls(options, model, tokenizers, processor, precision)
        system.candidates = common_answers(data.samples["train"], CANDIDATES_KEPT)
        return system

    @classmethod
    def open(cls, folder: Path, sizes: dict[str, Any], options: VQAOptions, precision: Precision) -> Self:
        model = assembly.assemble(sizes)
        text = None if model.text is None else Tokenizer.from_pretrained(folder / "text_tokenizer")
        tokenizers = tokenizers_for(options, text, Tokenizer.from_pretrained(folder / "decoder_tokenizer"))
        system = cls(options, model, tokenizers, ImageProcessor.from_pretrained(folder), precision, folder)
        system.candidates = read_candidates(folder / CANDIDATES) if (folder / CANDIDATES).is_file() else []
        return system

    def save(self, folder: Path) -> None:
        super().save(folder)
        if self.candidates:
            write_json(folder / CANDIDATES, self.candidates)

    @property
    def sizes(self) -> dict[str, Any]:
        return assembly.sizes_of(self.model)

    # --------------------------------------------------------------------------------------------------- training

    def split(self, samples: Sequence[VQASample]) -> Split:
        questions = Questions(samples, self.tokenizers)
        return Split(questions, Images(questions.image_paths, self.processor))

    def train_on(self, data: QuestionData) -> None:
        self.trainable = self.model.freeze(self.options.freeze)
        super().train_on(data)
        if self.options.feature_cache:
            self.kept = cache_features(self)
        if self.options.compile:  # what runs is compiled, the model keeps its plain names for checkpoints
            self.loss = torch.compile(self.loss, dynamic=True)

    def about(self) -> list[str]:
        cut = self.tokenizers.cut
        limits = f"cut to the token limits: {cut['questions']} questions, {cut['answers']} answers"
        return [self.trainable, limits]

    def precompute(self) -> None:
        for features in self.kept:
            features.ready()

    def batch(self, key: np.ndarray) -> Batch:
        train = self.splits["train"]
        return train.questions.batch(key, train.images)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of the cross-entropy over the labelled tokens, how many of them are right)."""
        image = self.encode_image(batch.images)
        text = self.encode_text(batch.question, batch.attention_mask)
        hidden = self.model.hidden(image, text, batch.decoder_input_ids, batch.image_index)
        return labelled_loss(hidden, self.model.decoder.head, batch.labels)

    def encode_image(self, images: Tensor) -> States:
        """Bytes (I, H, W, 3) -> states (I, N, ...)."""
        return self.model.image.states(self.processor.normalize(images))

    def encode_text(self, question: Tensor | None, attention_mask: Tensor | None) -> States | None:
        """Ids (B, T) -> states (B, T, ...); None without a text encoder."""
        return None if self.model.text is None else self.model.text.states(question, attention_mask)

    def condition(self, batch: Batch) -> Conditioning:
        """What the decoder is given for a batch."""
        text = self.encode_text(batch.question, batch.attention_mask)
        return self.model.connector(self.encode_image(batch.images), text, batch.image_index)

    # ---------------------------------------------------------------------------------------------------- answers

    def answers(
        self,
        split: Split,
        chosen: Sequence[np.ndarray],
        *,
        image_map: np.ndarray | None = None,
        progress: str | None = None,
        ranked: bool = False,
        top: int = 1,
        decoding: dict[str, Any] | None = None,
    ) -> dict[int, list[Answer]]:
        shown = {"image_map": image_map, "progress": progress}
        if not ranked:
            written = write(self, self.condition, split, chosen, **shown, decoding=decoding)
            return {number: [answer] for number, answer in written.items()}
        return choose(self, self.condition, split, chosen, self.candidates, **shown, top=top)

    def ask(
        self, image: Path, question: str | None, top: int | None = None, decoding: dict[str, Any] | None = None
    ) -> tuple[list[Answer], list[str]]:
        """One written answer; with `top`, so many of the training answers, the likeliest first."""
        if top is not None and decoding:
            flag = "--" + next(iter(decoding)).replace("_", "-")
            raise UserError(f"--top chooses from a list, nothing is decoded: leave out {flag}")
        if top is not None and not self.candidates:
            raise UserError(f"{self.folder} has no {CANDIDATES} to choose from, so leave out --top")
        return super().ask(image, question, top, decoding)

    def answer(self, samples: Sequence[VQASample], limit: int | None = None, **how: Any) -> dict[int, Answer]:
        if how.get("ranked"):
            if not self.candidates:
                return {}
            limit = min(limit or len(samples), self.ranked_questions)
        return super().answer(samples, limit, **how)

    @property
    def ranked_questions(self) -> int:
        """How many questions the figures of ranking are taken over."""
        return min(RANKED_QUESTIONS, max(1, RANKED_PAIRS // len(self.candidates)))

    def figures(self, answers: dict[int, Answer]) -> dict[str, float]:
        return writing_figures(answers)

    def finish(self, folder: Path) -> dict[str, Any]:
        """The figures of every system that answers questions, and how well it chooses among the training answers."""
        figures = super().finish(folder)
        ranking = self.report("test", self.ranked_questions, progress="ranking", ranked=True)
        return figures | {
            "generation_accuracy": figures["accuracy"],
            "ranking_accuracy": ranking.accuracy,
            "ranking_questions": len(ranking.answers),
            "ranking_candidates": len(self.candidates),
            "connector": self.options.connector,
        }

    def lines(self, summary: dict[str, Any]) -> list[str]:
        figures, among, over = (summary[f"ranking_{name}"] for name in ("accuracy", "candidates", "questions"))
        line = f"ranking_accuracy     {figures:.4f} (the best of {among} answers, first {over} questions)"
        return [*super().lines(summary), line]

    def subject(self, image: Image.Image, question: str | None) -> Opened:
        return writing_subject(self, image, needs_question(self, question))

    def policy(self, options: RLHFOptions, dtype: torch.dtype) -> Task:
        samples = self.read(run_options(self, options)).samples
        return answering_task(self, options, dtype, samples["train"], samples["test"])

    def export(self, folder: Path) -> list[str]:
        return export_writer(self, folder)


def read_candidates(path: Path) -> list[str]:
    """The answers of a run. Raises UserError on a file that holds no list of them."""
    answers = read_json(path)
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a for a in answers):
        raise UserError(f"{path} is not a list of answers, as train.py writes it")
    return answers
