"""Writes the results file: one section a benchmark, replaced when that benchmark runs again."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from vqa_scratch.errors import UserError

FAILED = "failed: "  # how the cell of a case that gave no figures begins
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


def write_section(name: str, text: str, path: Path = RESULTS) -> None:
    """Put `text` between the marks of section `name`, in place of what stood there, or at the end of the file."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    section = f"{begin}\n{text.strip()}\n{end}"
    whole = path.read_text(encoding="utf-8") if path.exists() else "# Results\n"
    if begin in whole:
        before, _, rest = whole.partition(begin)
        after = rest.partition(end)[2]
        whole = before + section + after
    else:
        whole = f"{whole.rstrip()}\n\n{section}\n"
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(whole, encoding="utf-8")
    os.replace(unfinished, path)


def command_given() -> str:
    """The command line of this run, to stand beneath its table."""
    return "python -m bench " + " ".join(word for word in sys.argv[1:] if word != "--write")


def present(name: str, text: str, write: bool, path: Path = RESULTS) -> None:
    """Show a section, and with `write` put it into the results file, or another, too.

    Raises UserError afterwards if a case of it failed.
    """
    print(text)
    if write:
        write_section(name, text, path)
        print(f"written to {path}", file=sys.stderr)
    if f"| {FAILED}" in text:
        raise UserError(f"{name}: a case failed; the table says which")
