"""Writing a data set in the formats of VQA v2, so that whatever reads the official files reads it too."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vqa_scratch.data.vqa_files import (
    VQAFiles,
    VQASample,
    annotations_name,
    find_file,
    pairs_name,
    questions_name,
    subtype_of,
)
from vqa_scratch.errors import UserError
from vqa_scratch.storage import read_json, write_json


def answer_entries(answers: Sequence[str], confidences: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """The official form of the annotators' answers: ids from 1, a confidence each ("yes" unless given)."""
    confidences = ["yes"] * len(answers) if confidences is None else list(confidences)
    return [
        {"answer_id": i, "answer": answer, "answer_confidence": confidence}
        for i, (answer, confidence) in enumerate(zip(answers, confidences, strict=True), start=1)
    ]


def write_vqa(
    folder: str | Path,
    split: str,
    samples: Sequence[VQASample],
    *,
    description: str = "",
    license_name: str = "",
    pairs: Iterable[tuple[int, int]] = (),
    confidences: Mapping[int, Sequence[str]] | None = None,
) -> VQAFiles:
    """Writes the question, annotation and complementary-pair files of a split under their official names.

    pairs       -- (question_id, question_id) with the same question on similar images and different answers
    confidences -- {question_id: one of "yes", "maybe", "no" per answer}; "yes" where not given
    Images are not touched: `image_file_name` says where they belong. Without any answers no annotation file is written.
    Raises ValueError if only some samples have answers, or if a question id occurs twice.
    """
    folder, subtype = Path(folder), subtype_of(split)
    answered = sum(bool(sample.answers) for sample in samples)
    if answered not in (0, len(samples)):
        raise ValueError(f"{answered} of {len(samples)} samples have answers; a split has them for all or for none")
    if len({sample.question_id for sample in samples}) != len(samples):
        raise ValueError("a question id occurs twice")
    info = {
        "description": description,
        "data_type": "mscoco",
        "version": "2.0",
        "contributor": "",
        "url": "",
        "year": 0,
        "date_created": "",
    }
    common = {
        "info": info,
        "license": {"name": license_name, "url": ""},
        "data_type": "mscoco",
        "data_subtype": subtype,
    }
    questions = [{"image_id": s.image_id, "question": s.question, "question_id": s.question_id} for s in samples]
    files = VQAFiles(folder / questions_name(subtype), folder / annotations_name(subtype) if answered else None, folder)
    write_json(files.questions, {**common, "task_type": "Open-Ended", "questions": questions}, compact=True)
    if files.annotations is not None:
        annotations = [
            {
                "question_id": s.question_id,
                "image_id": s.image_id,
                "question_type": s.question_type,
                "answer_type": s.answer_type,
                "answers": answer_entries(s.answers, (confidences or {}).get(s.question_id)),
                "multiple_choice_answer": s.answer,
            }
            for s in samples
        ]
        write_json(files.annotations, {**common, "annotations": annotations}, compact=True)
    write_json(folder / pairs_name(subtype), [list(pair) for pair in pairs], compact=True)
    return files


def read_pairs(folder: str | Path, split: str) -> list[tuple[int, int]]:
    """The complementary pairs of a split: questions ids with the same question and different answers."""
    path = find_file(Path(folder), pairs_name(subtype_of(split)))
    content = read_json(path)
    if not isinstance(content, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in content):
        raise UserError(f"{path} is not a list of pairs of question ids")
    return [(first, second) for first, second in content]
