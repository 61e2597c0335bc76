"""Chooses fonts for text of any script in pictures, and wraps it; characters that no font has become codes.

matplotlib draws a hollow box for a character that its font lacks. It can fall back from one font to the next, glyph by
glyph, so a list of installed fonts that together cover the text is enough.
"""

import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import NamedTuple

DEFAULT = "DejaVu Sans"  # comes with matplotlib
BOXES = ("Last Resort", "LastResort", "Adobe Blank")  # fonts that claim every character and draw boxes or nothing


class Lettering(NamedTuple):
    """`families` cover all characters but those in `missing`."""

    families: list[str]
    missing: str

    def legible(self, text: str) -> str:
        """The text with every missing character written as its code, which can be looked up."""
        return "".join(f"[U+{ord(c):04X}]" if c in self.missing else c for c in text)


@cache
def default_characters() -> frozenset[int]:
    """The characters of matplotlib's own font."""
    from matplotlib import font_manager, ft2font

    return frozenset(ft2font.FT2Font(font_manager.findfont(DEFAULT)).get_charmap())


@cache
def installed() -> dict[str, frozenset[int]]:
    """{family: the characters it has}, of every upright font of normal weight that matplotlib finds."""
    from matplotlib import font_manager, ft2font

    result: dict[str, frozenset[int]] = {}
    for entry in font_manager.fontManager.ttflist:
        if (
            entry.name.startswith(BOXES)
            or entry.style != "normal"
            or str(entry.weight) not in ("400", "normal", "regular", "book")
        ):
            continue
        try:
            characters = frozenset(ft2font.FT2Font(entry.fname).get_charmap())
        except (OSError, RuntimeError):  # a font that was removed, or one that FreeType cannot read
            continue
        result[entry.name] = result.get(entry.name, frozenset()) | characters
    return result


def choose(texts: Iterable[str], fonts: Mapping[str, frozenset[int]] | None = None) -> Lettering:
    """Fonts for all the texts: matplotlib's own first, then whichever has most of what is still missing.

    `fonts` are the installed ones, by default those that matplotlib finds. Characters without ink (spaces,
    line ends) need no font.
    """
    needed = {c for text in texts for c in text if not c.isspace()}
    default = default_characters() if fonts is None else fonts[DEFAULT]
    families, missing = [DEFAULT], {c for c in needed if ord(c) not in default}
    if fonts is None:
        fonts = installed() if missing else {}  # reads every font file, so only where it is needed
    while missing:
        # The name breaks ties, so that a machine draws the same picture every time.
        best = max(fonts, key=lambda name: (sum(ord(c) in fonts[name] for c in missing), name))
        rest = {c for c in missing if ord(c) not in fonts[best]}
        if len(rest) == len(missing):
            break
        families.append(best)
        missing = rest
    return Lettering(families, "".join(sorted(missing)))


def wrapped(text: str, columns: int) -> str:
    """The text in lines of at most so many columns. Chinese, Japanese and Korean characters take two columns, and a
    line may end after any of them; other words are split only if they are longer than a line."""
    lines, line, used = [], "", 0
    for word in _pieces(text):
        width = _columns(word)
        if used + width > columns and line:
            lines.append(line.rstrip())
            line, used = "", 0
        if not (line == "" and word.isspace()):
            while _columns(word) > columns:  # longer than a line: cut
                cut = next(i for i in range(len(word), 0, -1) if i == 1 or _columns(word[:i]) <= columns)
                lines.append(word[:cut])
                word = word[cut:]
            line, used = line + word, used + _columns(word)
    return "\n".join([*lines, line.rstrip()] if line.strip() or not lines else lines)


def _wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


def _columns(text: str) -> int:
    return sum(1 + _wide(c) for c in text)


def _pieces(text: str) -> Iterator[str]:
    """Words, spaces, and wide characters one by one."""
    for _, group in itertools.groupby(text, lambda c: "wide" if _wide(c) else c.isspace()):
        part = "".join(group)
        yield from part if _wide(part[0]) else (" " if part.isspace() else part,)
