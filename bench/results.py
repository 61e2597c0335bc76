"""Writes the results file: one section a benchmark, replaced when that benchmark runs again."""

import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path

from vqa_scratch.errors import UserError

FAILED = "failed: "  # how the cell of a case that gave no figures begins
MEASURED = re.compile(r"\d\.\d|\d \(|not measured")  # with this a row stops saying what it is about
ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("RESULTS.md")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns padded so that it can be read as text."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in lines
    )


def or_reason(case: str, columns: int, make: Callable[[], list[list[str]]]) -> list[list[str]]:
    """The rows of one case, or one that says why there are none: a case that fails does not take the others with it."""
    try:
        return make()
    except Exception as error:  # sides that differ, and all that torch, Triton and the driver raise
        if not isinstance(error, UserError):
            traceback.print_exc()
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].replace("|", "/")
        return [[case, f"{FAILED}{reason[:120]}", *[""] * (columns - 2)]]


def cells_of(line: str) -> list[str]:
    """The cells of a row of a Markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def about(cells: Sequence[str]) -> tuple[str, ...]:
    """The cells of a row before its first figure: they say what it is about."""
    return tuple(takewhile(lambda cell: cell and not MEASURED.search(cell), cells))


def parts(section: str) -> tuple[list[str], dict, dict[str, str]]:
    """(its prose, its tables: {head: {what a row is about: its cells}}, the lines beneath: {what a line is about: it}).

    The last line is about the command that it ends with.
    """
    prose, tables, lines = list[str](), dict[tuple[str, ...], dict](), dict[str, str]()
    for block in section.strip().split("\n\n"):
        if block.startswith("| "):
            head, _, *rows = map(cells_of, block.splitlines())
            tables[tuple(head)] = {about(row): row for row in rows}
        elif block.startswith("- "):
            lines |= {(re.findall(r"`[^`]*`$", line) or line.split(":"))[0]: line for line in block.splitlines()}
        else:
            prose.append(block)
    return prose, tables, lines


def merged(old: str, new: str) -> str:
    """The section `new`, of some cases, with the rows of `old` about others, and its lines beneath."""
    (_, before, lines), (prose, after, said) = parts(old), parts(new)
    tables = [table(head, [*(before.get(head, {}) | after.get(head, {})).values()]) for head in before | after]
    return "\n\n".join([*prose, *tables, "\n".join((lines | said).values())])


def write_section(name: str, text: str, path: Path = RESULTS, part: bool = False) -> None:
    """Put `text` between the marks of section `name`, in place of what stood there, or at the end of the file.

    Of a `part` of the cases it takes the place of these alone (`merged`).
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    whole = path.read_text(encoding="utf-8") if path.exists() else "# Results\n"
    if begin not in whole:
        whole = f"{whole.rstrip()}\n\n{begin}\n{end}\n"
    before, _, rest = whole.partition(begin)
    old, _, after = rest.partition(end)
    text = merged(old, text) if part and old.strip() else text.strip()
    whole = f"{before}{begin}\n{text}\n{end}{after}"
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(whole, encoding="utf-8")
    os.replace(unfinished, path)


def command_given() -> str:
    """The command line of this run, to stand beneath its table."""
    return "python -m bench " + " ".join(word for word in sys.argv[1:] if word != "--write")


def present(name: str, text: str, write: bool, path: Path = RESULTS, part: bool = False) -> None:
    """Show a section, and with `write` put it into the results file, or another, too, as in `write_section`.

    Raises UserError afterwards if a case of it failed.
    """
    print(text)
    if write:
        write_section(name, text, path, part)
        print(f"written to {path}", file=sys.stderr)
    if f"| {FAILED}" in text:
        raise UserError(f"{name}: a case failed; the table says which")
