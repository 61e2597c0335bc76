"""A finished run of the first system, for the commands: it writes answers, or chooses among the training answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from vqa_scratch.data.batches import Images, Questions
from vqa_scratch.data.text import check_question
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.run import Run, open_run
from vqa_scratch.storage import read_json
from vqa_scratch.systems.options import VQAOptions
from vqa_scratch.systems.vqa_export import export_run
from vqa_scratch.training.evaluation import AT_ONCE, Answer, answer_samples, rank_answers
from vqa_scratch.training.precision import Precision

ANSWERS = "answers.json"  # of a run folder: the training answers to choose from, the most frequent first
# Questions that are also ranked: at most so many, and so many times candidates; a pass per question and candidate.
RANKED_QUESTIONS, RANKED_PAIRS = 2_000, 120_000


def ranked_questions(candidates: int) -> int:
    """How many questions the figures of ranking are taken over."""
    return min(RANKED_QUESTIONS, max(1, RANKED_PAIRS // candidates))


class TrainedVQA(Run):
    """A finished run, for the commands."""

    decodes: ClassVar[bool] = True

    def ask(
        self, image: Path, question: str | None, top: int | None, decoding: Mapping[str, Any] | None = None
    ) -> tuple[list[Answer], list[str]]:
        """Writes one answer, decoded as `decoding` says; with `top`, chooses that many from the training answers."""
        if question is None:
            raise UserError(f"{self.folder} answers questions: give it --question")
        if top is not None and decoding:
            flag = "--" + next(iter(decoding)).replace("_", "-")
            raise UserError(f"--top chooses from a list, nothing is decoded: leave out {flag}")
        question = check_question(question)
        sample = VQASample(0, image, 0, question, "", "", (), "")
        if top is not None and not (self.folder / ANSWERS).is_file():
            raise UserError(f"{self.folder} has no {ANSWERS} to choose from, so leave out --top")
        if top is None:
            said = [self.answer([sample], None, decoding=decoding)[0]]
        else:
            said = self._ranked([sample], None, None, top)[0]
        return said, self.encoder.notes_on(question)

    def _candidates(self) -> list[str]:
        path = self.folder / ANSWERS
        answers = read_json(path)
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a for a in answers):
            raise UserError(f"{path} is not a list of answers, as train.py writes it")
        return answers

    def _ranked(
        self, samples: Sequence[VQASample], limit: int | None, progress: str | None, top: int
    ) -> dict[int, list[Answer]]:
        """The best training answers to about the first `limit` samples, by question id."""
        questions = Questions(samples, self.encoder)
        images = Images(questions.image_paths, self.processor)
        batches = questions.in_order(limit or len(samples), AT_ONCE)
        return rank_answers(
            self.model, questions, images, self.precision, batches, self._candidates(), top=top, progress=progress
        )

    def ranking(
        self, samples: Sequence[VQASample], limit: int | None, *, progress: str | None = None
    ) -> dict[int, Answer]:
        """The best training answer to as many of the first `limit` samples as are ranked, by question id."""
        if not (self.folder / ANSWERS).is_file():  # a run from before there was such a list
            return {}
        limit = min(limit or len(samples), ranked_questions(len(self._candidates())))
        return {number: best for number, (best,) in self._ranked(samples, limit, progress, 1).items()}

    def answer(
        self,
        samples: Sequence[VQASample],
        limit: int | None,
        *,
        shuffled: bool = False,
        progress: str | None = None,
        decoding: Mapping[str, Any] | None = None,
    ) -> dict[int, Answer]:
        options = {"limit": limit, "shuffled": shuffled, "progress": progress, "decoding": decoding}
        return answer_samples(self.model, samples, self.encoder, self.processor, self.precision, **options)

    def figures(self, answers: dict[int, Answer]) -> dict[str, float]:
        return {
            "eos_rate": sum(a.ended for a in answers.values()) / len(answers),
            "mean_answer_tokens": sum(a.tokens for a in answers.values()) / len(answers),
        }

    def export(self, folder: Path) -> list[str]:
        return export_run(self, folder)


def open_trained(folder: Path, values: dict[str, Any], config: VQAOptions, precision: Precision) -> TrainedVQA:
    return TrainedVQA(**vars(open_run(folder, values, config, precision)))
