"""What the systems that answer questions share: their data, the batches of an epoch, and the final report."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from vqa_scratch.data.descriptions import scenes_file
from vqa_scratch.data.scenes import FAMILY_OF_TYPE
from vqa_scratch.data.shapes import ShapesSpec, ensure_shapes
from vqa_scratch.data.tables import TABLES
from vqa_scratch.data.text import check_question
from vqa_scratch.data.vqa_files import first_images, subtype_of
from vqa_scratch.data.vqa_v2 import (
    VQASample,
    check_splits,
    has_split,
    is_official,
    is_shared_out,
    read_vqa,
    split_by_image,
    summary,
)
from vqa_scratch.data.vqa_write import write_submission
from vqa_scratch.errors import UserError
from vqa_scratch.report.gallery import write_gallery
from vqa_scratch.systems.answering import AnsweringSystem
from vqa_scratch.systems.base import M, RunData
from vqa_scratch.systems.finals import Pass, against_blind, cut_short
from vqa_scratch.systems.options import QuestionOptions
from vqa_scratch.systems.run_options import ImageOptions
from vqa_scratch.systems.scoring import blind_baselines, rules_of
from vqa_scratch.systems.splits import Key, Q

QO = TypeVar("QO", bound=QuestionOptions)


def family_of(folder: Path) -> Callable[[VQASample], str]:
    """A function from a question to its family: that of the built-in data set, else the official answer type."""
    if any(folder.glob("scenes_*.json")):
        return lambda sample: FAMILY_OF_TYPE[sample.question_type]
    return lambda sample: sample.answer_type or "unknown"


def split_names(source: Path, options: QuestionOptions) -> tuple[str, str, str]:
    """The splits to train on, to choose the best weights by, and to test on; with a line on each that the source lacks.

    A table without validation gives some of its training images to it; one without a test is judged on validation. The
    files of VQA v2 have all splits, or are incomplete.
    """
    train, val, test = options.train_split, options.val_split, options.test_split
    if not source.exists() or is_official(source, (train, val, test)):
        return train, val, test
    tables = [Path(name).suffix.lower() in TABLES for name in (val, test)]
    if is_shared_out(source) and (train == "all" or any(tables)):
        val = val if tables[0] else "auto"
        return "all", val, test if tables[1] else val
    if val == "val" and not has_split(source, val):
        print(f"no val split: {options.val_fraction:.0%} of the training images are held out for it")
        val = "auto"
    if test == "test" and not has_split(source, test):
        print("no test split: the final figures are those of the val split")
        test = val
    return train, val, test


def built_in(options: ImageOptions) -> Path:
    """The folder of the built-in data set, which is drawn if it is missing. Raises UserError for a split it lacks."""
    known = [name for split in ShapesSpec().splits() for name in (split, subtype_of(split))]
    strange = [split for split in options.splits if split not in known and Path(split).suffix.lower() not in TABLES]
    if strange:
        raise UserError(f"the built-in data set has no split {', '.join(strange)}; give --data, the folder that has it")
    return ensure_shapes(options.cache, ShapesSpec(seed=options.seed))


def read_questions(options: QuestionOptions) -> RunData:
    """Read every split the run needs; draw the built-in data set first if no `--data` is given."""
    source = options.data or built_in(options)
    read = partial(read_vqa, source, verify_images=options.verify_images, cache=options.cache, keep=True)
    limits = "start_at end_at max_images max_questions min_agreement".split()
    train_split, *scored = split_names(source, options)
    check_splits(source, {train_split, *scored} - {"auto", "all"})
    train = read(train_split, **{name: getattr(options, name) for name in limits})
    print(train.report)
    samples = with_scored(train.samples, scored, lambda split: read(split).samples, options)
    print(f"data: {summary([sample for split in samples.values() for sample in split])}")
    if scenes_file(source, "holdout").is_file():
        samples["holdout"] = read("holdout").samples
    return RunData(samples, family_of(source))


def with_scored(
    train: list[VQASample], scored: Sequence[str], read: Callable[[str], list[VQASample]], options: ImageOptions
) -> dict[str, list[VQASample]]:
    """The samples of train, and those of val and test, which are the splits `scored` of the data; "auto" takes some of
    train for val."""
    val, test = scored
    held_out = hold_out(train, options.val_fraction, options.seed) if val == "auto" else (train, read(val))
    samples = dict(zip(("train", "val"), held_out, strict=True))
    samples["test"] = first_images(samples["val"] if test == val else read(test), options.test_images)
    return samples


def hold_out(samples: list[VQASample], fraction: float, seed: int) -> tuple[list[VQASample], list[VQASample]]:
    """(the samples to train on, those on about that share of the images). Raises UserError on a single image."""
    train, held = split_by_image(samples, (1 - fraction, fraction), seed)
    images = dict.fromkeys(sample.image_id for sample in samples)
    if len(images) < 2:
        raise UserError("one image is too few to train and to validate on: give more, or a --val-split")
    if not train or not held:  # so few images that chance left out one side
        first = next(iter(images))
        train, held = ([s for s in samples if (s.image_id == first) == wanted] for wanted in (False, True))
    return train, held


class QuestionSystem(AnsweringSystem[QO, M, Q], Generic[QO, M, Q]):
    """A system that trains on questions grouped by image, and is scored by official accuracy beside blind baselines.

    A subclass adds the model, `loss`, and `respond`: how it answers.
    """

    @classmethod
    def read(cls, options: QO) -> RunData:
        return read_questions(options)

    # ------------------------------------------------------------------------------------------------- training

    def train_on(self, data: RunData) -> None:
        self.data = data
        self.make_splits(data.samples)
        self.judged = "test" if data.samples["test"][0].answers else "val"  # the split of the final figures

    @cached_property
    def baselines(self) -> dict[str, float]:
        """The accuracies of blind predictors, which take a second to learn: not before they are shown."""
        return blind_baselines(self.data.samples[self.judged], self.data.samples["train"])

    def epoch(self, number: int) -> list[Key]:
        options = self.options
        per_step, per_image = options.questions_per_step, options.questions_per_image
        batches = self.splits["train"].questions.epoch(options.seed, number, per_step, per_image)
        before = number * len(batches)  # in each epoch as many
        return [Key(rows, (options.seed, number, 1, n), step=before + n) for n, rows in enumerate(batches)]

    # ----------------------------------------------------------------------------------------------- evaluation

    def at_once(self, name: str) -> int:
        return 2 * self.options.questions_per_step

    def evaluate(self) -> dict[str, float]:
        report = self.report("val", self.options.eval_questions)
        return {"accuracy": report.accuracy, **{f"accuracy/{k}": v for k, v in report.by_family.items()}}

    def scored(self, figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Validation accuracy beside the blind baselines, and accuracy by family."""
        families = sorted({name for row in figures for name in row if name.startswith("accuracy/")})
        accuracy = {
            "title": "accuracy on held-out images",
            "lines": {"validation": [row["accuracy"] for row in figures]},
            "hlines": {name.replace("_", " "): value for name, value in self.baselines.items()} if figures else {},
        }
        by_family = {name.split("/", 1)[1]: [row.get(name) for row in figures] for name in families}
        panels = [accuracy, {"title": "by family", "lines": by_family}]
        return [{**panel, "ylabel": "official VQA accuracy"} for panel in panels]

    def passes(self) -> list[Pass]:
        size = {name: len(split.questions.samples) for name, split in self.splits.items()}
        final = {self.judged: self.judged, "shuffled images": self.judged, "hold-out": "holdout"}
        known = [Pass(label, name, size[name]) for label, name in final.items() if name in size]
        return [Pass("", "val", min(size["val"], self.options.eval_questions)), *known]

    def finish(self, folder: Path) -> dict[str, Any]:
        """Score the test split, the same with shuffled images, and the hold-out where there is one; samples.html.

        A test split without answers is answered, into submission.json, and the validation split is scored instead.
        """
        samples, number = self.data.samples[self.judged], self.options.samples
        if self.judged != "test":
            said = self.answer_split("test")  # all of it, however long that takes
            if self.world.main:
                texts = {number: answer.text for number, answer in said.items()}
                write_submission(folder / "submission.json", texts, texts)
        test = self.report(self.judged, progress=self.judged)
        if self.world.main:
            title = f"What the model answers ({self.options.preset}, accuracy {test.accuracy:.3f})"
            write_gallery(folder / "samples.html", samples, test.answers, self.data.family, number, title)
        shuffled = self.report(self.judged, shuffled=True, progress="shuffled images")
        self.baselines["shuffled_images"] = shuffled.accuracy
        self.blind = against_blind("accuracy", test.accuracy, self.baselines, len(test.answers))
        holdout = self.report("holdout", progress="hold-out") if "holdout" in self.splits else None
        return {
            "accuracy": test.accuracy,
            "accuracy_lenient": test.lenient,
            "scored_by": rules_of(samples),
            "scored_split": self.judged,
            "accuracy_by_family": test.by_family,
            "holdout_accuracy": holdout.accuracy if holdout else None,
            "holdout_accuracy_by_family": holdout.by_family if holdout else None,
            "baselines": self.baselines,
            "better_than_blind": not self.blind,
            "cut_short": self.pace.cut,
        }

    def lines(self, summary: dict[str, Any]) -> list[str]:
        by_family, baselines = summary["accuracy_by_family"], summary["baselines"]
        unscored = "the test split has no answers: it is answered in submission.json; these are the figures of val"
        return [
            *([unscored] if summary["scored_split"] != "test" else []),
            *(f"{n:20s} {summary[n]:.4f}" for n in ("accuracy", "holdout_accuracy") if summary[n] is not None),
            f"scored by            {summary['scored_by']}",
            "by family            " + ", ".join(f"{k} {v:.3f}" for k, v in by_family.items()),
            "blind baselines      " + ", ".join(f"{k} {v:.3f}" for k, v in baselines.items()),
            *cut_short(summary),
            *self.blind,
        ]

    def checked(self, question: str | None) -> str:
        if question is None:
            raise UserError(f"{self.folder} answers questions: give it --question")
        return check_question(question)
