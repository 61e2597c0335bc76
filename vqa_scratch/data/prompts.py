"""Reads prompts for a language model, and preferences between two responses to each, in the formats that TRL reads.

A prompt is a text or a conversation: a list of messages, objects with a role and a content. A row of preferences has a
prompt, `chosen` and `rejected`; a response may be a list of one message too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from vqa_scratch.data.articles import LINE, text_rows
from vqa_scratch.data.chat_template import render
from vqa_scratch.data.tables import Row, read_rows, readable
from vqa_scratch.errors import UserError, naming
from vqa_scratch.storage import typed


class Asked(NamedTuple):
    """A prompt as a model reads it."""

    where: str  # in the file
    row: Row
    text: str
    pair: tuple[str, ...] = ()  # the chosen and the rejected response


def _said(where: str, row: Row, column: str, most: int | None = None) -> str | list[dict[str, str]]:
    """A text, or at most so many messages, that is not empty. Raises UserError for anything else."""
    if column not in row:
        raise UserError(f"{where}: no column {column!r}; the columns are {', '.join(map(str, row)) or 'none'}")
    value = row[column]
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
