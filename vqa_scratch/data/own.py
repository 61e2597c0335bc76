"""Reads a user's own questions about images: a table with columns for image, question and answer.

A source is a file (CSV, TSV, JSON Lines, JSON, Parquet) or a folder with one file a split: `train.csv`;
`train-*.parquet` as Hugging Face `datasets` writes them; `train/questions.json` with `train/images/`, the layout of
easy-VQA. Columns may have any of the names in `COLUMNS`. A table without a column of splits is split by image.
"""

import functools
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vqa_scratch.data.tables import TABLES, Row, read_rows
from vqa_scratch.data.vqa_files import IMAGE_SUFFIXES, OpenedSplit, SplitEntry, VQASample
from vqa_scratch.errors import UserError, some
from vqa_scratch.metrics import normalize_answer
from vqa_scratch.storage import is_text, read_json, remove_unfinished, write_whole

COLUMNS = {
    "image": "image image_path image_file image_name file_name filename file path img img_path picture photo image_id",
    "question": "question query prompt",
    "answer": "answer answers label labels response target multiple_choice_answer ground_truth",
    "split": "split subset partition",
    "id": "question_id id qid uid",
    "kind": "question_type type category answer_type",
}
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}
SHARES = {"val": 0.1, "test": 0.1}  # of the images, at least one each; the rest is for training
NUMBERED = re.compile(r"answer_?[0-9]+")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def names_of(split: str) -> tuple[str, ...]:
    """What a split may be called, the usual name first."""
    return next((names for names in SPLITS.values() if split in names), (split,))


def own_files(folder: Path, split: str) -> list[Path]:
    """The tables of a folder that hold a split and nothing else."""
    for name in names_of(split):
        for suffix in TABLES:
            if (folder / f"{name}{suffix}").is_file():
                return [folder / f"{name}{suffix}"]
        for place in (folder, folder / "data"):
            if parts := sorted(place.glob(f"{name}-*.parquet")):
                return parts
        if (folder / name / "questions.json").is_file():
            return [folder / name / "questions.json"]
    return []


def only_table(folder: Path) -> Path | None:
    """The table of a folder that has one, whatever its name, unless that is the name of a split."""
    tables = [path for path in sorted(folder.glob("*")) if path.suffix.lower() in TABLES and path.is_file()]
    named = {name for names in SPLITS.values() for name in names}
    return tables[0] if len(tables) == 1 and tables[0].stem.split("-")[0] not in named else None


def open_own(paths: list[Path], split: str, cache: Path) -> OpenedSplit:
    """The questions of a split in the tables `paths`; pictures inside Parquet files are written below `cache`.

    Raises UserError, in one line, for a table without the columns, a cell that cannot be what its column says, or a
    split that the table does not have.
    """
    rows, where = rows_in(paths)
    names = list(rows[0][2])
    columns = columns_of(paths[0], names)
    columns["answer"] = answer_columns(names, columns)
    entries = [_entry(path.parent, at, row, columns, number, cache) for number, (path, at, row) in enumerate(rows)]
    images = (entry.sample.image_id for entry in entries)
    entries = [entries[place] for place in places_of(split, rows, where, columns.get("split"), images)]
    annotated = any(entry.sample.answers for entry in entries)
    if annotated:
        empty = "the answer is empty"
        entries = [e if e.sample.answers else e._replace(problem=e.problem or empty) for e in entries]
    files: dict[str, Path | None] = {"table": paths[0]}
    return OpenedSplit("questions", files, len(entries), entries.__getitem__, annotated, Counter(), upright=True)


def rows_in(paths: list[Path]) -> tuple[list[tuple[Path, str, Row]], str]:
    """(the file, place and cells of every row, what messages call the tables). Raises UserError if there is none."""
    rows = [(path, at, row) for path in paths for at, row in _rows(path)]
    where = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    if not rows:
        raise UserError(f"{where} holds no rows")
    return rows, where


