"""The one exception that programs turn into a single line and exit code 2, and notes of one line."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

LONGEST = 300  # characters of a message
_END = 100  # of them kept from the end of a longer one


def in_a_line(text: object) -> str:
    """A text, or the name of a file, with its line breaks and other letters that cannot be shown as their escapes."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))


def some(names: Iterable[str], shown: int = 5, between: str = ", ") -> str:
    """The first few names, and how many more there are: short enough for a line, and in one."""
    names = list(names)
    more = len(names) - shown
    return between.join(map(in_a_line, names[:shown])) + (f" and {more:,} more" if more > 0 else "")


@cache
def note(line: str) -> None:
    """Say something on stderr that the user should know, once a process."""
    print(f"note: {in_a_line(line)}", file=sys.stderr)


class UserError(ValueError):
    """Bad input from outside: a file, a flag, a checkpoint. The message says what, where, and what would be right.

    `str(error)` is one line of at most `LONGEST` characters, whatever was quoted in it: line breaks and other letters
    that cannot be shown are escaped, and of a longer text the middle is left out.
    """

    def __str__(self) -> str:
        line = in_a_line(super().__str__())
        return line if len(line) <= LONGEST else f"{line[: LONGEST - _END - 5]} ... {line[-_END:]}"


@contextmanager
def naming(place: object) -> Iterator[None]:
    """Within it, a UserError that does not name `place`, a file or folder, gets it in front of its message."""
    try:
        yield
    except UserError as error:
        message = ValueError.__str__(error)
        if str(place) in message:
            raise
        raise UserError(f"{place}: {message}") from error
