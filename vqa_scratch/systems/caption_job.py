"""Training the captioner: batches of captions and of questions, figures on the way, the report in the end."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqa_scratch.data.augment import Augment, depends_on_side
from vqa_scratch.data.batches import Batch, Encoder, Images, Questions
from vqa_scratch.data.groups import deal
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.models.caption import CaptionModel
from vqa_scratch.models.reader import labelled_loss
from vqa_scratch.report.gallery import answer_sections
from vqa_scratch.systems.caption_run import save_parts
from vqa_scratch.systems.captions import (
    Texts,
    accuracy_of,
    by_image,
    caption_panels,
    quality,
    report,
    show,
    told,
)
from vqa_scratch.systems.options import CaptionOptions
from vqa_scratch.systems.questions import family_of
from vqa_scratch.training.distributed import World
from vqa_scratch.training.evaluation import (
    Answer,
    QuestionOnly,
    TypePrior,
    answer_questions,
    blind,
    other_images,
    score,
)
from vqa_scratch.training.precision import Precision


class Key(NamedTuple):
    """One batch, or one rank's share of it: its rows, what the changes to its images are drawn from, and how many
    images of the batch come before these."""

    rows: np.ndarray
    seed: tuple[int, ...]
    before: int = 0


class CaptionJob:
    """What the loop trains: captions, and a share of steps on questions; and the figures in the end."""

    unit = "texts"
    world = World()  # train.py sets it

    def __init__(
        self,
        config: CaptionOptions,
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
        self.training_images = self._images(self.train)
        # What is only looked at: (split, kind) -> samples with their images.
        self.shown: dict[tuple[str, str], tuple[Questions, Images]] = {}
        for name, texts in splits.items():
            for kind, samples in (("captions", texts.to_describe), ("questions", texts.questions)):
                if samples and name != "train":
                    questions = Questions(samples, encoder)
                    self.shown[name, kind] = questions, self._images(questions)
        self.baselines: dict[str, float] = {}
        self.hidden = torch.compile(model.hidden, dynamic=True) if config.compile else model.hidden

    def _images(self, questions: Questions) -> Images:
        images = Images(questions.image_paths, self.processor)
        if self.config.image_cache:
            images.cache_in(self.config.cache)
        return images

    def precompute(self) -> None:
        """Nothing: no part of the model is kept apart."""

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

    def share(self, key: Key, world: World) -> tuple[Key, bool]:
        """This rank's images of a batch; one image and False where there are more ranks than images."""
        images = self.train.by_image(key.rows)
        mine = world.share(range(len(images)))
        rows = np.concatenate([images[i] for i in mine or range(1)])
        return Key(rows, key.seed, mine[0] if mine else 0), bool(mine)

    def batch(self, key: Key) -> Batch:
        batch = self.train.batch(key.rows, self.training_images)
        number = len(batch.pixels)
        sides = np.bincount(batch.image_index.numpy(), self.side[key.rows], number)
        chance = np.random.default_rng(key.seed).random((key.before + number, 4))[key.before :]
        batch.pixels = self.augment(batch.pixels, torch.from_numpy(sides == 0), torch.from_numpy(chance).float())
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

    def say(
        self, split: str, kind: str, limit: int | None = None, *, shuffled: bool = False, progress: str | None = None
    ) -> dict[int, Answer]:
        """What the model says of a split, or of about its first `limit` samples; by question id.

        Ranks take turns at the batches, and all of them get all answers.
        """
        questions, images = self.shown[split, kind]
        per_step = self.config.captions_per_step if kind == "captions" else self.config.questions_per_step
        batches = questions.in_order(limit or len(questions.samples), per_step)
        swap = other_images(len(questions.image_paths)) if shuffled else None
        mine = batches[self.world.rank :: self.world.size]
        said = answer_questions(self.model, questions, images, self.precision, mine, image_map=swap, progress=progress)
        return {number: answer for some in self.world.gather(said) for number, answer in some.items()}

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Nats a token over one reference of each image that `evaluate` looks at, in eval mode."""
        self.model.eval()
        (questions, images), total, tokens = self.shown["val", "captions"], 0.0, 0
        batches = questions.in_order(self.config.eval_captions, self.config.captions_per_step)
        for rows in batches[self.world.rank :: self.world.size]:
            batch = questions.batch(rows, images).to(self.precision.device)
            with self.precision.autocast():
                total += self.loss(batch)[0].item()
            tokens += self.size(batch)[1]
        self.model.train()
        total, tokens = self.world.totals([total, tokens])
        return total / tokens

    def evaluate(self) -> dict[str, float]:
        texts, limit = self.splits["val"], self.config.eval_captions
        captions = by_image(texts.to_describe, self.say("val", "captions", limit))
        figures = quality(captions, texts.captions, texts.scenes)
        figures = {k: v for k, v in figures.items() if k != "bleu_signature"}
        figures |= {"accuracy": accuracy_of(figures), "loss": self.validation_loss()}
        if texts.questions:
            said = self.say("val", "questions", self.config.eval_questions)
            figures["answer_accuracy"] = score(texts.questions, said, self.family).accuracy
        return figures

    def panels(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return caption_panels(rows, self.baselines)

    # ------------------------------------------------------------------------------------------ the report

    def save_parts(self, folder: Path) -> None:
        save_parts(folder, self.config, self.model, self.encoder, self.processor)

    def finish(self, folder: Path) -> dict[str, Any]:
        """Describe the test split, the same with shuffled images, and the hold-out where there is one; answer its
        questions if the model was trained on any; samples.html and results.png."""
        test = self.splits["test"]
        figures, said = report(test.to_describe, test.scenes, partial(self.say, "test", "captions"))
        key, scale = ("bleu", 100) if test.scenes is None else ("object_recall", 1)
        blind_figures = figures["baselines"].items()
        self.baselines = {f"{key.split('_')[-1]}, {n.replace('_', ' ')}": b[key] / scale for n, b in blind_figures}
        held = None
        if "holdout" in self.splits:
            new = self.splits["holdout"]
            captions = by_image(new.to_describe, self.say("holdout", "captions", progress="hold-out"))
            held = quality(captions, new.to_describe, new.scenes)
        asked = self._questions_report() if test.questions else None
        if self.world.main:
            answered = answer_sections(test.questions, self.answered, self.family, self.config.samples) if asked else []
            show(folder, figures, test, said, self.config.samples, answered)
        return figures | {"holdout": held, "answers": asked}

    def _questions_report(self) -> dict[str, Any]:
        samples, trained_on = self.splits["test"].questions, self.splits["train"].questions
        scored = score(samples, self.say("test", "questions", progress="questions"), self.family)
        shuffled = self.say("test", "questions", shuffled=True, progress="shuffled images")
        self.answered = scored.answers
        baselines = {
            "prior": blind(samples, TypePrior(trained_on)),
            "question_only": blind(samples, QuestionOnly(trained_on)),
            "shuffled_images": score(samples, shuffled, self.family).accuracy,
        }
        return {"accuracy": scored.accuracy, "accuracy_by_family": scored.by_family, "baselines": baselines}

    def lines(self, summary: dict[str, Any]) -> list[str]:
        """The figures of `finish` that the terminal shows."""
        rows = {"test": summary, "hold-out": summary["holdout"]}
        rows |= {name.replace("_", " "): figures for name, figures in summary["baselines"].items()}
        lines = [f"{name:20s} {', '.join(told(figures))}" for name, figures in rows.items() if figures]
        if summary["answers"]:
            families = ", ".join(f"{k} {v:.3f}" for k, v in summary["answers"]["accuracy_by_family"].items())
            lines.append(f"{'answers':20s} {summary['answers']['accuracy']:.3f} ({families})")
        return lines