def places_of(
    split: str,
    rows: list[tuple[Path, str, Row]],
    where: str,
    column: Any,
    shared: Iterable[Any],
    what: str = "images",
) -> list[int]:
    """The rows of a split, by the `column` that names splits; without one they are shared out by `shared`, of each row
    the image or whatever must not be in two splits. Raises UserError if there are none."""
    if split == "all":
        return list(range(len(rows)))
    if column is None:
        keys = list(shared)
        chosen = shares_of(split, keys, where, what)
        return [place for place, key in enumerate(keys) if key in chosen]
    names = [_split_of(row, column) for _, _, row in rows]
    if names_of(split)[0] not in names:
        raise UserError(f"{where} has no rows of split {split}; it has {some(sorted(set(names)))}")
    return [place for place, name in enumerate(names) if name == names_of(split)[0]]


def find_tables(source: Path, split: str) -> tuple[list[Path], str] | None:
    """(the tables that hold a split, what it is called in them); None if a folder has none.

    A split that is itself the name of a table is that table.
    """
    if Path(split).suffix.lower() in TABLES:
        return [Path(split)], "all"
    if source.is_file():
        return [source], split
    if tables := own_files(source, split):
        return tables, "all"
    table = only_table(source)
    return ([table], split) if table else None


def splits_of(paths: list[Path]) -> set[str]:
    """The splits that a table names in a column; none if it has no such column, for which its first row is enough."""
    rows = (row for path in paths for _, row in _rows(path))
    first = next(rows, None)
    if first is None:
        return set()
    column = columns_of(paths[0], list(first)).get("split")
    return {_split_of(row, column) for row in (first, *rows)} if column else set()


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a table; easy-VQA's lists of [question, answer, image] become rows too."""
    if path.name == "questions.json" and (path.parent / "images").is_dir():
        content = read_json(path)
        if isinstance(content, list) and all(isinstance(row, list) and len(row) == 3 for row in content):
            for number, (question, answer, image) in enumerate(content):
                yield f"{path}, entry {number}", {"question": question, "answer": answer, "image": image}
            return
    yield from read_rows(path)


def plain_names(names: Iterable[Any]) -> dict[str, Any]:
    """{name of a column in plain spelling: the column}."""
    return {re.sub(r"[\s-]+", "_", str(name).strip().lower()): name for name in names}


def columns_of(
    path: Path, names: list[Any], known: Mapping[str, str] = COLUMNS, needed: Sequence[str] = ("image", "question")
) -> dict[str, Any]:
    """{part: the column that has it}, by the `known` names of each. Raises UserError for one that is missing."""
    plain, found = plain_names(names), {}
    for part, usual in known.items():
        name = next((name for name in usual.split() if name in plain), None)
        if name is not None:
            found[part] = plain[name]
    for part in needed:
        if part not in found:
            raise UserError(
                f"{path} has no column for the {part}: call one {' or '.join(known[part].split()[:3])} "
                f"(its columns are {some(map(str, names)) or 'none'})"
            )
    return found


def answer_columns(names: list[Any], columns: dict[str, Any]) -> list[Any]:
    """The columns that hold answers: the one of that name, else those of numbered ones."""
    numbered = [name for spelled, name in plain_names(names).items() if NUMBERED.fullmatch(spelled)]
    return [columns["answer"]] if "answer" in columns else numbered


def _entry(folder: Path, where: str, row: Row, columns: dict[str, Any], number: int, cache: Path) -> SplitEntry:
    name, image = _image(folder, where, row.get(columns["image"]), cache)
    answers = tuple(answer for column in columns["answer"] for answer in _answers(where, row.get(column)))
    question = cell_text(where, columns["question"], row.get(columns["question"]))
    majority = Counter(answers).most_common(1)[0][0] if answers else ""
    kind = cell_text(where, columns["kind"], row.get(columns["kind"])) if "kind" in columns else ""
    number_of = row.get(columns["id"]) if "id" in columns else None
    if number_of in (None, ""):
        number_of = number
    elif isinstance(number_of, bool) or not isinstance(number_of, int | str):
        raise UserError(f"{where}: {columns['id']!r} is {number_of!r}, neither a number nor a text")
    kinds = (kind or " ".join(question.lower().split()[:2]), kind or answer_type(majority))
    sample = VQASample(name, image or Path(name), number_of, question, *kinds, answers, majority)
    return SplitEntry(sample, image is not None, None if question else "the question is empty")


