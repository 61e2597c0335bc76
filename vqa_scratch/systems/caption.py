"""Captions: a ResNet and a decoder that describe images and, if trained on questions too, answer them.

Preset `caption` trains a small net of the same classes on the built-in data set; `coco` starts from a torchvision
ResNet and a released GPT-2. A caption has no prompt, a question is its own prompt, and one model learns both.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from vqa_scratch.data.answers import Answer, Answers
from vqa_scratch.data.descriptions import read_scenes, scenes_file
from vqa_scratch.data.groups import batches_by_image
from vqa_scratch.data.text import check_question
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.report.gallery import answer_sections
from vqa_scratch.systems.assembly import WithoutNumbers
from vqa_scratch.systems.base import RunData, seed_everything
from vqa_scratch.systems.caption_models import build_model
from vqa_scratch.systems.captions import (
    accuracy_of,
    by_image,
    in_words,
    quality,
    read_captions_data,
    read_texts,
    report,
    show,
    to_describe,
)
from vqa_scratch.systems.finals import Pass, against_blind, cut_short
from vqa_scratch.systems.options import CaptionOptions
from vqa_scratch.systems.scoring import blind_baselines
from vqa_scratch.systems.splits import ANY_SAMPLE, Key
from vqa_scratch.systems.writer import WritingSystem
from vqa_scratch.training.precision import Precision


class CaptionSystem(WritingSystem[CaptionOptions]):
    """A system that trains on captions, and in a share of the steps on questions, and is scored on both.

    Its splits "val", "test" and "holdout" have one caption an image; "val questions" and "test questions" go with them.
    """

    example = ""
    unit = "texts"
    published_as = ("image-to-text", "bleu")

    # ------------------------------------------------------------------------------------------- build, save, open

    @classmethod
    def read(cls, options: CaptionOptions) -> RunData:
        return read_captions_data(options, questions=options.question_share > 0)

    @classmethod
    def check(cls, options: CaptionOptions) -> None:
        if options.init == "random":
            with WithoutNumbers():
                build_model(options, [ANY_SAMPLE])

    @classmethod
    def build(cls, options: CaptionOptions, data: RunData, precision: Precision) -> Self:
        seed_everything(options.seed)
        return cls(options, *build_model(options, data.samples["train"]), precision)

    # --------------------------------------------------------------------------------------------------- training

    def train_on(self, data: RunData) -> None:
        self.data, self.trainable = data, self.model.freeze(self.options.freeze)
        train = data.samples["train"]
        samples = {"train": train}
        for name, texts in data.samples.items():
            if name != "train":
                samples[name] = to_describe(texts)
                if asked := [sample for sample in texts if sample.question]:
                    samples[f"{name} questions"] = asked
        self.make_splits(samples)
        # The rows of each image, captions and questions apart: a step has one kind only, so that lengths are alike.
        of_image = self.splits["train"].questions.of_image
        self.groups = [
            [some for rows in of_image if (some := [row for row in rows if bool(train[row].question) == asked])]
            for asked in (False, True)
        ]
        self.baselines: dict[str, float] = {}

    def about(self) -> list[str]:
        kinds, cut = [sum(map(len, groups)) for groups in self.groups], self.tokenizers.cut
        number = f"training on {kinds[0]:,} captions and {kinds[1]:,} questions"
        if self.options.flip:
            number += f"; {(~self.names_side).mean():.0%} of them name no side, so their images may be mirrored"
        return [
            self.trainable,
            number,
            f"cut to the token limits: {cut['answers']} captions or answers, {cut['questions']} questions",
        ]

    def epoch(self, number: int) -> list[Key]:
        """All captions once, mixed with enough batches of questions to make their share of the steps.

        Questions continue where the epoch before stopped; still, all is a function of `number` alone.
        """
        options = self.options
        rng = np.random.default_rng([options.seed, number, 0])
        lengths = self.splits["train"].questions.decoder_ids.lengths
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

    # ----------------------------------------------------------------------------------------------- evaluation

    def at_once(self, name: str) -> int:
        return self.options.questions_per_step if name.endswith("questions") else self.options.captions_per_step

    def validation_loss(self) -> float:
        """Nats a token over one reference of each image that `evaluate` describes, in eval mode."""
        split, total, tokens = self.splits["val"], 0.0, 0
        batches = split.questions.in_order(self.options.eval_captions, self.options.captions_per_step)
        with self.evaluating():
            for _, batch in split.batches(self.precision.device, batches[self.world.rank :: self.world.size]):
                with self.precision.autocast():
                    total += self.loss(batch)[0].item()
                tokens += batch.counts[1]
        nats, number = self.world.totals([total, tokens])
        return nats / number

    def quality(self, name: str, limit: int | None = None, **how: Any) -> dict[str, Any]:
        """The figures of the captions of a split, or of about its first `limit` images; `how` as in `answer_split`."""
        samples = self.splits[name].questions.samples
        return quality(by_image(samples, self.answer_split(name, limit, **how)), samples, self.data.scenes.get(name))

    def evaluate(self) -> dict[str, float]:
        figures = self.quality("val", self.options.eval_captions)
        figures = {k: v for k, v in figures.items() if k != "bleu_signature"}
        figures |= {"accuracy": accuracy_of(figures), "loss": self.validation_loss()}
        if "val questions" in self.splits:
            figures["answer_accuracy"] = self.report("val questions", self.options.eval_questions).accuracy
        return figures

    def scored(self, figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The figures of the captions, and the accuracy of answers, beside the blind baselines."""
        names = ("object_precision", "object_recall", "exact_share", "answer_accuracy")
        known = {name: [row.get(name) for row in figures] for name in names}
        lines = {k.replace("_", " "): values for k, values in known.items() if any(v is not None for v in values)}
        lines["BLEU / 100"] = [row["bleu"] / 100 for row in figures]
        title = "captions of images never trained on"
        return [{"title": title, "ylabel": "share", "lines": lines, "hlines": self.baselines}]

    def passes(self) -> list[Pass]:
        options, size = self.options, {name: len(split.questions.samples) for name, split in self.splits.items()}
        labels = {"captions": "test", "shuffled images": "test", "hold-out": "holdout"}
        labels |= {"questions": "test questions", "questions, shuffled images": "test questions"}
        most = {"val": options.eval_captions, "val questions": options.eval_questions}
        evaluated = [Pass("", name, min(size[name], limit)) for name, limit in most.items() if name in size]
        return [*evaluated, *(Pass(label, name, size[name]) for label, name in labels.items() if name in size)]

    def finish(self, folder: Path) -> dict[str, Any]:
        """Score captions of the test split, of shuffled images and of the hold-out if there is one, and answers if the
        model was trained on questions; write samples.html and results.png."""
        samples, scenes = self.splits["test"].questions.samples, self.data.scenes.get("test")
        figures, said = report(samples, scenes, partial(self.answer_split, "test"))
        key, scale = ("bleu", 100) if scenes is None else ("object_recall", 1)
        blind_figures = figures["baselines"].items()
        self.baselines = {f"{key.split('_')[-1]}, {n.replace('_', ' ')}": b[key] / scale for n, b in blind_figures}
        self.blind = against_blind(key.replace("_", " "), figures[key] / scale, self.baselines, len(said))
        held = self.quality("holdout", progress="hold-out") if "holdout" in self.splits else None
        asked, sections = self._questions_report() if "test questions" in self.splits else (None, [])
        if self.world.main:
            show(folder, figures, samples, scenes, said, self.options.samples, sections)
        figures |= {"holdout": held, "answers": asked, "better_than_blind": not self.blind}
        return figures | {"cut_short": self.pace.cut}

    def _questions_report(self) -> tuple[dict[str, Any], list[tuple[str, list[str]]]]:
        """(figures of the questions of the test split, sections of the page of samples)."""
        samples = self.splits["test questions"].questions.samples
        scored = self.report("test questions", progress="questions")
        baselines = blind_baselines(samples, [sample for sample in self.data.samples["train"] if sample.question])
        shuffled = self.report("test questions", shuffled=True, progress="questions, shuffled images")
        baselines["shuffled_images"] = shuffled.accuracy
        figures = {"accuracy": scored.accuracy, "accuracy_by_family": scored.by_family, "baselines": baselines}
        return figures, answer_sections(samples, scored.answers, self.data.family, self.options.samples)

    def lines(self, summary: dict[str, Any]) -> list[str]:
        rows = {"test": summary, "hold-out": summary["holdout"]}
        rows |= {name.replace("_", " "): figures for name, figures in summary["baselines"].items()}
        lines = [f"{name:20s} {', '.join(in_words(figures))}" for name, figures in rows.items() if figures]
        if summary["answers"]:
            families = ", ".join(f"{k} {v:.3f}" for k, v in summary["answers"]["accuracy_by_family"].items())
            lines.append(f"{'answers':20s} {summary['answers']['accuracy']:.3f} ({families})")
        return [*lines, *cut_short(summary), *self.blind]

    # --------------------------------------------------------------------------------------------------- answers

    def ask(
        self, image: str | Path, question: str | None, top: int | None = None, decoding: dict[str, Any] | None = None
    ) -> tuple[list[Answer], list[str]]:
        """A caption without a question, an answer with one."""
        if top is not None:
            raise UserError(f"{self.folder} writes one text and ranks no list of them: leave out --top")
        return super().ask(image, question, decoding=decoding)

    def answer(self, samples: Sequence[VQASample], limit: int | None = None, **how: Any) -> Answers:
        self.check_answers_questions()
        return super().answer(samples, limit, **how)

    def check_answers_questions(self) -> None:
        """Raise UserError unless the model was trained on questions too."""
        if not self.options.question_share:
            raise UserError(
                f"{self.folder} was trained to describe images alone; --question-share trains one that answers too"
            )

    def checked(self, question: str | None) -> str:
        """The question, or "" for None, which asks for a caption. Raises UserError for one it cannot answer."""
        if question is None:
            return ""
        self.check_answers_questions()
        return check_question(question)

    def describe(self, data: Path, split: str, limit: int | None) -> dict[str, Any]:
        """Describe a split, or its first `limit` images, and score it like the test split of the run."""
        samples = to_describe(read_texts(data, split, seed=self.options.seed, verbose=True))[:limit]
        drawn = scenes_file(data, split)
        figures, _ = report(samples, read_scenes(drawn) if drawn.is_file() else None, partial(super().answer, samples))
        return {"data": str(data), "split": split, "images": len(samples)} | figures

    def policy(self, options: Any, dtype: torch.dtype) -> Any:
        """Only a run that answers questions can be tuned."""
        from vqa_scratch.systems.policy import answering_task  # it brings rl/, which rlhf.py alone needs

        self.check_answers_questions()
        return answering_task(self, options, dtype)
