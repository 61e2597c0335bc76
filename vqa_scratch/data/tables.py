"""Reads the rows of a table that a user brings: CSV, TSV, JSON Lines, a JSON list, or Parquet."""

import csv
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vqa_scratch.errors import UserError
from vqa_scratch.storage import parse_json, read_json

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]  # (where a row stands, for messages; its values by column)


def read_rows(path: Path) -> Rows:
    """Every row of the file that is not empty, with its place.

    Cells of CSV and TSV are texts; those of the other formats have their types. A .json file holds a list of objects,
    or an object with one such list. Raises UserError that names the place of whatever cannot be read.
    """
    readers = dict(zip(TABLES, (csv_rows, csv_rows, jsonl_rows, _json, _parquet), strict=True))
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise UserError(f"{path} is no table: its name should end in {', '.join(TABLES)}")
    with readable(path):
        yield from readers[suffix](path)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Within it, a file that is missing, cannot be read or is no UTF-8 text is a UserError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} not found: there is no such file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line} is not UTF-8 text (byte {error.start} of the file)") from None


def lines_of(path: Path) -> io.StringIO:
    """The lines of a text file, decoded in one piece so that an error knows its place, without a byte-order mark."""
    return io.StringIO(path.read_bytes().decode("utf-8").removeprefix("\ufeff"), newline="")


def csv_rows(path: Path) -> Rows:
    """The rows of CSV or TSV, each with the line on which it ends.

    Raises UserError for a row of too many cells, two columns of a name, and quotes that do not match.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    delimiter, mark = ("\t", "tab") if path.suffix.lower() == ".tsv" else (",", "comma")
    lines, begun = lines_of(path), 1
    reader = csv.DictReader(lines, strict=True, delimiter=delimiter, skipinitialspace=True)
    try:
        names = reader.fieldnames or []
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{path}: two columns are called {twice!r}")
        begun = reader.line_num + 1
        for row in reader:
            if None in row:  # else what follows a comma would be lost silently
                cells = len(names) + len(row[None])
                raise UserError(
                    f"{path}, line {reader.line_num} has {cells} cells, the first line {len(names)}: "
                    f"a cell with a {mark} needs double quotes around it"
                )
            yield f"{path}, line {reader.line_num}", row
            begun = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}, in the row that begins at line {begun}: {error}; is a double quote missing?"
        ) from None


def jsonl_rows(path: Path) -> Rows:
    """The object of every line that is not empty. Raises UserError for one that is no JSON object."""
    for number, line in enumerate(lines_of(path), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _object(where, parse_json(line, where))


def _object(where: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where} must be a JSON object, not a {type(row).__name__}")
    return row


def _json(path: Path) -> Rows:
    content = read_json(path)
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) != 1:
            found = ", ".join(map(repr, list(content)[:5])) or "nothing"
            raise UserError(f"{path} should hold a list of objects, or an object with one list; it has {found}")
        content = lists[0]
    if not isinstance(content, list):
        raise UserError(f"{path} should hold a list of objects, not a {type(content).__name__}")
    for number, row in enumerate(content):
        where = f"{path}, entry {number}"
        yield where, _object(where, row)


def _parquet(path: Path) -> Rows:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path} needs pyarrow: pip install 'vqa-scratch[parquet]'") from None
    try:
        number = 0
        for batch in ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield f"{path}, row {number}", row
                number += 1
    except ArrowException as error:
        raise UserError(f"{path} is no whole Parquet file: {str(error).splitlines()[0]}") from None
