"""Reads what a language model is tuned on: articles to summarise, prompts, and preferences between two responses.

Articles are the lines of a text file, or a column of CSV or JSONL. Prompts and preferences come in the formats that TRL
reads: a prompt is a text or a conversation, a list of messages, objects with a role and a content. A row of preferences
has a prompt, `chosen` and `rejected`; a response may be a list of one message too.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vqa_scratch.data.chat_template import render
from vqa_scratch.data.tables import Row, Rows, csv_rows, jsonl_rows, lines_of, read_rows, readable
from vqa_scratch.errors import UserError, naming
from vqa_scratch.storage import typed

LINE = "line"  # the one column of a .txt file


def text_rows(path: Path) -> Rows:
    """The lines of a text file, each a row."""
    for number, line in enumerate(lines_of(path), 1):
        yield f"{path}, line {number}", {LINE: line.strip()}


def _in_column(where: str, row: Row, column: str) -> Any:
    """What a row has in a column. Raises UserError if there is no such column."""
    if column not in row:
        raise UserError(f"{where}: no column {column!r}; the columns are {', '.join(map(str, row)) or 'none'}")
    return row[column]


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
            text, summary = (_text(row, name, where) for name in (column, summary_column))
            if text:
                articles.append((text, summary))
            else:
                empty.append(where)
    if not articles:
        raise UserError(f"{path} holds no article" + (f"; {len(empty)} are empty" if empty else ""))
    return articles, empty


def _text(row: Row, column: str | None, where: str) -> str:
    """The text of a column without the space around it; "" if no column is asked for, or if it is empty."""
    value = None if column is None else _in_column(where, row, column)
    if not isinstance(value, str | None):
        raise UserError(f"{where}: {column!r} must be a text, not a {type(value).__name__}")
    return (value or "").strip()


class Asked(NamedTuple):
    """A prompt as a model reads it."""

    where: str  # in the file
    row: Row
    text: str
    pair: tuple[str, ...] = ()  # the chosen and the rejected response


def _said(where: str, row: Row, column: str, most: int | None = None) -> str | list[dict[str, str]]:
    """A text, or at most so many messages, that is not empty. Raises UserError for anything else."""
    value = _in_column(where, row, column)
    if not isinstance(value, str | list):
        raise UserError(f"{where}: {column!r} must be a text or a list of messages, not a {type(value).__name__}")
    messages = [{"content": value}] if isinstance(value, str) else value
    contents = [typed(f"{where}: a message of {column!r}", message, {"content": str})[0] for message in messages]
    if not "".join(contents).strip():
        raise UserError(f"{where}: {column!r} is empty")
    if most is not None and len(messages) > most:
        raise UserError(f"{where}: {column!r} has {len(messages)} messages; it must be one, the response to the prompt")
    return value


def read_prompts(path: Path, column: str, template: str | None, special: Mapping[str, str], pairs: bool) -> list[Asked]:
    """The prompts in a column of a table, or in the lines of a .txt file; `pairs`: with two responses each.

    With a chat `template` a text is what a user says in it; `special` are its tokens, as in `render`. Raises UserError,
    with the place, on what is no prompt, an empty or a missing response, and two that are equal.
    """
    rows, prompts = read_rows(path), []
    if path.suffix.lower() == ".txt":
        column, rows = LINE, (one for one in text_rows(path) if one[1][LINE].strip())
    with readable(path):
        for where, row in rows:
            said, given = _said(where, row, column), [_said(where, row, x, 1) for x in ("chosen", "rejected") if pairs]
            pair = tuple(text if isinstance(text, str) else text[0]["content"] for text in given)
            if pairs and pair[0] == pair[1]:
                raise UserError(f"{where}: 'chosen' and 'rejected' are equal, so neither is better: leave the pair out")
            if template is not None:
                with naming(where):
                    messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
                    said = render(template, messages, special)
            elif not isinstance(said, str):
                raise UserError(f"{where}: {column!r} is a conversation, which only a chat template can write")
            prompts.append(Asked(where, row, said, pair))
    if not prompts:
        raise UserError(f"{path} holds no prompt")
    return prompts
