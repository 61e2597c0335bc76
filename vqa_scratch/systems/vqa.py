"""The first system: three towers, of which the decoder writes the answer (`models/vqa.py`). Presets shapes and book.

`shapes` trains small random towers on the embedded data set; `book` starts from released ones.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqa_scratch.data.batches import Batch, Encoder, Images, Questions
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.text import Tokenizer, train_bpe, train_wordpiece
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.models.bert import Bert, BertConfig
from vqa_scratch.models.gpt2 import GPT2, GPT2Config
from vqa_scratch.models.reader import labelled_loss
from vqa_scratch.models.stem import ConvStem
from vqa_scratch.models.vit import ViT, ViTConfig
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.run import encoder_for, save_parts
from vqa_scratch.storage import write_json
from vqa_scratch.systems.base import System, check_positions, seed_everything
from vqa_scratch.systems.features import keep_features
from vqa_scratch.systems.options import VQAOptions
from vqa_scratch.systems.questions import QuestionJob, Splits, read_splits
from vqa_scratch.systems.vqa_run import ANSWERS, open_trained, ranked_questions
from vqa_scratch.training.evaluation import Answer, answer_questions, common_answers, rank_answers
from vqa_scratch.training.precision import Precision

CANDIDATES = 1000  # the most frequent training answers, which the model can also choose from
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


def embedded_system(config: VQAOptions, train: list[VQASample]) -> tuple[VQAModel, Encoder, ImageProcessor]:
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
    model = VQAModel(image, Bert(text_config), GPT2(decoder_config), config.connector)
    tables = [image.positions] + ([model.places] if config.connector == "tokens" else [])
    with torch.no_grad():
        for table in tables:
            table[0, 1:] = 0.5 * grid_positions(image_config.grid, config.width)
    return model, encoder_for(config, text, decoder), ImageProcessor(size=(IMAGE_SIZE, IMAGE_SIZE))


def released_system(config: VQAOptions, train: list[VQASample]) -> tuple[VQAModel, Encoder, ImageProcessor]:
    """Towers, tokenizers and preprocessing from checkpoints; or, with `--init random`, random towers of book size."""
    if config.init == "random":
        text, decoder = _own_tokenizers(train, " ")
        image, words, writer = ViT(ViTConfig()), Bert(DISTILBERT), GPT2(GPT2Config(add_cross_attention=True))
        processor = ImageProcessor()
    else:
        text = Tokenizer.from_pretrained(config.text_model)
        decoder = Tokenizer.from_pretrained(config.decoder_model)
        image, words = ViT.from_pretrained(config.image_model), Bert.from_pretrained(config.text_model)
        writer = GPT2.from_pretrained(config.decoder_model, add_cross_attention=True)
        processor = ImageProcessor.from_pretrained(config.image_model)
    check_positions(config, ["max_question_tokens"], words.longest, config.text_model or "DistilBERT")
    written = [*(["max_question_tokens"] if config.question_prompt else []), "max_answer_tokens"]
    check_positions(config, written, writer.config.max_positions, config.decoder_model or "GPT-2")
    return VQAModel(image, words, writer, config.connector), encoder_for(config, text, decoder), processor


def build_system(config: VQAOptions, train: list[VQASample]) -> tuple[VQAModel, Encoder, ImageProcessor]:
    """Model, tokenizers and preprocessing that the config asks for."""
    seed_everything(config.seed)
    return (embedded_system if config.preset == "shapes" else released_system)(config, train)


class VQATask(QuestionJob):
    """What the loop trains: questions with their images, and how to score the model on held-out ones."""

    loss_unit = "nats a token"

    def __init__(
        self,
        config: VQAOptions,
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
        self.candidates = common_answers(splits.samples["train"], CANDIDATES)
        if config.feature_cache:
            self.kept = keep_features(self)
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
            self.images["train"].inputs(batch.pixels),
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
        write_json(folder / ANSWERS, self.candidates)

    def ranked(
        self, split: str, batches: Sequence[np.ndarray], image_map: np.ndarray | None, progress: str | None
    ) -> dict[int, Answer]:
        """The best of the training answers to the rows in `batches`; arguments as in `answers`."""
        found = rank_answers(
            self.model,
            self.questions[split],
            self.images[split],
            self.precision,
            batches,
            self.candidates,
            image_map=image_map,
            progress=progress,
        )
        return {number: best for number, (best,) in found.items()}

    def finish(self, folder: Path) -> dict[str, Any]:
        """The figures of every system that answers questions, and how well it chooses among the training answers."""
        figures = super().finish(folder)
        ranking = self.report("test", ranked_questions(len(self.candidates)), progress="ranking", answers=self.ranked)
        chosen = {
            "ranking_accuracy": ranking.accuracy,
            "ranking_questions": len(ranking.answers),
            "ranking_candidates": len(self.candidates),
        }
        return figures | {"generation_accuracy": figures["accuracy"], **chosen, "fusion": self.config.connector}

    def lines(self, summary: dict[str, Any]) -> list[str]:
        figures, among, over = (summary[f"ranking_{name}"] for name in ("accuracy", "candidates", "questions"))
        line = f"ranking_accuracy     {figures:.4f} (the best of {among} answers, first {over} questions)"
        return [*super().lines(summary), line]


def prepare(config: VQAOptions, precision: Precision) -> VQATask:
    """Read the data and build the model. Raises UserError where either cannot be had."""
    splits = read_splits(config)
    return VQATask(config, *build_system(config, splits.samples["train"]), splits, precision)


VQA = System("vqa", VQAOptions, prepare, open_trained)
