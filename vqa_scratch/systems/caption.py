"""Captions: a ResNet and a decoder describe images, and answer questions about them too if asked to learn it.

Preset `caption` trains a small net of the same classes on the built-in data set; `coco` starts from a torchvision
ResNet and a released GPT-2. A caption has no prompt, a question is its own prompt, and one model learns both.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqa_scratch.connectors.base import Conditioning
from vqa_scratch.data.answers import Answer
from vqa_scratch.data.augment import Augment, depends_on_side
from vqa_scratch.data.batches import Batch, Questions
from vqa_scratch.data.groups import batches_by_image
from vqa_scratch.data.images import ImageProcessor, Images
from vqa_scratch.data.text import Tokenizer, check_question
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.models.vqa import VQAModel, labelled_loss
from vqa_scratch.report.gallery import answer_sections
from vqa_scratch.rl.options import RLHFOptions
from vqa_scratch.rl.tasks import Task
from vqa_scratch.study.opened import Opened
from vqa_scratch.systems import assembly
from vqa_scratch.systems.base import AT_ONCE, System, seed_everything
from vqa_scratch.systems.caption_models import build_model, tokenizers_for
from vqa_scratch.systems.captions import (
    CaptionData,
    accuracy_of,
    by_image,
    caption_panels,
    in_words,
    quality,
    read_captions_data,
    read_texts,
    report,
    show,
)
from vqa_scratch.systems.export import export_writer
from vqa_scratch.systems.options import CaptionOptions
from vqa_scratch.systems.policy import answering_task, run_options
from vqa_scratch.systems.questions import one_sample
from vqa_scratch.systems.scoring import QuestionOnly, TypePrior, blind, other_images, score
from vqa_scratch.systems.studied import writing_subject
from vqa_scratch.systems.writing import Split, write, writing_figures
from vqa_scratch.training.precision import Precision
from vqa_scratch.training.ranks import World


class Key(NamedTuple):
    """One batch, or one rank's share of it: its rows, what the changes to its images are drawn from, and how many
    images of the batch come before these."""

    rows: np.ndarray
    seed: tuple[int, ...]
    before: int = 0


class CaptionSystem(System):
    """Training on captions, and in a share of the steps on questions; figures of both."""

    name = "caption"
    unit = "texts"
    writes = True
    model: VQAModel
    data: CaptionData

    # ------------------------------------------------------------------------------------------- build, save, open

    @classmethod
    def read(cls, options: CaptionOptions) -> CaptionData:
        return read_captions_data(options)

    @classmethod
    def build(cls, options: CaptionOptions, data: CaptionData, precision: Precision) -> Self:
        seed_everything(options.seed)
        model, decoder, processor = build_model(options, data)
        return cls(options, model, tokenizers_for(options, decoder), processor, precision)

    @classmethod
    def open(cls, folder: Path, sizes: dict[str, Any], options: CaptionOptions, precision: Precision) -> Self:
        tokenizers = tokenizers_for(options, Tokenizer.from_pretrained(folder / "decoder_tokenizer"))
        processor = ImageProcessor.from_pretrained(folder)
        return cls(options, assembly.assemble(sizes), tokenizers, processor, precision, folder)

    @property
    def sizes(self) -> dict[str, Any]:
        return assembly.sizes_of(self.model)

    # --------------------------------------------------------------------------------------------------- training

    def split(self, samples: Sequence[VQASample]) -> Split:
        questions = Questions(samples, self.tokenizers)
        return Split(questions, Images(questions.image_paths, self.processor))

    def train_on(self, data: CaptionData) -> None:
        options = self.options
        self.data, self.trainable = data, self.model.freeze(options.freeze)
        train = data.texts["train"]
        self.training = self.split([*train.captions, *train.questions])
        samples = self.training.questions.samples
        self.names_side = np.array([depends_on_side(f"{s.question} {s.answer}") for s in samples])
        # The rows of each image, captions and questions apart: a step has one kind only, so that lengths are alike.
        first, of_image = len(train.captions), self.training.questions.of_image
        self.groups = [
            [some for rows in of_image if (some := [r for r in rows if (r < first) == captions])]
            for captions in (True, False)
        ]
        self.augment = Augment(options.flip, options.rotate, options.brightness, options.contrast)
        self.shown: dict[tuple[str, str], Split] = {}  # what is only looked at, by split and kind
        for name, texts in data.texts.items():
            for kind, some in (("captions", texts.to_describe), ("questions", texts.questions)):
                if some and name != "train":
                    self.shown[name, kind] = self.split(some)
        if options.image_cache:
            for split in (self.training, *self.shown.values()):
                split.images.cache_in(options.cache)
        self.baselines: dict[str, float] = {}
        if options.compile:
            self.loss = torch.compile(self.loss, dynamic=True)

    def about(self) -> list[str]:
        kinds = [sum(map(len, groups)) for groups in self.groups]
        return [
            self.trainable,
            f"training on {kinds[0]:,} captions and {kinds[1]:,} questions; "
            f"{(~self.names_side).mean():.0%} of them name no side, so their images may be mirrored",
            f"cut to the token limits: {self.tokenizers.cut['answers']} captions or answers",
        ]

    def epoch(self, number: int) -> list[Key]:
        """All captions once, and between them as many batches of questions as make their share of the steps.

        Questions go on where they stopped in the epoch before; like everything, a function of `number` alone.
        """
        options = self.options
        rng = np.random.default_rng([options.seed, number, 0])
        lengths = self.training.questions.answers.lengths
        batches = batches_by_image(self.groups[0], rng, options.captions_per_step, options.captions_per_image, lengths)
        share = options.question_share
        if share:
            wanted = round(len(batches) * share / (1 - share))
            asked: list[np.ndarray] = []
            turn, skip = divmod(number * wanted, len(self._question_batches(0)))
            while len(asked) < skip + wanted:
                asked += self._question_batches(turn)
                turn += 1
            batches += asked[skip : skip + wanted]
            batches = [batches[i] for i in rng.permutation(len(batches))]
        return [Key(rows, (options.seed, number, 1, place)) for place, rows in enumerate(batches)]

    def _question_batches(self, turn: int) -> list[np.ndarray]:
        options, rng = self.options, np.random.default_rng([self.options.seed, turn, 2])
        return batches_by_image(self.groups[1], rng, options.questions_per_step, options.questions_per_image)

    def share(self, key: Key, world: World) -> tuple[Key, bool]:
        """This rank's images of a batch; one image and False where there are more ranks than images."""
        images = self.training.questions.by_image(key.rows)
        mine = world.share(range(len(images)))
        rows = np.concatenate([images[i] for i in mine or range(1)])
        return Key(rows, key.seed, mine[0] if mine else 0), bool(mine)

    def batch(self, key: Key) -> Batch:
        batch = self.training.questions.batch(key.rows, self.training.images)
        number = len(batch.images)
        sides = np.bincount(batch.image_index.numpy(), self.names_side[key.rows], number)
        chance = np.random.default_rng(key.seed).random((key.before + number, 4))[key.before :]
        batch.images = self.augment(batch.images, torch.from_numpy(sides == 0), torch.from_numpy(chance).float())
        return batch

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        image = self.model.image.states(self.processor.normalize(batch.images))
        hidden = self.model.hidden(image, None, batch.decoder_input_ids, batch.image_index)
        return labelled_loss(hidden, self.model.decoder.head, batch.labels)

    def condition(self, batch: Batch) -> Conditioning:
        """What the decoder is given for a batch."""
        image = self.model.image.states(self.processor.normalize(batch.images))
        return self.model.connector(image, None, batch.image_index)

    def ids(self, rows: list[int]) -> list[int]:
        return [self.training.questions.samples[row].question_id for row in rows]

    # ----------------------------------------------------------------------------------------------- evaluation

    def say(
        self, name: str, kind: str, limit: int | None = None, *, shuffled: bool = False, progress: str | None = None
    ) -> dict[int, Answer]:
        """What the model writes for a split, or for about its first `limit` samples; by question id.

        Ranks take turns at the batches, and all of them get all answers.
        """
        split = self.shown[name, kind]
        per_step = self.options.captions_per_step if kind == "captions" else self.options.questions_per_step
        batches = split.questions.in_order(limit or len(split.questions.samples), per_step)
        swap = other_images(len(split.images.paths)) if shuffled else None
        mine = batches[self.world.rank :: self.world.size]
        said = write(self, self.condition, split, mine, image_map=swap, progress=progress)
        return {number: answer for some in self.world.gather(said) for number, answer in some.items()}

    def validation_loss(self) -> float:
        """Nats a token over one reference of each image that `evaluate` looks at, in eval mode."""
        split, total, tokens = self.shown["val", "captions"], 0.0, 0
        batches = split.questions.in_order(self.options.eval_captions, self.options.captions_per_step)
        with self.evaluating():
            for _, batch in split.batches(self, batches[self.world.rank :: self.world.size], None, None):
                with self.precision.autocast():
                    total += self.loss(batch)[0].item()
                tokens += batch.counts[1]
        total, tokens = self.world.totals([total, tokens])
        return total / tokens

    def evaluate(self) -> dict[str, float]:
        texts, limit = self.data.texts["val"], self.options.eval_captions
        captions = by_image(texts.to_describe, self.say("val", "captions", limit))
        figures = quality(captions, texts.captions, texts.scenes)
        figures = {k: v for k, v in figures.items() if k != "bleu_signature"}
        figures |= {"accuracy": accuracy_of(figures), "loss": self.validation_loss()}
        if texts.questions:
            said = self.say("val", "questions", self.options.eval_questions)
            figures["answer_accuracy"] = score(texts.questions, said, self.data.family).accuracy
        return figures

    def panels(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return caption_panels(rows, self.baselines)

    def finish(self, folder: Path) -> dict[str, Any]:
        """Describe the test split, the same with shuffled images, and the hold-out where there is one; answer its
        questions if the model was trained on any; samples.html and results.png."""
        test = self.data.texts["test"]
        figures, said = report(test.to_describe, test.scenes, partial(self.say, "test", "captions"))
        key, scale = ("bleu", 100) if test.scenes is None else ("object_recall", 1)
        blind_figures = figures["baselines"].items()
        self.baselines = {f"{key.split('_')[-1]}, {n.replace('_', ' ')}": b[key] / scale for n, b in blind_figures}
        held = None
        if "holdout" in self.data.texts:
            new = self.data.texts["holdout"]
            captions = by_image(new.to_describe, self.say("holdout", "captions", progress="hold-out"))
            held = quality(captions, new.to_describe, new.scenes)
        asked, sections = self._questions_report() if test.questions else (None, [])
        if self.world.main:
            show(folder, figures, test, said, self.options.samples, sections)
        return figures | {"holdout": held, "answers": asked}

    def _questions_report(self) -> tuple[dict[str, Any], list[tuple[str, list[str]]]]:
        """(figures of the questions of the test split, sections of the page of samples)."""
        samples, trained_on = self.data.texts["test"].questions, self.data.texts["train"].questions
        scored = score(samples, self.say("test", "questions", progress="questions"), self.data.family)
        shuffled = self.say("test", "questions", shuffled=True, progress="shuffled images")
        baselines = {
            "prior": blind(samples, TypePrior(trained_on)),
            "question_only": blind(samples, QuestionOnly(trained_on)),
            "shuffled_images": score(samples, shuffled, self.data.family).accuracy,
        }
        figures = {"accuracy": scored.accuracy, "accuracy_by_family": scored.by_family, "baselines": baselines}
        return figures, answer_sections(samples, scored.answers, self.data.family, self.options.samples)

    def lines(self, summary: dict[str, Any]) -> list[str]:
        rows = {"test": summary, "hold-out": summary["holdout"]}
        rows |= {name.replace("_", " "): figures for name, figures in summary["baselines"].items()}
        lines = [f"{name:20s} {', '.join(in_words(figures))}" for name, figures in rows.items() if figures]
        if summary["answers"]:
            families = ", ".join(f"{k} {v:.3f}" for k, v in summary["answers"]["accuracy_by_family"].items())
            lines.append(f"{'answers':20s} {summary['answers']['accuracy']:.3f} ({families})")
        return lines

    # --------------------------------------------------------------------------------------------------- answers

    def ask(
        self, image: Path, question: str | None, top: int | None = None, decoding: dict[str, Any] | None = None
    ) -> tuple[list[Answer], list[str]]:
        """A caption without a question, an answer with one."""
        if top is not None:
            raise UserError(f"{self.folder} writes one text and ranks no list of them: leave out --top")
        if question is not None:
            self.check_answers_questions()
            question = check_question(question)
        split = self.split([one_sample(image, question or "")])
        written = write(self, self.condition, split, [np.array([0])], decoding=decoding)
        return [written[0]], self.tokenizers.notes_on(question or "")

    def answer(
        self,
        samples: Sequence[VQASample],
        limit: int | None = None,
        *,
        shuffled: bool = False,
        progress: str | None = None,
        ranked: bool = False,
    ) -> dict[int, Answer]:
        self.check_answers_questions()
        return {} if ranked else self._write(samples, limit, shuffled=shuffled, progress=progress)

    def check_answers_questions(self) -> None:
        """Raise UserError unless the model was trained on questions too."""
        if not self.options.question_share:
            raise UserError(
                f"{self.folder} was trained to describe images alone; --question-share trains one that answers too"
            )

    def figures(self, answers: dict[int, Answer]) -> dict[str, float]:
        return writing_figures(answers)

    def describe(self, data: Path, split: str, limit: int | None) -> dict[str, Any]:
        """Describe a split, or about its first `limit` images, and score it as the run's own report does."""
        texts = read_texts(data, split, seed=self.options.seed, verbose=True)
        samples = texts.to_describe[:limit]
        figures, _ = report(samples, texts.scenes, partial(self._write, samples))
        return {"data": str(data), "split": split, "images": len(samples)} | figures

    def _write(
        self,
        samples: Sequence[VQASample],
        limit: int | None = None,
        *,
        shuffled: bool = False,
        progress: str | None = None,
    ) -> dict[int, Answer]:
        split = self.split(samples)
        swap = other_images(len(split.images.paths)) if shuffled else None
        chosen = split.questions.in_order(limit or len(samples), AT_ONCE)
        return write(self, self.condition, split, chosen, image_map=swap, progress=progress)

    def subject(self, image: Image.Image, question: str | None) -> Opened:
        """Its caption of the image, or with a question its answer."""
        if question is not None:
            self.check_answers_questions()
            question = check_question(question)
        return writing_subject(self, image, question or "")

    def policy(self, options: RLHFOptions, dtype: torch.dtype) -> Task:
        """A run that answers questions too is tuned on those."""
        self.check_answers_questions()
        texts = self.read(run_options(self, options)).texts
        return answering_task(self, options, dtype, texts["train"].questions, texts["test"].questions)

    def export(self, folder: Path) -> list[str]:
        return export_writer(self, folder)
