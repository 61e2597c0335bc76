"""From a config to the parts of a system: samples, tokenizers, preprocessing, model, and the task the loop trains."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vqa_scratch.config import TrainConfig
from vqa_scratch.data.batches import Batch, Encoder, Images, Questions
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.shapes import FAMILY_OF_TYPE, ShapesSpec, ensure_shapes
from vqa_scratch.data.text import Tokenizer, train_bpe, train_wordpiece
from vqa_scratch.data.vqa_v2 import VQASample, read_vqa, split_by_image
from vqa_scratch.engine.evaluation import Report, answer_questions, other_images, score
from vqa_scratch.engine.precision import Precision
from vqa_scratch.models.bert import Bert, BertConfig
from vqa_scratch.models.gpt2 import GPT2, GPT2Config
from vqa_scratch.models.reader import labelled_loss
from vqa_scratch.models.stem import ConvStem
from vqa_scratch.models.vit import ViT, ViTConfig
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.run import encoder_for

IMAGE_SIZE = 64  # pixels a side, of the embedded towers
VOCABULARY = 512  # tokens at most, of the embedded tokenizers
DISTILBERT = BertConfig(layout="distilbert", layers=6, token_types=0)  # distilbert-base-uncased


# ------------------------------------------------------------------------------------------------ data


@dataclass(frozen=True)
class Splits:
    """Samples by split ("train", "val", "test", and "holdout" where there is one); `family` names a sample's family."""

    folder: Path
    samples: dict[str, list[VQASample]]
    family: Callable[[VQASample], str]


def family_of(folder: Path) -> Callable[[VQASample], str]:
    """the families where the folder is the embedded data set; the official answer type elsewhere."""
    if any(folder.glob("scenes_*.json")):
        return lambda sample: FAMILY_OF_TYPE[sample.question_type]
    return lambda sample: sample.answer_type or "unknown"


def read_splits(config: TrainConfig) -> Splits:
    """Read every split the run needs; draw the embedded data set first if no `--data` is given."""
    folder = config.data or ensure_shapes(config.cache, ShapesSpec(seed=config.seed))
    train = read_vqa(
        folder,
        config.train_split,
        start_at=config.start_at,
        end_at=config.end_at,
        max_images=config.max_images,
        max_questions=config.max_questions,
        min_agreement=config.min_agreement,
    )
    print(train.report)
    samples = {"train": train.samples}
    if config.val_split == "auto":
        samples["train"], samples["val"] = split_by_image(
            train.samples, (1 - config.val_fraction, config.val_fraction), config.seed
        )
    else:
        samples["val"] = read_vqa(folder, config.val_split).samples
    if config.test_split == config.val_split:
        samples["test"] = samples["val"]
    else:
        samples["test"] = read_vqa(folder, config.test_split).samples
    if (folder / "scenes_holdout.json").exists():
        samples["holdout"] = read_vqa(folder, "holdout").samples
    return Splits(Path(folder), samples, family_of(Path(folder)))


# ------------------------------------------------------------------------------------------------ model


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
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    return (embedded_system if config.preset == "shapes" else released_system)(config, train)


# ------------------------------------------------------------------------------------------------ task


class VQATask:
    """What the loop trains: questions with their images, and how to score the model on held-out ones."""

    def __init__(
        self,
        config: TrainConfig,
        model: VQAModel,
        encoder: Encoder,
        processor: ImageProcessor,
        splits: Splits,
        precision: Precision,
    ) -> None:
        self.config, self.model, self.splits, self.precision = config, model, splits, precision
        self.processor = processor
        self.questions = {name: Questions(samples, encoder) for name, samples in splits.samples.items()}
        self.images = {name: Images(q.image_paths, processor) for name, q in self.questions.items()}
        if config.image_cache:
            for images in self.images.values():
                images.cache_in(config.cache)
        # torch.compile wraps the forward pass alone, so that checkpoints keep the plain names.
        self.hidden = torch.compile(model.hidden, dynamic=True) if config.compile else model.hidden

    def epoch(self, number: int) -> list:
        config = self.config
        return self.questions["train"].epoch(config.seed, number, config.questions_per_step, config.questions_per_image)

    def batch(self, key: object) -> Batch:
        return self.questions["train"].batch(key, self.images["train"])

    def size(self, batch: Batch) -> tuple[int, int]:
        return len(batch.rows), int((batch.labels >= 0).sum())

    def ids(self, batch: Batch) -> list[int]:
        samples = self.questions["train"].samples
        return [samples[row].question_id for row in batch.rows.tolist()]

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(
            self.processor.normalize(batch.pixels),
            batch.input_ids,
            batch.attention_mask,
            batch.decoder_input_ids,
            image_index=batch.image_index,
        )
        return labelled_loss(hidden, self.model.decoder.tokens.weight, batch.labels)

    def report(
        self, split: str, limit: int | None = None, *, shuffled: bool = False, progress: str | None = None
    ) -> Report:
        """Score a split, or about its first `limit` questions; `shuffled` shows every question another image."""
        questions, images = self.questions[split], self.images[split]
        batches = questions.in_order(limit or len(questions.samples), 2 * self.config.questions_per_step)
        swap = other_images(len(images.paths)) if shuffled else None
        answers = answer_questions(
            self.model, questions, images, self.precision, batches, image_map=swap, progress=progress
        )
        return score(questions.samples, answers, self.splits.family)

    def evaluate(self) -> dict[str, float]:
        report = self.report("val", self.config.eval_questions)
        return {"accuracy": report.accuracy, **{f"accuracy/{k}": v for k, v in report.by_family.items()}}
