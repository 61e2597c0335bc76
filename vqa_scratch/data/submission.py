"""Result files as the VQA v2 evaluation server takes them: a JSON list of {"question_id", "answer"}."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from vqa_scratch.data.vqa_files import fields
from vqa_scratch.errors import UserError
from vqa_scratch.storage import read_json, write_json


def write_submission(path: str | Path, answers: Mapping[int, str], expected_ids: Iterable[int]) -> None:
    """Writes the result file that the evaluation server takes: [{"question_id": int, "answer": str}, ...] by id.

    Raises ValueError unless `answers` covers exactly `expected_ids`, as the server demands.
    """
    expected = set(expected_ids)
    missing, extra = sorted(expected - answers.keys()), sorted(answers.keys() - expected)
    if missing or extra:
        problems = [
            f"{len(ids)} {what} (first {ids[0]})"
            for ids, what in ((missing, "without an answer"), (extra, "that were not asked"))
            if ids
        ]
        raise ValueError(f"a submission answers exactly the questions of its split; here are {', '.join(problems)}")
    write_json(Path(path), [{"question_id": int(i), "answer": str(answers[i])} for i in sorted(expected)], compact=True)


def read_submission(path: str | Path) -> dict[int, str]:
    """{question_id: answer} of a result file; UserError if it is not one or answers a question twice."""
    path = Path(path)
    content = read_json(path)
    if not isinstance(content, list):
        raise UserError(f'{path} is not a list of {{"question_id", "answer"}}')
    answers: dict[int, str] = {}
    for position, entry in enumerate(content):
        question_id, answer = fields(f"{path}[{position}]", entry, {"question_id": int, "answer": str})
        if question_id in answers:
            raise UserError(f"{path} answers question {question_id} twice")
        answers[question_id] = answer
    return answers
