"""The captioner that also answers questions: ResNet and GPT-2 (`models/caption.py`). Presets caption and coco.

`caption` trains a small net of the same classes on the embedded data set; `coco` starts from a torchvision ResNet and
a released GPT-2. A caption has no prompt, a question is its own prompt, and one model learns both.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqa_scratch.config import CaptionTrainConfig
from vqa_scratch.data.augment import Augment, depends_on_side
from vqa_scratch.data.batches import Batch, Encoder, Images, Questions, deal
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.text import Tokenizer, train_bpe
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.engine.evaluation import Answer, QuestionOnly, TypePrior, answer_questions, blind, other_images, score
from vqa_scratch.engine.gallery import answer_sections, write_page
from vqa_scratch.engine.precision import Precision
from vqa_scratch.engine.progress import moving_average
from vqa_scratch.models.caption import CaptionConfig, CaptionModel
from vqa_scratch.models.gpt2 import GPT2, GPT2Config
from vqa_scratch.models.reader import labelled_loss
from vqa_scratch.models.resnet import ResNet, ResNetConfig
from vqa_scratch.run import write_run_config
from vqa_scratch.systems.base import System, seed_everything
from vqa_scratch.systems.caption_run import TrainedCaptioner, caption_encoder, open_trained, save_tokenizer
from vqa_scratch.systems.captions import (
    Texts,
    accuracy_of,
    by_image,
    caption_cards,
    draw_results,
    lengths,
    other_references,
    quality,
    read_splits,
    spread,
)
from vqa_scratch.systems.questions import family_of
from vqa_scratch.systems.vqa import IMAGE_SIZE, grid_positions

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# torchvision's preprocessing of its first ResNet weights: shortest side 256, centre 224.
RESNET_PROCESSOR = ImageProcessor(size=256, crop_size=(224, 224), kind="BitImageProcessor", **IMAGENET)
TABLE_ROWS = 8


class Key(NamedTuple):
    """One batch: its rows, and what the changes to its images are drawn from."""

    rows: np.ndarray
    seed: tuple[int, ...]


def embedded_model(config: CaptionTrainConfig, decoder: Tokenizer) -> CaptionModel:
    """A small random net: two stages of basic blocks, which leave a map of 8x8 places of a 64-pixel image."""
    image = ResNetConfig("basic", (config.image_blocks,) * 2, (config.image_width, 2 * config.image_width))
    decoder_config = GPT2Config(
        vocab_size=len(decoder),
        max_positions=config.max_question_tokens + config.max_caption_tokens + 1,
        dim=config.width,
        layers=config.decoder_layers,
        heads=config.heads,
        activation="relu",
        embedding_dropout=0.0,
        dropout=0.0,
        attention_dropout=0.0,
        add_cross_attention=True,
        bos_id=decoder.bos_id,
        eos_id=decoder.eos_id,
        pad_id=decoder.pad_id,
    )
    model = CaptionModel.from_config(CaptionConfig(image, decoder_config, "group", image.grid(IMAGE_SIZE)))
    with torch.no_grad():
        model.places[0] = 0.5 * grid_positions(model.grid, config.width)
    return model


def build(
    config: CaptionTrainConfig, train: Texts
) -> tuple[CaptionModel, Encoder, ImageProcessor]:
    """Model, tokenizer and preprocessing that the config asks for."""
    seed_everything(config.seed)
    if config.init == "pretrained":
        decoder = Tokenizer.from_pretrained(config.decoder_model)
        gpt2 = GPT2.from_pretrained(config.decoder_model, add_cross_attention=True)
        model = CaptionModel(ResNet.from_pretrained(config.image_model), gpt2)
        return model, caption_encoder(config, decoder), RESNET_PROCESSOR
    texts = {s.answer for s in (*train.captions, *train.questions)} | {s.question for s in train.questions}
    decoder = train_bpe([f" {text}" for text in sorted(texts)], config.vocabulary)
    encoder = caption_encoder(config, decoder)
    if config.preset == "coco":  # of the released sizes, for measuring without a network
        gpt2 = GPT2Config(vocab_size=50257, add_cross_attention=True, bos_id=decoder.bos_id, eos_id=decoder.eos_id)
        return CaptionModel.from_config(CaptionConfig(ResNetConfig(), gpt2)), encoder, RESNET_PROCESSOR
    return embedded_model(config, decoder), encoder, ImageProcessor(size=(IMAGE_SIZE, IMAGE_SIZE))


class CaptionJob:
    """What the loop trains: captions, and a share of steps on questions; and the figures in the end."""

    unit = "texts"

    def __init__(
        self,
        config: CaptionTrainConfig,
        model: CaptionModel,
        encoder: Encoder,
        processor: ImageProcessor,
        folder: Path,
        splits: dict[str, Texts],
        precision: Precision,
    ) -> None:
        self.config, self.model, self.encoder, self.processor = config, model, encoder, processor
        self.splits, self.precision, self.family = splits, precision, family_of(folder)
        self.trainable = model.freeze(config.freeze)
        train = splits["train"]
        self.train = Questions([*train.captions, *train.questions], encoder)
        self.side = np.array([depends_on_side(f"{s.question} {s.answer}") for s in self.train.samples])
        # The rows of each image, captions and questions apart: a step has one kind only, so that lengths are alike.
        first = len(train.captions)
        self.groups = [
            [some for rows in self.train.of_image if (some := [r for r in rows if (r < first) == captions])]
            for captions in (True, False)
        ]
        self.augment = Augment(config.flip, config.rotate, config.brightness, config.contrast)
        self.images: dict[str, Images] = {"train": self._images(self.train)}
        self.tasks: dict[tuple[str, str], Questions] = {}
        for name, texts in splits.items():
            if name != "train":
                for kind, samples in (("captions", texts.to_describe), ("questions", texts.questions)):
                    if samples:
                        self.tasks[name, kind] = Questions(samples, encoder)
        self.baselines: dict[str, float] = {}
        self.hidden = torch.compile(model.hidden, dynamic=True) if config.compile else model.hidden

    def _images(self, questions: Questions) -> Images:
        images = Images(questions.image_paths, self.processor)
        if self.config.image_cache:
            images.cache_in(self.config.cache)
        return images

    def about(self) -> list[str]:
        cut = self.encoder.cut
        kinds = [sum(map(len, groups)) for groups in self.groups]
        return [
            self.trainable,
            f"training on {kinds[0]:,} captions and {kinds[1]:,} questions; "
            f"{(~self.side).mean():.0%} of them name no side, so their images may be mirrored",
            f"cut to the token limits: {cut['answers']} captions or answers",
        ]

    # ------------------------------------------------------------------------------------------ the loop

    def epoch(self, number: int) -> list[Key]:
        """All captions once, and between them as many batches of questions as make their share of the steps.

        Questions go on where they stopped in the epoch before; like everything, a function of `number` alone.
        """
        config = self.config
        rng = np.random.default_rng([config.seed, number, 0])
        per_step, per_image = config.captions_per_step, config.captions_per_image
        batches = deal(self.groups[0], rng, per_step, per_image, self.train.answers.lengths)
        share = config.question_share
        if share:
            wanted = round(len(batches) * share / (1 - share))
            asked: list[np.ndarray] = []
            turn, skip = divmod(number * wanted, len(self._questions(0)))
            while len(asked) < skip + wanted:
                asked += self._questions(turn)
                turn += 1
            batches += asked[skip : skip + wanted]
            batches = [batches[i] for i in rng.permutation(len(batches))]
        return [Key(rows, (config.seed, number, 1, place)) for place, rows in enumerate(batches)]

    def _questions(self, turn: int) -> list[np.ndarray]:
        config, rng = self.config, np.random.default_rng([self.config.seed, turn, 2])
        return deal(self.groups[1], rng, config.questions_per_step, config.questions_per_image)

    def batch(self, key: Key) -> Batch:
        batch = self.train.batch(key.rows, self.images["train"])
        sides = np.bincount(batch.image_index.numpy(), self.side[key.rows], len(batch.pixels))
        may_flip = torch.from_numpy(sides == 0)
        batch.pixels = self.augment(batch.pixels, may_flip, np.random.default_rng(key.seed))
        return batch

    def size(self, batch: Batch) -> tuple[int, int]:
        return len(batch.rows), int((batch.labels >= 0).sum())

    def ids(self, batch: Batch) -> list[int]:
        return [self.train.samples[row].question_id for row in batch.rows.tolist()]

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        pixels = self.processor.normalize(batch.pixels)
        hidden = self.hidden(pixels, decoder_input_ids=batch.decoder_input_ids, **batch.reading)
        return labelled_loss(hidden, self.model.decoder.tokens.weight, batch.labels)

    # ------------------------------------------------------------------------------------------ evaluation

    def answers(self, split: str, kind: str, limit: int | None = None, **options: Any) -> dict[int, Answer]:
        """What the model says of a split, or of about its first `limit` samples; by question id."""
        questions = self.tasks[split, kind]
        if split not in self.images or self.images[split].paths != questions.image_paths:
            self.images[split] = self._images(questions)
        per_step = self.config.captions_per_step if kind == "captions" else self.config.questions_per_step
        batches = questions.in_order(limit or len(questions.samples), per_step)
        shuffled = options.pop("shuffled", False)
        swap = other_images(len(questions.image_paths)) if shuffled else None
        images = self.images[split]
        return answer_questions(self.model, questions, images, self.precision, batches, image_map=swap, **options)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Nats a token over one reference of each image that `evaluate` looks at, in eval mode."""
        self.model.eval()
        questions, total, tokens = self.tasks["val", "captions"], 0.0, 0
        for rows in questions.in_order(self.config.eval_captions, self.config.captions_per_step):
            batch = questions.batch(rows, self.images["val"]).to(self.precision.device)
            with self.precision.autocast():
                total += self.loss(batch)[0].item()
            tokens += self.size(batch)[1]
        self.model.train()
        return total / tokens

    def evaluate(self) -> dict[str, float]:
        texts, limit = self.splits["val"], self.config.eval_captions
        captions = by_image(texts.to_describe, self.answers("val", "captions", limit))
        figures = quality(captions, texts.captions, texts.scenes)
        figures = {k: v for k, v in figures.items() if isinstance(v, float)}
        figures |= {"accuracy": accuracy_of(figures), "loss": self.validation_loss()}
        if texts.questions:
            said = self.answers("val", "questions", self.config.eval_questions)
            figures["answer_accuracy"] = score(texts.questions, said, self.family).accuracy
        return figures

    def panels(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Training and validation loss, and the figures of the captions, over the texts seen."""
        steps, evaluations = [row for row in rows if "loss" in row], [row for row in rows if "val" in row]
        seen = [row["samples"] / 1000 for row in evaluations]
        trained = moving_average([row["loss"] for row in steps], 5)
        names = ("object_precision", "object_recall", "exact_share", "answer_accuracy")
        shown = {n: [row["val"].get(n) for row in evaluations] for n in names}
        lines = {n.replace("_", " "): (seen, ys) for n, ys in shown.items() if any(y is not None for y in ys)}
        bleu = {"BLEU / 100": (seen, [row["val"]["bleu"] / 100 for row in evaluations])}
        losses = {
            "training": ([row["samples"] / 1000 for row in steps], trained),
            "validation": (seen, [row["val"]["loss"] for row in evaluations]),
        }
        axis = {"xlabel": "thousand texts seen"}
        scored = {"title": "captions of images never trained on", "ylabel": "share", "ylim": (0, 1.02)}
        return [
            {"title": "loss", "ylabel": "nats a token", "lines": losses, "log": True, **axis},
            {**scored, "lines": lines | bleu, "hlines": self.baselines, **axis},
        ]
