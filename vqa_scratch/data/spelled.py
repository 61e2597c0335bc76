"""Text for a voice that knows letters only: numbers written as words."""

import re

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_THOUSANDS = ("", "thousand", "million", "billion", "trillion")
_ORDINAL = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
_SIGNS = {"$": ("dollar", "dollars"), "€": ("euro", "euros"), "£": ("pound", "pounds"), "%": ("percent", "percent")}
_NUMBER = re.compile(
    r"(?P<minus>(?<![\w.])[-−])?(?P<before>[$€£])?(?P<whole>\d{1,3}(?:,\d{3})+|\d+)(?:\.(?P<part>\d+))?"
    r"(?:(?P<after>\s?%)|(?P<th>st|nd|rd|th)\b)?",
    re.ASCII,
)


def number_words(digits: str) -> str:
    """A whole number in words: "42" is "forty two". One with a zero in front, or of more than fifteen digits, is read
    digit by digit."""
    if len(digits) > 3 * len(_THOUSANDS) or (len(digits) > 1 and digits[0] == "0"):
        return " ".join(_SMALL[int(digit)] for digit in digits)
    number, words = int(digits), []
    for power in reversed(range(len(_THOUSANDS))):
        group = number // 1000**power % 1000
        if group:
            words += [_below_thousand(group), _THOUSANDS[power]]
    return " ".join(filter(None, words)) or _SMALL[0]


def _below_thousand(number: int) -> str:
    hundreds, rest = divmod(number, 100)
    words = [_SMALL[hundreds], "hundred"] if hundreds else []
    if rest >= 20:
        words += [_TENS[rest // 10 - 2], *([_SMALL[rest % 10]] if rest % 10 else [])]
    elif rest:
        words.append(_SMALL[rest])
    return " ".join(words)


def _ordinal(words: str) -> str:
    before, _, last = words.rpartition(" ")
    last = _ORDINAL.get(last) or (f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th")
    return f"{before} {last}".strip()


def _spell(found: re.Match[str]) -> str:
    words = number_words(found["whole"].replace(",", ""))
    if found["part"] is not None:
        words += " point " + " ".join(_SMALL[int(digit)] for digit in found["part"])
    elif found["th"] is not None:
        words = _ordinal(words)
    sign = found["before"] or (found["after"] or "").strip()
    unit = _SIGNS[sign][words != "one"] if sign else ""
    words = " ".join(filter(None, ["minus" if found["minus"] else "", words, unit]))
    text, start, end = found.string, found.start(), found.end()
    left = " " if start and text[start - 1].isalnum() else ""
    return f"{left}{words}{' ' if text[end : end + 1].isalnum() else ''}"


def spell_numbers(text: str) -> str:
    """The text with its numbers in words: "the 3rd costs $4.50" is "the third costs four point five zero dollars"."""
    return _NUMBER.sub(_spell, text)
