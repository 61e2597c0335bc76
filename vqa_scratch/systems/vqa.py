"""The first system: three towers, of which the decoder writes the answer (`models/vqa.py`). Presets shapes and book.

`shapes` trains small random towers on the embedded data set; `book` starts from released ones.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqa_scratch.config import TrainConfig
from vqa_scratch.data.batches import Batch, Encoder, Images, Questions
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.text import Tokenizer, check_question, train_bpe, train_wordpiece
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.engine.evaluation import Answer, answer_questions, answer_samples
from vqa_scratch.engine.precision import Precision
from vqa_scratch.errors import UserError
from vqa_scratch.models.bert import Bert, BertConfig
from vqa_scratch.models.gpt2 import GPT2, GPT2Config
from vqa_scratch.models.reader import labelled_loss
from vqa_scratch.models.stem import ConvStem
from vqa_scratch.models.vit import ViT, ViTConfig
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.run import Run, encoder_for, open_run, save_parts
from vqa_scratch.systems.base import System, seed_everything
from vqa_scratch.systems.questions import QuestionJob, Splits, read_splits
from vqa_scratch.systems.vqa_export import export_run

IMAGE_SIZE = 64  # pixels a side, of the embedded towers
VOCABULARY = 512  # tokens at most, of the embedded tokenizers
DISTILBERT = BertConfig(layout="distilbert", layers=6, token_types=0)  # distilbert-base-uncased


def grid_positions(grid: int, dim: int) -> Tensor:
    """(grid*grid, D) sines and cosines of column and row, a quarter of the channels each.

    A position table that starts this way knows left from right before training (as in MAE, He et al. 2022, which keeps
    it fixed; ours goes on learning). Wavelengths run from 2 patches to 4 grids: with the usual 10,000 most channels
    would be constant over so small a grid, and the longest one here falls steadily from one side to the other.
    """
    wavelengths = torch.logspace(math.log2(2), math.log2(4 * grid), dim // 4, base=2.0)
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [axis.flatten()[:, None] * (2 * math.pi / wavelengths) for axis in (columns, rows)]  # (grid*grid, D/4)
    return torch.cat([wave for a in angles for wave in (a.sin(), a.cos())], 1)


def _own_tokenizers(train: list[VQASample], prefix: str) -> tuple[Tokenizer, Tokenizer]:
    """WordPiece for the text tower and byte-level BPE for the decoder, learned from the training questions."""
    questions = sorted({s.question for s in train})
    answers = sorted({a for s in train for a in (*s.answers, s.answer)})
    spaced = [prefix + text for text in questions + answers]
    return train_wordpiece(questions, VOCABULARY), train_bpe(spaced, VOCABULARY)


def embedded_system(config: TrainConfig, train: list[VQASample]) -> tuple[VQAModel, Encoder, ImageProcessor]:
    """Small random towers of the real classes, with tokenizers learned from the questions."""
    text, decoder = _own_tokenizers(train, " ")
    hidden, none = 4 * config.width, {"dropout": 0.0, "attention_dropout": 0.0}
    image_config = ViTConfig(
        image_size=IMAGE_SIZE,
        patch_size=config.patch_size,
        dim=config.width,
        layers=config.image_layers,
        heads=config.heads,
        hidden=hidden,
        activation="relu",
    )
    text_config = BertConfig(
        layout="distilbert",
        vocab_size=len(text),
        dim=config.width,
        layers=config.text_layers,
        heads=config.heads,
        hidden=hidden,
        max_positions=max(64, config.max_question_tokens),
        token_types=0,
        activation="relu",
        pad_id=text.pad_id,
        **none,
    )
    decoder_config = GPT2Config(
        vocab_size=len(decoder),
        max_positions=max(64, config.max_question_tokens + config.max_answer_tokens + 1),
        dim=config.width,
        layers=config.decoder_layers,
        heads=config.heads,
        activation="relu",
        embedding_dropout=0.0,
        add_cross_attention=True,
        bos_id=decoder.bos_id,
        eos_id=decoder.eos_id,
        pad_id=decoder.pad_id,
        **none,
    )
    stem = ConvStem(3, config.width, config.patch_size) if config.stem == "conv" else None
    image = ViT(image_config, patch_embed=stem)
    model = VQAModel(image, Bert(text_config), GPT2(decoder_config), config.fusion)
    tables = [image.positions] + ([model.places] if config.fusion == "tokens" else [])
    with torch.no_grad():
        for table in tables:
            table[0, 1:] = 0.5 * grid_positions(image_config.grid, config.width)
    return model, encoder_for(config, text, decoder), ImageProcessor(size=(IMAGE_SIZE, IMAGE_SIZE))


def released_system(config: TrainConfig, train: list[VQASample]) -> tuple[VQAModel, Encoder, ImageProcessor]:
    """Towers, tokenizers and preprocessing from checkpoints; or, with `--init random`, random towers of book size."""
    if config.init == "random":
        text, decoder = _own_tokenizers(train, " ")
        towers = (ViT(ViTConfig()), Bert(DISTILBERT), GPT2(replace(GPT2Config(), add_cross_attention=True)))
        processor = ImageProcessor()
    else:
        text = Tokenizer.from_pretrained(config.text_model)
        decoder = Tokenizer.from_pretrained(config.decoder_model)
        towers = (
            ViT.from_pretrained(config.image_model),
            Bert.from_pretrained(config.text_model),
            GPT2.from_pretrained(config.decoder_model, add_cross_attention=True),
        )
        processor = ImageProcessor.from_pretrained(config.image_model)
    return VQAModel(*towers, config.fusion), encoder_for(config, text, decoder), processor


def build_system(config: TrainConfig, train: list[VQASample]) -> tuple[VQAModel, Encoder, ImageProcessor]:
    """Model, tokenizers and preprocessing that the config asks for."""
    seed_everything(config.seed)
    return (embedded_system if config.preset == "shapes" else released_system)(config, train)


class VQATask(QuestionJob):
    """What the loop trains: questions with their images, and how to score the model on held-out ones."""

    loss_unit = "nats a token"

    def __init__(
        self,
        config: TrainConfig,
        model: VQAModel,
        encoder: Encoder,
        processor: ImageProcessor,
        splits: Splits,
        precision: Precision,
    ) -> None:
        self.encoder, self.processor, self.trainable = encoder, processor, model.freeze(config.freeze)
        questions = {name: Questions(samples, encoder) for name, samples in splits.samples.items()}
        images = {name: Images(q.image_paths, processor) for name, q in questions.items()}
        super().__init__(config, model, splits, questions, images, precision)
        # torch.compile wraps the forward pass alone, so that checkpoints keep the plain names.
        self.hidden = torch.compile(model.hidden, dynamic=True) if config.compile else model.hidden

    def about(self) -> list[str]:
        cut = self.encoder.cut
        return [
            self.trainable,
            f"cut to the token limits: {cut['questions']} questions, {cut['answers']} answers",
        ]

    def batch(self, key: np.ndarray) -> Batch:
        return self.questions["train"].batch(key, self.images["train"])

    def size(self, batch: Batch) -> tuple[int, int]:
        return len(batch.rows), int((batch.labels >= 0).sum())

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(
            self.processor.normalize(batch.pixels),
            batch.input_ids,
            batch.attention_mask,
            batch.decoder_input_ids,
            image_index=batch.image_index,
        )
        return labelled_loss(hidden, self.model.decoder.tokens.weight, batch.labels)

    def answers(
        self, split: str, batches: Sequence[np.ndarray], image_map: np.ndarray | None, progress: str | None
    ) -> dict[int, Answer]:
        questions, images = self.questions[split], self.images[split]
        return answer_questions(
            self.model, questions, images, self.precision, batches, image_map=image_map, progress=progress
        )

    def save_parts(self, folder: Path) -> None:
        save_parts(folder, self.config, self.model, self.encoder, self.processor)

    def finish(self, folder: Path) -> dict[str, Any]:
        return super().finish(folder) | {"fusion": self.config.fusion}


def prepare(config: TrainConfig, precision: Precision) -> VQATask:
    """Read the data and build the model. Raises UserError where either cannot be had."""
    splits = read_splits(config)
    return VQATask(config, *build_system(config, splits.samples["train"]), splits, precision)


class TrainedVQA(Run):
    """A finished run, for the commands."""

    def ask(self, image: Path, question: str | None, top: int | None) -> tuple[list[Answer], list[str]]:
        if question is None:
            raise UserError(f"{self.folder} answers questions: give it --question")
        if top is not None:
            raise UserError(f"{self.folder} writes one answer and ranks no list of them: leave out --top")
        cut_before, limit = self.encoder.cut["questions"], self.encoder.max_question_tokens
        sample = VQASample(0, image, 0, check_question(question), "", "", (), "")
        said = self.answer([sample], None)[0]
        cut = self.encoder.cut["questions"] > cut_before
        return [said], [f"the question is longer than {limit} tokens; only its beginning was read"] if cut else []

    def answer(
        self, samples: Sequence[VQASample], limit: int | None, *, shuffled: bool = False, progress: str | None = None
    ) -> dict[int, Answer]:
        options = {"limit": limit, "shuffled": shuffled, "progress": progress}
        return answer_samples(self.model, samples, self.encoder, self.processor, self.precision, **options)

    def figures(self, answers: dict[int, Answer]) -> dict[str, float]:
        return {
            "eos_rate": sum(a.ended for a in answers.values()) / len(answers),
            "mean_answer_tokens": sum(a.tokens for a in answers.values()) / len(answers),
        }

    def export(self, folder: Path) -> list[str]:
        return export_run(self, folder)


def open_trained(folder: Path, values: dict[str, Any], config: TrainConfig, precision: Precision) -> TrainedVQA:
    return TrainedVQA(**vars(open_run(folder, values, config, precision)))


VQA = System("vqa", TrainConfig, prepare, open_trained)
