"""The one exception that programs turn into a single line and exit code 2, and notes of one line."""

import sys
from collections.abc import Iterable
from functools import cache


def some(names: Iterable[str], shown: int = 5) -> str:
    """The first few names, and how many more there are: short enough for a line."""
    names = list(names)
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more:,} more" if more > 0 else "")


@cache
def note(line: str) -> None:
    """Say something on stderr that the user should know, once a process."""
    print(f"note: {line}", file=sys.stderr)


class UserError(ValueError):
    """Bad input from outside: a file, a flag, a checkpoint. The message says what, where, and what would be right."""
