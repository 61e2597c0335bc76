"""What the two JSON files of a VQA v2 split say, parsed; it is kept in columns, so that a later run need not parse.

The parser takes seconds for the annotations, the columns tenths. They lie in a file that is named by a hash of the
content of both files and of the source of the parser, and which holds a hash of itself. So nothing stale, half written
or damaged is ever read. What is used of a split, and where its images are, is found out anew each time.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple

from vqa_scratch.data import vqa_files
from vqa_scratch.data.vqa_files import VQAFiles, entries
from vqa_scratch.errors import UserError, note
from vqa_scratch.storage import parse_json, read_json, read_text, typed, write_text

IDS = {"question_id": int | str, "image_id": int | str}
TEXTS = ("question", "question_type", "answer_type", "answer", "problem")  # fields of `OfficialEntry`
PROBLEMS = ("", "the question has no annotation", "the annotation is about another image", "the question is empty")


class OfficialEntry(NamedTuple):
    """A question, and what its annotation says; without one the types and `answer` are "", `answers` is ()."""

    question_id: int | str
    image_id: int | str
    question: str
    question_type: str
    answer_type: str
    answers: tuple[str, ...]
    answer: str
    problem: str  # why it cannot be used; "" if nothing is wrong with it


class Official(NamedTuple):
    """The questions in the order of their file, and what else the files say."""

    questions: list[OfficialEntry]
    subtype: str | None  # that the file of questions names
    annotated: bool
    notes: dict[str, int]  # what is allowed but unusual, counted


class Annotation(NamedTuple):
    """What an annotation file says about one question."""

    image_id: int | str
    question_type: str
    answer_type: str
    answers: tuple[str, ...]
    answer: str


def read_official(files: VQAFiles, cache: Path | None = None) -> Official:
    """The two files of a split, parsed; with a `cache` what is kept of them below it, where it is kept otherwise.

    A `cache` that cannot be written to is a note, for the run loses nothing but time. Raises UserError, as `parsed`.
    """
    if cache is None:
        return parsed(files)
    digest = _digest(files)
    path = cache / f"questions-{digest}.json"
    read = _kept(path)
    if read is None:
        read = parsed(files)
        if read.questions and _digest(files) == digest:  # nobody wrote them while they were parsed
            body = json.dumps(_columns(read), separators=(",", ":"))
            try:
                write_text(path, f"{_hash(body)}\n{body}")
            except UserError as error:
                note(f"{error}; every run will parse the questions again")
    return read


def parsed(files: VQAFiles) -> Official:
    """Raises UserError, in one line: broken JSON, a missing or wrong value, a question annotated with no answers."""
    content = read_json(files.questions)
    asked = entries(files.questions, content, "questions")
    (subtype,) = typed(files.questions, content, {"data_subtype": str | None})
    annotations, notes = load_annotations(files.annotations) if files.annotations else (None, Counter())
    types = IDS | {"question": str}

    def questions() -> Iterator[OfficialEntry]:
        for position, one in enumerate(asked):
            question_id, image_id, question = typed(f"{files.questions}: questions[{position}]", one, types)
            found, problem = Annotation(image_id, "", "", (), ""), 0
            if annotations is not None:
                problem = int(question_id not in annotations)
                found = annotations.get(question_id, found)
            if found.image_id != image_id:
                problem = 2
            question = question.strip()
            yield OfficialEntry(question_id, image_id, question, *found[1:], PROBLEMS[problem if question else 3])

    return Official(list(questions()), subtype, annotations is not None, notes)


def load_annotations(path: Path) -> tuple[dict[int | str, Annotation], Counter[str]]:
    """{question_id: Annotation} and a count of what is allowed but unusual.

    While the file is parsed, each of the 4.4 million answers of train2014 becomes an interned string, so that their
    dicts are never all in memory.
    """
    notes: Counter[str] = Counter()

    def reduce(entry: dict[str, Any]) -> Any:
        if isinstance(entry.get("answer"), str) and "question_id" not in entry:
            if "answer_id" not in entry:
                notes["answers without answer_id (the official script would score them differently)"] += 1
            return sys.intern(entry["answer"])
        return entry

    types = IDS | {"question_type": str, "answer_type": str, "answers": list}
    result: dict[int | str, Annotation] = {}
    raw = entries(path, read_json(path, reduce), "annotations")
    raw.reverse()  # popped from the end: each entry is freed as soon as it is read
    total = len(raw)
    while raw:
        entry = raw.pop()
        where = f"{path}: annotations[{total - len(raw) - 1}]"
        question_id, image_id, question_type, answer_type, answers = typed(where, entry, types)
        if not answers:
            raise UserError(f"{where} (question {question_id}) has no answers")
        bad = [answer for answer in answers if not isinstance(answer, str)]
        if bad:
            raise UserError(f"{where} (question {question_id}) has an answer without a text: {bad[0]!r}")
        if question_id in result:
            notes["second annotations of a question (of two, the later counts)"] += 1
        if len(answers) != 10:
            notes["questions with other than ten answers"] += 1
        majority = entry.get("multiple_choice_answer")
        if not isinstance(majority, str):
            majority = Counter(answers).most_common(1)[0][0]
        question_type, answer_type, majority = map(sys.intern, (question_type, answer_type, majority))
        result[question_id] = Annotation(image_id, question_type, answer_type, tuple(answers), majority)
    return result, notes


# ------------------------------------------------------------------------------------------------ columns


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _digest(files: VQAFiles) -> str:
    """A hash of all that `parsed` depends on."""
    key = hashlib.blake2b(digest_size=12)
    parser = (Path(__file__), Path(vqa_files.__file__))
    for path in filter(None, (*parser, files.questions, files.annotations)):
        with open(path, "rb") as file:
            key.update(hashlib.file_digest(file, "blake2b").digest())
    return key.hexdigest()


def _columns(read: Official) -> dict[str, Any]:
    """A list for each field of the questions; each text, and each tuple of answers, is there once."""
    texts: dict[str, int] = {}
    lists: dict[tuple[str, ...], int] = {}

    def numbers(column: Iterable[str]) -> list[int]:
        return [texts.setdefault(text, len(texts)) for text in column]

    columns: dict[str, Any] = dict(zip(OfficialEntry._fields, zip(*read.questions, strict=True), strict=True))
    columns |= {name: numbers(columns[name]) for name in TEXTS}
    columns["answers"] = [lists.setdefault(answers, len(lists)) for answers in columns["answers"]]
    made = {"columns": columns, "lists": [numbers(answers) for answers in lists], "texts": list(texts)}
    return made | {"subtype": read.subtype, "annotated": read.annotated, "notes": read.notes}


def _kept(path: Path) -> Official | None:
    """What `_columns` are in a file; None if there is no such file, or if it was damaged from outside."""
    try:
        hash_of_it, _, body = read_text(path).partition("\n")
    except UserError:
        return None
    if hash_of_it != _hash(body):
        return None
    made = parse_json(body, path)
    texts, columns = made["texts"], made["columns"]
    lists = [tuple([texts[number] for number in numbers]) for numbers in made["lists"]]
    columns |= {name: [texts[number] for number in columns[name]] for name in TEXTS}
    columns["answers"] = [lists[number] for number in columns["answers"]]
    questions = list(starmap(OfficialEntry, zip(*(columns[name] for name in OfficialEntry._fields), strict=True)))
    return Official(questions, made["subtype"], made["annotated"], made["notes"])
