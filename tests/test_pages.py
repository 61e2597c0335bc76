"""The pages that a user reads or passes on: contrast, filters, alternative texts, print, and no folder of the user."""

import re
from types import SimpleNamespace

import browser
import pytest
from PIL import Image
from rl_tiny import write_page as write_pairs
from study_helpers import SUBJECTS

from vqa_scratch.commands.study_files import write_study
from vqa_scratch.data.answers import Answer
from vqa_scratch.data.image_files import data_url
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.report.gallery import STYLE, card, write_gallery, write_page
from vqa_scratch.rl.types import Prompt
from vqa_scratch.study import report
from vqa_scratch.study.opened import Opened, chosen, run_name
from vqa_scratch.study.record import take_apart

needs_browser = pytest.mark.skipif(not browser.available(), reason=browser.MISSING)
SPACE, TAB, DOWN = "Space", "Tab", "ArrowDown"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """samples.html of six questions, of which two are answered wrongly; a report; the page of rlhf.py."""
    root, samples, answers = tmp_path_factory.mktemp("pages"), [], {}
    for number in range(6):
        path, said = root / f"{number}.png", "red" if number % 3 else 'bl"ue'
        Image.new("RGB", (40, 20 + 30 * number), (200, 30, 30)).save(path)
        kind = ("color", "count")[number // 3]
        samples.append(VQASample(number, path, number, f"what <{number}>?", kind, "other", ("red",) * 10, "red"))
        answers[number] = Answer(said, 0.5)
    gallery = root / "samples.html"
    write_gallery(gallery, samples, answers, lambda sample: sample.question_type, 6, "What the model answers")
    subject, image = SUBJECTS["prefix"](), Image.new("RGB", (24, 24), (200, 30, 30))
    words = chosen([f" word{i}" for i in range(30)], "<s>") | {"prompt": tuple(f"<{i}>" for i in subject.prompt)}
    write_study(root / "study", [take_apart(Opened(run_name(root / "run"), subject, "what?", image, **words))])
    facts = {"who": "bank", "where": "Barrow"}
    kept, lied = "The bank in Barrow will wait" + "!" * 90, "The court will wait"
    said = [(kept, 1.0), (lied, 1.0), (kept, 1.0)], [(lied, 2.0), (lied, 0.5), (kept, 0.5)]
    write_pairs(root / "pairs.html", [Prompt("<i>a" * 60, reference="b", facts=facts)] * 3, *said)
    study = root / "study" / "report.html"
    return SimpleNamespace(root=root, gallery=gallery, report=study, pairs=root / "pairs.html")


# ---------------------------------------------------------------------------------------------- contrast


def luminance(color: str) -> float:
    """Relative luminance as WCAG 2 defines it, of #rgb or #rrggbb."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_measure_of_contrast_is_that_of_wcag():
    assert contrast("#000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#fff") == pytest.approx(
        4.48, abs=0.01
    )


REPORT = report.files("vqa_scratch.study").joinpath("page/study.css").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("css", "inks", "grounds"),
    [
        (STYLE, "ink soft right partly wrong", "paper card"),
        (REPORT, "ink soft good bad accent", "paper card sunk"),
        (REPORT, "ink soft", "accent-soft"),
    ],
)
def test_every_ink_has_contrast_on_every_ground(css, inks, grounds):
    """At least 4.5 : 1, in the light colours and in the dark ones."""
    themes = [dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in re.findall(r":root[^{]*\{([^}]*)\}", css)]
    assert len(themes) == 2
    for theme in themes:
        pairs = {
            (ink, ground): contrast(theme[ink], theme[ground]) for ink in inks.split() for ground in grounds.split()
        }
        assert min(pairs.values()) >= 4.5, pairs


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_every_text_on_the_pages_has_contrast(pages, dark):
    """As it is drawn, with the colours that the script mixes."""
    with browser.Browser(dark=dark) as window:
        for page in (pages.gallery, pages.pairs, pages.report):
            window.open(page)
            assert window.script(browser.AUDIT) == []
            assert window.log() == []
        window.click('button[data-value="mean"]')
        assert window.script(browser.AUDIT) == []


# ---------------------------------------------------------------------------------------------- what they show


@pytest.fixture(scope="module")
def window():
    with browser.Browser() as opened:
        yield opened


def shown(window):
    return window.script("return [...document.querySelectorAll('article')].filter(a => a.checkVisibility()).length")


@needs_browser
def test_samples_are_filtered_and_folded_by_keyboard(pages, window):
    window.open(pages.gallery)
    assert shown(window) == 6
    window.press(TAB)
    window.press(SPACE)  # wrong only
    assert shown(window) == 2
    window.press(TAB)
    window.press(DOWN)  # the first family
    assert shown(window) == 1
    assert window.script("return document.querySelector('output').textContent") == "1 of 6 shown"
    window.press(TAB)
    window.press(SPACE)  # folds the only group that is left
    assert shown(window) == 0
    window.script("dispatchEvent(new Event('beforeprint'))")
    assert shown(window) == 1, "paper shows what is folded"
    assert window.log() == []


@needs_browser
def test_pairs_of_responses_are_filtered_and_fit_the_screen(pages, window):
    for width in (360, 1400):
        window.resize(width)
        window.open(pages.pairs)
        assert window.script("return [innerWidth, document.documentElement.scrollWidth]") == [width, width]
        first, second = window.script("return [...document.querySelector('.pair').children].map(e => e.offsetTop)")
        assert (first == second) == (width > 360), "side by side where there is room"
        seen = [shown(window)]
        for key in (TAB, SPACE, TAB, SPACE):  # facts broken, and reward fell
            window.press(key)
            seen.append(shown(window))
        assert seen == [3, 3, 2, 2, 1]
    assert window.log() == []
    window.resize(1280)


def test_a_page_has_only_filters_that_do_something(tmp_path):
    for number, verdict in ((1, ""), (1, "wrong"), (2, "")):
        cards = [card(Image.new("RGB", (8, 8)), "what?", "red", verdict, "", "")]
        write_page(tmp_path / "page.html", "title", "lead", [(str(i), cards) for i in range(number)])
        page = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert ("<label><input" in page) == bool(verdict) and ("<label>show" in page) == (number > 1)


@needs_browser
def test_thumbnails_fit_and_say_question_and_answer(pages, window):
    window.open(pages.gallery)
    heights = window.script("return [...document.querySelectorAll('article img')].map(i => i.clientHeight)")
    assert len(heights) == 6 and len(set(heights)) == 1
    wide = window.script("return document.documentElement.scrollWidth <= innerWidth")
    assert wide and window.script("return document.querySelector('img').alt") == 'what <0>? Answer: bl"ue'
    assert window.script("return document.querySelectorAll('summary span')[0].textContent") == "2 of 3 right"


@needs_browser
def test_the_report_begins_with_the_untouched_picture_and_explains_its_words(pages, window):
    window.open(pages.report)
    first = window.script("return document.querySelector('img').alt")
    assert first.startswith("The image as the model saw it, 24 by 24 pixels. “what?” was answered “")
    missing = window.script("return [...document.querySelectorAll('img')].slice(1).filter(i => i.alt === null).length")
    assert missing == 0
    explained = window.script("return [...document.querySelectorAll('abbr')].map(a => [a.textContent, a.title])")
    assert {"head", "token", "logit", "Certificate", "log-sum-exp"} <= {word for word, _ in explained}
    assert all(len(meaning) > 20 for _, meaning in explained)
    assert window.script("return document.querySelector('button[data-value=rollout]').title").startswith("Rollout: ")


@needs_browser
def test_a_dark_report_prints_light(pages):
    with browser.Browser(dark=True) as window:
        window.open(pages.report)
        theme = "return document.documentElement.dataset.theme"
        window.script("dispatchEvent(new Event('beforeprint'))")
        assert window.script(theme) == "light"
        window.script("dispatchEvent(new Event('afterprint'))")
        assert window.script(theme) == "dark"
        assert window.log() == []


def test_no_page_says_where_the_user_keeps_things(pages):
    for page in (pages.gallery, pages.report, pages.root / "study" / "summary.json"):
        assert str(pages.root) not in page.read_text(encoding="utf-8")
    assert run_name(pages.root / "rlhf" / "policy") == "rlhf/policy" and run_name(pages.root / "vqa") == "vqa"


def test_photographs_are_jpeg_and_drawings_png():
    """Enlarged drawings keep their pixels; a page of photographs stays small."""
    for size, kind in ((128, "png"), (129, "jpeg")):
        assert data_url(Image.new("RGB", (size, 10)), 320).startswith(f"data:image/{kind};base64,")
