"""Reads the rows of a table that a user brings: CSV, TSV, JSON Lines, a JSON list, or Parquet."""

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vqa_scratch.errors import UserError
from vqa_scratch.storage import parse_json, read_json

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
Row = dict[str, Any]


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(where the row stands, for messages; its values by column), for every row of the file that is not empty.

    Cells of CSV and TSV are texts; those of the other formats have their types. A .json file holds a list of objects,
    or an object with one such list. Raises UserError that names the place of whatever cannot be read.
    """
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
    read = readers.get(path.suffix.lower())
    if read is None:
        raise UserError(f"{path} is no table: its name should end in {', '.join(TABLES)}")
    try:
        yield from read(path)
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


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(lines_of(path), strict=True, delimiter=delimiter, skipinitialspace=True)
    begun = 1
    try:
        names = reader.fieldnames or []
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{path}: two columns are called {twice!r}")
        begun = reader.line_num + 1
        for row in reader:
            where = f"{path}, line {begun}"
            begun = reader.line_num + 1
            if None in row:  # else what follows a comma would be lost silently
                cells = len(names) + len(row[None])
                raise UserError(
                    f"{where} has {cells} cells, the first line {len(names)}: a cell with a "
                    f"{'tab' if delimiter == chr(9) else 'comma'} needs double quotes around it"
                )
            yield where, row
    except csv.Error as error:
        raise UserError(
            f"{path}, in the row that begins at line {begun}: {error}; is a double quote missing?"
        ) from None


def _object(where: str, row: Any) -> tuple[str, Row]:
    if not isinstance(row, dict):
        raise UserError(f"{where} must be a JSON object, not a {type(row).__name__}")
    return where, row


def _jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(lines_of(path), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _object(where, parse_json(line, where))


def _json(path: Path) -> Iterator[tuple[str, Row]]:
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
        yield _object(f"{path}, entry {number}", row)


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
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
