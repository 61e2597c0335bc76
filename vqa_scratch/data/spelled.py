"""Numbers as words, for a voice that knows letters only."""

import re

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_THOUSANDS = ("", "thousand", "million", "billion", "trillion")
_ORDINAL = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth"}
_ORDINAL["twelve"] = "twelfth"
_SIGNS = {"$": "dollar", "€": "euro", "£": "pound", "%": "percent"}
_NUMBER = re.compile(
    r"((?<![\w.])-(?=[$€£\d]))?([$€£])?(\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.(\d+))?(?:(\s?%)|(st|nd|rd|th)\b)?", re.ASCII
)


def _whole(digits: str) -> str:
    """ "42" is "forty two"; one with a zero in front, or of more than 15 digits, is read digit by digit."""
    if len(digits) > 3 * len(_THOUSANDS) or digits[0] == "0":
        return _each(digits)
    words = []
    for power in reversed(range(len(_THOUSANDS))):
        group = int(digits) // 1000**power % 1000
        hundreds, rest = divmod(group, 100)
        words += [_SMALL[hundreds], "hundred"] if hundreds else []
        words += [_TENS[rest // 10 - 2]] if rest >= 20 else []
        rest = rest % 10 if rest >= 20 else rest
        words += [_SMALL[rest]] if rest else []
        words += [_THOUSANDS[power]] if group else []
    return " ".join(filter(None, words))


def _each(digits: str) -> str:
    return " ".join(_SMALL[int(digit)] for digit in digits)


def _spell(found: re.Match[str]) -> str:
    minus, before, whole, part, after, ordinal = found.groups()
    words = _whole(whole.replace(",", "")) + (f" point {_each(part)}" if part else "")
    if ordinal and not part:
        start, _, last = words.rpartition(" ")
        last = _ORDINAL.get(last, f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th")
        words = f"{start} {last}".strip()
    if unit := _SIGNS.get(before or (after or "").strip()):
        words += f" {unit}" + ("s" if words != "one" and unit != "percent" else "")
    letters = found.string[found.start() - 1 : found.start()].isalnum(), found.string[found.end() :][:1].isalnum()
    return f"{' ' * letters[0]}{'minus ' if minus else ''}{words}{' ' * letters[1]}"


def spell_numbers(text: str) -> str:
    """The text with its numbers in words: "the 3rd costs $4.50" is "the third costs four point five zero dollars"."""
    return _NUMBER.sub(_spell, text)
