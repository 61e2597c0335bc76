"""Reads articles from a file: CSV or JSONL with named columns, or plain text with one article a line."""

from collections.abc import Callable
from pathlib import Path

from vqa_scratch.data.tables import Row, Rows, csv_rows, jsonl_rows, lines_of, readable
from vqa_scratch.errors import UserError

LINE = "line"  # the one column of a .txt file


def read_articles(
    path: Path, column: str, summary_column: str | None = None
) -> tuple[list[tuple[str, str]], list[str]]:
    """(articles, each with its summary, "" where there is none; where articles were left out that hold nothing).

    Reads a .csv, .jsonl or .txt file; a .txt file has no columns. Raises UserError on a file that cannot be read, a
    line that cannot be parsed, a missing column (naming the existing ones), an article that is not a text, and a file
    without articles.
    """
    readers: dict[str, Callable[[Path], Rows]] = {".csv": csv_rows, ".jsonl": jsonl_rows, ".txt": text_rows}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise UserError(f"{path}: articles come from {', '.join(readers)} files")
    if suffix == ".txt":
        column, summary_column = LINE, None
    articles, empty = [], []
    with readable(path):
        for where, row in readers[suffix](path):
            text, summary = (_cell(row, name, where) for name in (column, summary_column))
            if text:
                articles.append((text, summary))
            else:
                empty.append(where)
    if not articles:
        raise UserError(f"{path} holds no article" + (f"; {len(empty)} are empty" if empty else ""))
    return articles, empty


def _cell(row: Row, column: str | None, where: str) -> str:
    """The text of a column without the space around it; "" if no column is asked for, or if it is empty."""
    if column is None:
        return ""
    if column not in row:
        raise UserError(f"{where}: no column {column!r}; the columns are {', '.join(map(str, row)) or 'none'}")
    if not isinstance(row[column], str | None):
        raise UserError(f"{where}: {column!r} must be a text, not a {type(row[column]).__name__}")
    return (row[column] or "").strip()


def text_rows(path: Path) -> Rows:
    """The lines of a text file, each a row."""
    for number, line in enumerate(lines_of(path), 1):
        yield f"{path}, line {number}", {LINE: line.strip()}
