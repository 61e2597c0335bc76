"""Visual question answering: image encoder, text encoder, connector, and a decoder that writes the answer.

Preset `shapes` trains small random models on the built-in data set; `book` starts from released ones
(`systems/vqa_models.py`).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from vqa_scratch.data.answers import Answer
from vqa_scratch.data.batches import Batch, Questions
from vqa_scratch.errors import UserError
from vqa_scratch.models.vqa import FROZEN_PARTS, VQAModel
from vqa_scratch.options import from_json, rules_of
from vqa_scratch.storage import read_json, write_json
from vqa_scratch.systems.answering import How
from vqa_scratch.systems.assembly import WithoutNumbers, check_positions, grid_of
from vqa_scratch.systems.base import RunData, seed_everything
from vqa_scratch.systems.finals import Pass
from vqa_scratch.systems.frozen import cache_features
from vqa_scratch.systems.options import VQAOptions
from vqa_scratch.systems.questions import QuestionSystem
from vqa_scratch.systems.run_folder import CONFIG, PROGRAM, check_trainable
from vqa_scratch.systems.scoring import common_answers
from vqa_scratch.systems.splits import ANY_SAMPLE, augment_of
from vqa_scratch.systems.vqa_models import check_connector, released_models, small_models
from vqa_scratch.systems.writer import WritingSystem
from vqa_scratch.systems.writing import choose
from vqa_scratch.training.precision import Precision

CANDIDATES = "answers.json"  # in the run folder: the training answers to choose from, the most frequent first
CANDIDATES_KEPT = 1000
# Limits on the questions that are ranked too, and on questions times candidates: each pair is a pass.
RANKED_QUESTIONS, RANKED_PAIRS = 2_000, 120_000


class VQASystem(WritingSystem[VQAOptions], QuestionSystem[VQAOptions, VQAModel, Questions]):
    """Questions about images, answered by a decoder."""

    candidates: list[str]  # training answers that it can also choose from; empty in runs of older versions

    # ------------------------------------------------------------------------------------------- build, save, open

    @classmethod
    def check(cls, options: VQAOptions) -> None:
        if options.feature_cache and "image" in FROZEN_PARTS[options.freeze] and augment_of(options):
            raise UserError("--feature-cache keeps one encoding of each image: leave it out, or the augmentation")
        if options.start_from is not None:
            return
        check_connector(options)
        if options.preset == "shapes":
            with WithoutNumbers():
                small_models(options, [ANY_SAMPLE])

    @classmethod
    def build(cls, options: VQAOptions, data: RunData, precision: Precision) -> Self:
        seed_everything(options.seed)
        if options.start_from is not None:
            system = cls.continued(options, options.start_from, precision)
        else:
            make = small_models if options.preset == "shapes" else released_models
            system = cls(options, *make(options, data.samples["train"]), precision)
        system.candidates = common_answers(data.samples["train"], CANDIDATES_KEPT)
        return system

    @classmethod
    def continued(cls, options: VQAOptions, folder: Path, precision: Precision) -> Self:
        """The system of the finished run in `folder`, with its sizes and tokenizers, to train on other data.

        Raises UserError if it is a run of another preset, or if its model has too few positions for the options.
        """
        config = check_trainable(folder)
        kind = config["train"].get("preset") if config["program"] == PROGRAM else config["program"]
        if kind != options.preset:
            raise UserError(f"--start-from {folder} is a run of {kind}; it should be one of --preset {options.preset}")
        theirs = from_json(VQAOptions, config["train"], str(folder / CONFIG))
        kept = [name for name, rules in rules_of(VQAOptions).items() if "start_from" in rules.only]
        prompt = options.question_prompt or theirs.question_prompt
        options = replace(options, **{name: getattr(theirs, name) for name in kept}, question_prompt=prompt)
        check_connector(options)
        system = cls.load(folder, config["model"], options, precision)
        model = system.model
        prefix = model.connector.prefix_length(grid_of(model.image, system.processor), model.connector.sizes)
        written = ["max_question_tokens", "max_answer_tokens"] if prompt else ["max_answer_tokens"]
        check_positions(options, written, model.decoder.config.max_positions - prefix, str(folder))
        if model.text is not None:
            check_positions(options, ["max_question_tokens"], model.text.longest, str(folder))
        return system

    @classmethod
    def open(cls, folder: Path, sizes: dict[str, Any], options: VQAOptions, precision: Precision) -> Self:
        system = super().open(folder, sizes, options, precision)
        system.candidates = read_candidates(folder / CANDIDATES) if (folder / CANDIDATES).is_file() else []
        return system

    def save(self, folder: Path) -> None:
        super().save(folder)
        if self.candidates:
            write_json(folder / CANDIDATES, self.candidates)

    # --------------------------------------------------------------------------------------------------- training

    def train_on(self, data: RunData) -> None:
        options = self.options
        self.trainable = self.model.freeze(options.freeze)
        self.question_loss = options.question_loss_steps if options.question_loss else 0
        super().train_on(data)

    def about(self) -> list[str]:
        cut = self.tokenizers.cut
        return [self.trainable, f"cut to the token limits: {cut['questions']} questions, {cut['answers']} answers"]

    def precompute(self) -> None:
        for features in cache_features(self) if self.options.feature_cache else ():
            features.ready()

    # ---------------------------------------------------------------------------------------------------- answers

    def respond(self, questions: Questions, rows: np.ndarray, batch: Batch, how: How) -> list[list[Answer]]:
        """One written answer each, or if `how.ranked` the best of the training answers."""
        if how.ranked:
            return choose(self, questions, rows, self.condition(batch), self.candidates, how.top)
        return super().respond(questions, rows, batch, how)

    def ask(
        self, image: str | Path, question: str | None, top: int | None = None, decoding: dict[str, Any] | None = None
    ) -> tuple[list[Answer], list[str]]:
        if top is not None and decoding:
            flag = "--" + next(iter(decoding)).replace("_", "-")
            raise UserError(f"--top chooses from a list and decodes nothing: leave out {flag}")
        if top is not None and not self.candidates:
            raise UserError(f"{self.folder} has no {CANDIDATES} to choose from, so leave out --top")
        return super().ask(image, question, top, decoding)

    @property
    def ranked_questions(self) -> int:
        return min(RANKED_QUESTIONS, max(1, RANKED_PAIRS // len(self.candidates))) if self.candidates else 0

    def passes(self) -> list[Pass]:
        return [*super().passes(), Pass("ranking", self.judged, self.ranked_questions, ranked=True)]

    def finish(self, folder: Path) -> dict[str, Any]:
        """Adds how well the model chooses among the training answers."""
        figures = super().finish(folder)
        ranking = self.report(self.judged, self.ranked_questions, progress="ranking", ranked=True)
        return figures | {
            "generation_accuracy": figures["accuracy"],
            "ranking_accuracy": ranking.accuracy,
            "ranking_questions": len(ranking.answers),
            "ranking_candidates": len(self.candidates),
            "connector": self.options.connector,
            "cut_short": self.pace.cut,
        }

    def lines(self, summary: dict[str, Any]) -> list[str]:
        figures, among, over = (summary[f"ranking_{name}"] for name in ("accuracy", "candidates", "questions"))
        line = f"ranking_accuracy     {figures:.4f} (the best of {among} answers, first {over} questions)"
        return [*super().lines(summary), line]

    def policy(self, options: Any, dtype: torch.dtype) -> Any:
        from vqa_scratch.systems.policy import answering_task  # it brings rl/, which rlhf.py alone needs

        return answering_task(self, options, dtype)


def read_candidates(path: Path) -> list[str]:
    """The candidates of a run. Raises UserError if the file is not a list of answers."""
    answers = read_json(path)
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a for a in answers):
        raise UserError(f"{path} is not a list of answers, as train.py writes it")
    return answers
