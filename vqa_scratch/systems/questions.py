"""What the systems that answer questions share: their data, the batches of an epoch, and the final report."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vqa_scratch.data.scenes import FAMILY_OF_TYPE
from vqa_scratch.data.shapes import ShapesSpec, ensure_shapes
from vqa_scratch.data.tables import TABLES
from vqa_scratch.data.text import check_question
from vqa_scratch.data.vqa_files import subtype_of
from vqa_scratch.data.vqa_v2 import VQASample, check_splits, read_vqa, split_by_image
from vqa_scratch.errors import UserError
from vqa_scratch.report.gallery import write_gallery
from vqa_scratch.systems.options import QuestionOptions, RunOptions
from vqa_scratch.systems.scoring import blind_baselines
from vqa_scratch.systems.splits import SplitSystem
from vqa_scratch.training.ranks import World


@dataclass(frozen=True)
class QuestionData:
    """Samples by split ("train", "val", "test", and "holdout" where there is one); `family` names a sample's family."""

    samples: dict[str, list[VQASample]]
    family: Callable[[VQASample], str]


def family_of(folder: Path) -> Callable[[VQASample], str]:
    """A function from a question to its family: that of the built-in data set, else the official answer type."""
    if any(folder.glob("scenes_*.json")):
        return lambda sample: FAMILY_OF_TYPE[sample.question_type]
    return lambda sample: sample.answer_type or "unknown"


def first_images(samples: list[VQASample], number: int | None) -> list[VQASample]:
    """The samples of the first `number` images, all of them if it is None."""
    kept = set(list(dict.fromkeys(sample.image_id for sample in samples))[:number])
    return [sample for sample in samples if sample.image_id in kept]


def built_in(options: RunOptions) -> Path:
    """The folder of the built-in data set, which is drawn if it is missing. Raises UserError for a split it lacks."""
    known = [name for split in ShapesSpec().splits() for name in (split, subtype_of(split))]
    strange = [split for split in options.splits if split not in known and Path(split).suffix.lower() not in TABLES]
    if strange:
        raise UserError(f"the built-in data set has no split {', '.join(strange)}; give --data, the folder that has it")
    return ensure_shapes(options.cache, ShapesSpec(seed=options.seed))


def read_questions(options: QuestionOptions) -> QuestionData:
    """Read every split the run needs; draw the built-in data set first if no `--data` is given."""
    folder = options.data or built_in(options)
    check_splits(folder, options.splits)
    limits = "start_at end_at max_images max_questions min_agreement verify_images".split()
    train = read_vqa(folder, options.train_split, **{name: getattr(options, name) for name in limits})
    print(train.report)
    samples = {"train": train.samples}
    if options.val_split == "auto":
        shares = (1 - options.val_fraction, options.val_fraction)
        samples["train"], samples["val"] = split_by_image(train.samples, shares, options.seed)
    else:
        samples["val"] = read_vqa(folder, options.val_split, verify_images=options.verify_images).samples
    if options.test_split == options.val_split:
        samples["test"] = samples["val"]
    else:
        samples["test"] = read_vqa(folder, options.test_split, verify_images=options.verify_images).samples
    samples["test"] = first_images(samples["test"], options.test_images)
    if (folder / "scenes_holdout.json").exists():
        samples["holdout"] = read_vqa(folder, "holdout").samples
    return QuestionData(samples, family_of(folder))


class QuestionSystem(SplitSystem):
    """A system that trains on questions grouped by image, and is scored by official accuracy beside blind baselines.

    A subclass adds the model, `loss`, and `respond`: how it answers.
    """

    data: QuestionData

    @classmethod
    def read(cls, options: QuestionOptions) -> QuestionData:
        return read_questions(options)

    @classmethod
    def samples_of(cls, data: QuestionData) -> dict[str, list[VQASample]]:
        return data.samples

    # ------------------------------------------------------------------------------------------------- training

    def train_on(self, data: QuestionData) -> None:
        self.data = data
        self.make_splits(data.samples)
        self.baselines = blind_baselines(data.samples["test"], data.samples["train"])

    def epoch(self, number: int) -> list[np.ndarray]:
        options = self.options
        per_step, per_image = options.questions_per_step, options.questions_per_image
        return self.splits["train"].questions.epoch(options.seed, number, per_step, per_image)

    def share(self, key: np.ndarray, world: World) -> tuple[np.ndarray, bool]:
        """The rows of this rank's images; if there are more ranks than images, the rows of one image and False."""
        images = self.splits["train"].questions.by_image(key)
        mine = world.share(images)
        return np.concatenate(mine or images[:1]), bool(mine)

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
            "title": "accuracy on held-out scenes",
            "lines": {"validation": [row["accuracy"] for row in figures]},
            "hlines": {name.replace("_", " "): value for name, value in self.baselines.items()},
        }
        by_family = {name.split("/", 1)[1]: [row.get(name) for row in figures] for name in families}
        panels = [accuracy, {"title": "by family", "lines": by_family}]
        return [{**panel, "ylabel": "official VQA accuracy"} for panel in panels]

    def finish(self, folder: Path) -> dict[str, Any]:
        """Score the test split, the same with shuffled images, and the hold-out where there is one; samples.html."""
        test = self.report("test", progress="test")
        if self.world.main:
            title = f"What the model answers ({self.options.preset}, accuracy {test.accuracy:.3f})"
            samples, number = self.data.samples["test"], self.options.samples
            write_gallery(folder / "samples.html", samples, test.answers, self.data.family, number, title)
        self.baselines["shuffled_images"] = self.report("test", shuffled=True, progress="shuffled images").accuracy
        holdout = self.report("holdout", progress="hold-out") if "holdout" in self.splits else None
        return {
            "accuracy": test.accuracy,
            "accuracy_by_family": test.by_family,
            "holdout_accuracy": holdout.accuracy if holdout else None,
            "holdout_accuracy_by_family": holdout.by_family if holdout else None,
            "baselines": self.baselines,
        }

    def lines(self, summary: dict[str, Any]) -> list[str]:
        by_family, baselines = summary["accuracy_by_family"], summary["baselines"]
        return [
            *(f"{n:20s} {summary[n]:.4f}" for n in ("accuracy", "holdout_accuracy") if summary[n] is not None),
            "by family            " + ", ".join(f"{k} {v:.3f}" for k, v in by_family.items()),
            "blind baselines      " + ", ".join(f"{k} {v:.3f}" for k, v in baselines.items()),
        ]

    def checked(self, question: str | None) -> str:
        if question is None:
            raise UserError(f"{self.folder} answers questions: give it --question")
        return check_question(question)
