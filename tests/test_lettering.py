"""Pictures with text of any script: fonts that cover it, lines that break, and no empty boxes."""

import warnings

import numpy as np
from PIL import Image

from vqa_scratch.report.curves import draw_panels
from vqa_scratch.report.lettering import choose, wrapped
from vqa_scratch.report.table import draw_table


def test_fonts_are_chosen_to_cover_the_text():
    """By hand: the font with most of what is missing comes first, and what none has is written as its code."""
    fonts = {
        "DejaVu Sans": frozenset(map(ord, "abc ")),
        "Two": frozenset(map(ord, "猫狗")),
        "One": frozenset([ord("猫")]),
    }
    assert choose(["abc", "a b"], fonts).families == ["DejaVu Sans"]
    both = choose(["a 猫狗鱼"], fonts)
    assert both.families == ["DejaVu Sans", "Two"] and both.missing == "鱼"
    assert both.legible("a 猫鱼") == "a 猫[U+9C7C]"


def test_fonts_that_draw_boxes_do_not_count():
    """matplotlib brings one that claims every character: what only it has is missing."""
    assert choose(["\U000e0101"]).missing == "\U000e0101"


def test_lines_break_between_words_and_between_wide_characters():
    assert wrapped("aa bb cc", 5).split("\n") == ["aa bb", "cc"]
    assert wrapped("一二三四五", 4).split("\n") == ["一二", "三四", "五"]
    assert wrapped("abcdefgh", 3).split("\n") == ["abc", "def", "gh"]
    assert wrapped("", 3) == "" and wrapped("a 一二", 4).split("\n") == ["a 一", "二"]


def test_pictures_draw_no_empty_box(tmp_path):
    """matplotlib warns of a glyph that its fonts lack; no text of any script makes it do so. Dollars are no formula."""
    texts = "猫 🐈 кошка \u0600 $\\notatex{$"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_table(tmp_path / "t.png", texts, (texts, "b"), [(texts, "")], (2, 2))
        panel = {"title": texts, "ylabel": texts, "lines": {texts: ([1, 2], [1, 2])}, "hlines": {"$5 猫": 1.5}}
        draw_panels(tmp_path / "c.png", [panel])


def test_pictures_in_a_table_keep_their_shape(tmp_path):
    """A red image twice as wide as high, found in the picture again; the frame hides a pixel at each side."""
    draw_table(tmp_path / "a.png", "", ("image",), [[np.full((10, 20, 3), (255, 0, 0), np.uint8)]], (1,))
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    red = (pixels[..., 0] > 250) & (pixels[..., 1] < 5)
    deep, broad = (np.ptp(axis.nonzero()[0]) + 1 for axis in (red.any(1), red.any(0)))
    assert broad > 90 and abs(broad - 2 * deep) <= 4


def test_a_table_takes_any_text_and_grows_with_it(tmp_path):
    rows = [[np.zeros((8, 8, 3), np.uint8), "$x_1$ and $5 <b>", "große Katze, большая кошка " * 8]]
    assert draw_table(tmp_path / "a.png", "title", ("image", "one", "two"), rows, (1, 2, 2)) == ""
    assert draw_table(tmp_path / "b.png", "title", ("image", "one", "two"), rows * 3, (1, 2, 2)) == ""
    small, tall = Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.png")
    assert small.width == tall.width and tall.height > 2 * small.height
