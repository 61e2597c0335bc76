"""The one exception that programs turn into a single line and exit code 2."""

from collections.abc import Iterable


def some(names: Iterable[str], shown: int = 5) -> str:
    """The first few names, and how many more there are: short enough for a line."""
    names = list(names)
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more:,} more" if more > 0 else "")


class UserError(ValueError):
    """Bad input from outside: a file, a flag, a checkpoint. The message says what, where, and what would be right."""
