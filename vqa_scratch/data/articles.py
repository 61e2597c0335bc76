"""Reads articles from a file: CSV or JSONL with named columns, or plain text with one article a line."""

import csv
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqa_scratch.errors import UserError
from vqa_scratch.storage import parse_json

LINE = "line"  # the one column of a .txt file


@dataclass(frozen=True)
class Articles:
    texts: list[str]
    summaries: list[str]  # "" where there is none
    empty: list[int]  # line numbers of articles left out because they hold nothing but space


def read_articles(path: Path, column: str, summary_column: str | None = None) -> Articles:
    """Read a .csv, .jsonl or .txt file; a .txt file has no columns.

    Raises UserError on a file that cannot be read, a line that cannot be parsed, a missing column (naming the
    existing ones), an article that is not a text, and a file without articles.
    """
    readers = {".csv": _csv, ".jsonl": _jsonl, ".txt": _text}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise UserError(f"{path}: articles come from {', '.join(readers)} files")
    if suffix == ".txt":
        column, summary_column = LINE, None
    texts, summaries, empty = [], [], []
    try:
        for number, row in readers[suffix](path):
            text, summary = (_cell(row, name, f"{path}, line {number}") for name in (column, summary_column))
            if text:
                texts.append(text)
                summaries.append(summary)
            else:
                empty.append(number)
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line} is not UTF-8 text (byte {error.start} of the file)") from None
    if not texts:
        raise UserError(f"{path} holds no article" + (f"; {len(empty)} are empty" if empty else ""))
    return Articles(texts, summaries, empty)


def _cell(row: dict[str, Any], column: str | None, where: str) -> str:
    """The text of a column without the space around it; "" if no column is asked for, or if it is empty."""
    if column is None:
        return ""
    if column not in row:
        raise UserError(f"{where}: no column {column!r}; the columns are {', '.join(map(str, row)) or 'none'}")
    if not isinstance(row[column], str | None):
        raise UserError(f"{where}: {column!r} must be a text, not a {type(row[column]).__name__}")
    return (row[column] or "").strip()


def _lines(path: Path) -> io.StringIO:
    """The lines of the file, decoded in one piece so that an error knows its place, without a byte order mark."""
    return io.StringIO(path.read_bytes().decode("utf-8").removeprefix("\ufeff"), newline="")


def _csv(path: Path) -> Iterator[tuple[int, dict[str, str | None]]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader, begun = csv.DictReader(_lines(path), strict=True), 1
    try:
        columns = len(reader.fieldnames or ())
        begun = reader.line_num + 1
        for row in reader:
            if None in row:  # else what follows a comma would be lost silently
                raise UserError(
                    f"{path}, line {reader.line_num} has {columns + len(row[None])} cells, the first line {columns}: "
                    "a cell with a comma needs double quotes around it"
                )
            yield reader.line_num, row
            begun = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}, in the row that begins at line {begun}: {error}; is a double quote missing?"
        ) from None


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}, line {number}")
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} must be a JSON object, not a {type(row).__name__}")
        yield number, row


def _text(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(_lines(path), 1):
        yield number, {LINE: line}
