"""What the systems that answer questions share: the samples of their splits, and the job around a model's answers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from vqa_scratch.data.batches import Images, Questions
from vqa_scratch.data.feature_store import ImageFeatures, TextFeatures
from vqa_scratch.data.shapes import FAMILY_OF_TYPE, ShapesSpec, ensure_shapes
from vqa_scratch.data.vqa_v2 import VQASample, read_vqa, split_by_image
from vqa_scratch.report.curves import moving_average
from vqa_scratch.report.gallery import write_gallery
from vqa_scratch.systems.options import QuestionOptions
from vqa_scratch.training.distributed import World
from vqa_scratch.training.evaluation import Answer, QuestionOnly, Report, TypePrior, blind, other_images, score
from vqa_scratch.training.precision import Precision

# what answers: split, batches, image map, label of the bar -> answers by question id
Answering = Callable[[str, Sequence[np.ndarray], np.ndarray | None, str | None], dict[int, Answer]]


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


def first_images(samples: list[VQASample], number: int | None) -> list[VQASample]:
    """The samples of the first `number` images, all of them if it is None."""
    kept = set(list(dict.fromkeys(sample.image_id for sample in samples))[:number])
    return [sample for sample in samples if sample.image_id in kept]


def read_splits(config: QuestionOptions) -> Splits:
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
        verify_images=config.verify_images,
    )
    print(train.report)
    samples = {"train": train.samples}
    if config.val_split == "auto":
        samples["train"], samples["val"] = split_by_image(
            train.samples, (1 - config.val_fraction, config.val_fraction), config.seed
        )
    else:
        samples["val"] = read_vqa(folder, config.val_split, verify_images=config.verify_images).samples
    if config.test_split == config.val_split:
        samples["test"] = samples["val"]
    else:
        samples["test"] = read_vqa(folder, config.test_split, verify_images=config.verify_images).samples
    samples["test"] = first_images(samples["test"], config.test_images)
    if (folder / "scenes_holdout.json").exists():
        samples["holdout"] = read_vqa(folder, "holdout").samples
    return Splits(Path(folder), samples, family_of(Path(folder)))


class QuestionJob(ABC):
    """Training on questions grouped by image, and official accuracy with blind baselines in the end.

    A system adds `batch`, `size` and `loss` for the loop, `answers`, and how its parts are saved.
    """

    unit = "questions"
    world = World()  # train.py sets it
    kept: Sequence[ImageFeatures | TextFeatures] = ()  # what a system keeps of its frozen parts
    loss_unit: str  # what one unit of the training loss is, for the curve's axis

    def __init__(
        self,
        config: QuestionOptions,
        model: nn.Module,
        splits: Splits,
        questions: dict[str, Questions],
        images: dict[str, Images],
        precision: Precision,
    ) -> None:
        self.config, self.model, self.splits, self.precision = config, model, splits, precision
        self.questions, self.images = questions, images
        if config.image_cache:
            for some in images.values():
                some.cache_in(config.cache)
        samples = splits.samples
        self.baselines = {
            "prior": blind(samples["test"], TypePrior(samples["train"])),
            "question_only": blind(samples["test"], QuestionOnly(samples["train"])),
        }

    @abstractmethod
    def answers(
        self, split: str, batches: Sequence[np.ndarray], image_map: np.ndarray | None, progress: str | None
    ) -> dict[int, Answer]:
        """The model's answers by question id to the rows in `batches`; arguments as in `answer_questions`."""

    def precompute(self) -> None:
        for features in self.kept:
            features.ready()

    def epoch(self, number: int) -> list[np.ndarray]:
        config = self.config
        return self.questions["train"].epoch(config.seed, number, config.questions_per_step, config.questions_per_image)

    def share(self, key: np.ndarray, world: World) -> tuple[np.ndarray, bool]:
        """The rows of this rank's images; those of one image and False where there are more ranks than images."""
        images = self.questions["train"].by_image(key)
        mine = world.share(images)
        return np.concatenate(mine or images[:1]), bool(mine)

    def ids(self, batch: Any) -> list[int]:
        samples = self.questions["train"].samples
        return [samples[row].question_id for row in batch.rows.tolist()]

    def report(
        self,
        split: str,
        limit: int | None = None,
        *,
        shuffled: bool = False,
        progress: str | None = None,
        answers: Answering | None = None,
    ) -> Report:
        """Score a split, or about its first `limit` questions; `shuffled` shows every question another image.

        `answers` answers in place of `self.answers`. Ranks take turns at the batches and put their answers together, so
        that all of them get the same report.
        """
        questions = self.questions[split]
        batches = questions.in_order(limit or len(questions.samples), 2 * self.config.questions_per_step)
        swap = other_images(len(questions.image_paths)) if shuffled else None
        mine = (answers or self.answers)(split, batches[self.world.rank :: self.world.size], swap, progress)
        answers = {number: answer for some in self.world.gather(mine) for number, answer in some.items()}
        return score(questions.samples, answers, self.splits.family)

    def evaluate(self) -> dict[str, float]:
        report = self.report("val", self.config.eval_questions)
        return {"accuracy": report.accuracy, **{f"accuracy/{k}": v for k, v in report.by_family.items()}}

    def panels(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Loss, validation accuracy, and accuracy by family, over the questions seen."""
        steps = [row for row in rows if "loss" in row]
        evaluations = [row for row in rows if "val" in row]
        seen = [row["samples"] / 1000 for row in evaluations]
        families = sorted({k for row in evaluations for k in row["val"] if k.startswith("accuracy/")})
        loss = moving_average([row["loss"] for row in steps], 5)
        axis = {"xlabel": "thousand questions seen"}
        scored = axis | {"ylabel": "official VQA accuracy", "ylim": (0, 1.02)}
        return [
            {
                "title": "training loss",
                "ylabel": self.loss_unit,
                "lines": {"loss": ([row["samples"] / 1000 for row in steps], loss)},
                "log": True,
                **axis,
            },
            {
                "title": "accuracy on held-out scenes",
                "lines": {"validation": (seen, [row["val"]["accuracy"] for row in evaluations])},
                "hlines": {name.replace("_", " "): value for name, value in self.baselines.items()},
                **scored,
            },
            {
                "title": "by family",
                "lines": {k.split("/", 1)[1]: (seen, [row["val"].get(k) for row in evaluations]) for k in families},
                **scored,
            },
        ]

    def finish(self, folder: Path) -> dict[str, Any]:
        """Score the test split, the same with shuffled images, and the hold-out where there is one; samples.html."""
        test = self.report("test", progress="test")
        if self.world.main:
            write_gallery(
                folder / "samples.html",
                self.splits.samples["test"],
                test.answers,
                self.splits.family,
                self.config.samples,
                f"What the model answers ({self.config.preset}, accuracy {test.accuracy:.3f})",
            )
        self.baselines["shuffled_images"] = self.report("test", shuffled=True, progress="shuffled images").accuracy
        holdout = self.report("holdout", progress="hold-out") if "holdout" in self.splits.samples else None
        return {
            "accuracy": test.accuracy,
            "accuracy_by_family": test.by_family,
            "holdout_accuracy": holdout.accuracy if holdout else None,
            "holdout_accuracy_by_family": holdout.by_family if holdout else None,
            "baselines": self.baselines,
        }

    def lines(self, summary: dict[str, Any]) -> list[str]:
        """The figures of `finish` that the terminal shows."""
        by_family, baselines = summary["accuracy_by_family"], summary["baselines"]
        return [
            *(f"{n:20s} {summary[n]:.4f}" for n in ("accuracy", "holdout_accuracy") if summary[n] is not None),
            "by family            " + ", ".join(f"{k} {v:.3f}" for k, v in by_family.items()),
            "blind baselines      " + ", ".join(f"{k} {v:.3f}" for k, v in baselines.items()),
        ]