def answer_type(answer: str) -> str:
    """As the official files name it: "yes/no", "number" or "other"; "" of no answer."""
    plain = normalize_answer(answer)
    if plain in ("yes", "no"):
        return "yes/no"
    return "number" if plain.replace(".", "", 1).isdigit() else "other" if answer else ""


def cell_text(where: str, column: str, value: Any) -> str:
    """A cell as text, without space around it. Raises UserError for a list, and for text that no file can hold."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: {column!r} is {str(value)[:40]!r}, not a text")
    if not is_text(str(value)):
        raise UserError(f"{where}: {column!r} holds half of a letter: it is not text")
    return str(value).strip()


def _answers(where: str, value: Any) -> list[str]:
    """The answers of a cell: one, a list, or a text with a JSON list or with bars between them."""
    if isinstance(value, str) and value.strip().startswith("["):
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, str):
        value = value.split("|")
    parts = value if isinstance(value, list) else [value]
    texts = [cell_text(where, "answer", part.get("answer") if isinstance(part, dict) else part) for part in parts]
    return [text for text in texts if text]


def _image(folder: Path, where: str, value: Any, cache: Path) -> tuple[str, Path | None]:
    """(the name that the table gives the image, its file); None if there is no such file."""
    if isinstance(value, dict):  # as Hugging Face `datasets` stores pictures
        if isinstance(value.get("bytes"), bytes):
            return _stored(value["bytes"], cache)
        value = value.get("path")
    name = cell_text(where, "image", value)
    if not name:
        raise UserError(f"{where} has no image")
    if URL.match(name):
        raise UserError(f"{where}: the image is an address, {name[:60]}; download the images and give their file names")
    return name, find_image(folder, name)


_remove_left = functools.cache(remove_unfinished)  # what killed processes left in a folder, once


def _stored(data: bytes, cache: Path) -> tuple[str, Path]:
    """A picture that came as bytes, in a file named by their hash."""
    _remove_left(cache / "pictures")
    path = cache / "pictures" / hashlib.blake2b(data, digest_size=16).hexdigest()
    if not path.is_file():
        write_whole(path, lambda unfinished: unfinished.write_bytes(data))
    return path.name, path


def find_image(folder: Path, name: str) -> Path | None:
    """The file of an image that a table in `folder` names; a plain number may lack its ending."""
    return find_named(folder, name, "images", IMAGE_SUFFIXES if name.isdigit() else ())


def find_named(folder: Path, name: str, below: str, endings: Sequence[str] = ()) -> Path | None:
    """The file that a table in `folder` names; None if there is none.

    The name is absolute or relative to the folder or its subfolder `below`, with / or \\ between folders, its umlauts
    composed or not, and may lack one of the `endings`.
    """
    spelled = dict.fromkeys([name, name.replace("\\", "/")])
    spelled = dict.fromkeys(unicodedata.normalize(form, text) for text in spelled for form in ("NFC", "NFD"))
    for place in (folder, folder / below):
        for text in spelled:
            for ending in ("", *endings):
                try:
                    if (path := place / (text + ending)).is_file():
                        return path
                except OSError:  # a name that is too long
                    pass
    return None


def _split_of(row: Row, column: Any) -> str:
    """The split of a row, by its usual name."""
    return names_of(str(row.get(column) or "").strip().lower())[0]


def shares_of(split: str, names: Iterable[Any], where: str, what: str = "images") -> set[Any]:
    """Which images, or `what` else, a split of a data set has that names no splits: a tenth for val, a tenth for test,
    the rest for train.

    Their order is that of a hash of their names, so it does not depend on the order of the file. Raises UserError for
    another split, and for fewer than three.
    """
    images = sorted(set(names), key=lambda name: hashlib.blake2b(str(name).encode()).digest())
    if split not in SPLITS:
        raise UserError(f"{where} has no column of splits, so it has train, val and test, but no {split}")
    if len(images) < 3:
        raise UserError(f"{where} has {len(images)} {what}; train, val and test need one each, so at least 3")
    val, test = (max(1, round(SHARES[name] * len(images))) for name in ("val", "test"))
    bounds = {"val": (0, val), "test": (val, val + test), "train": (val + test, len(images))}
    return set(images[slice(*bounds[split])])
