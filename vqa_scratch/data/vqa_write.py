"""Writes a data set, or answers to one, in the official file formats of VQA v2."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vqa_scratch.data.vqa_files import VQAFiles, VQASample, annotations_name, pairs_name, questions_name, subtype_of
from vqa_scratch.storage import write_json


def write_vqa(
    folder: str | Path,
    split: str,
    samples: Sequence[VQASample],
    *,
    description: str = "",
    license_name: str = "",
    pairs: Iterable[tuple[int | str, int | str]] = (),
) -> VQAFiles:
    """Writes the question, annotation and complementary-pair files of a split under their official names.

    pairs -- (question_id, question_id) with the same question on similar images and different answers
    Images are not touched: `image_file_name` says where they belong. Without any answers no annotation file is written.
    Every annotator is sure of the answer (`answer_confidence` is "yes").
    Raises ValueError if only some samples have answers, or if a question id occurs twice.
    """
    folder, subtype = Path(folder), subtype_of(split)
    answered = sum(bool(sample.answers) for sample in samples)
    if answered not in (0, len(samples)):
        raise ValueError(f"{answered} of {len(samples)} samples have answers; a split has them for all or for none")
    if len({sample.question_id for sample in samples}) != len(samples):
        raise ValueError("a question id occurs twice")
    info = {"description": description, "data_type": "mscoco", "version": "2.0", "year": 0}
    info |= {"contributor": "", "url": "", "date_created": ""}
    license_of = {"name": license_name, "url": ""}
    common = {"info": info, "license": license_of, "data_type": "mscoco", "data_subtype": subtype}
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
                "answers": [
                    {"answer_id": i, "answer": answer, "answer_confidence": "yes"}
                    for i, answer in enumerate(s.answers, 1)
                ],
                "multiple_choice_answer": s.answer,
            }
            for s in samples
        ]
        write_json(files.annotations, {**common, "annotations": annotations}, compact=True)
    write_json(folder / pairs_name(subtype), [list(pair) for pair in pairs], compact=True)
    return files


def write_submission(path: str | Path, answers: Mapping[int | str, str], expected_ids: Iterable[int | str]) -> None:
    """Writes the result file of the VQA v2 evaluation server: [{"question_id": int, "answer": str}, ...], sorted by id.

    The ids of one's own data may be texts. Raises ValueError unless `answers` covers exactly `expected_ids`, as the
    server demands.
    """
    expected = set(expected_ids)
    missing, extra = _in_order(expected - answers.keys()), _in_order(answers.keys() - expected)
    if missing or extra:
        problems = [
            f"{len(ids)} {what} (first {ids[0]})"
            for ids, what in ((missing, "without an answer"), (extra, "that were not asked"))
            if ids
        ]
        raise ValueError(f"a submission answers exactly the questions of its split; here are {', '.join(problems)}")
    write_json(Path(path), [{"question_id": i, "answer": answers[i]} for i in _in_order(expected)], compact=True)


def _in_order(ids: Iterable[int | str]) -> list[int | str]:
    """Numbers first, then texts."""
    return sorted(ids, key=lambda number: (isinstance(number, str), number))
