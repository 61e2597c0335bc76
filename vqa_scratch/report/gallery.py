"""Writes samples.html: images with questions, the model's answers and probabilities, and the annotators' answers."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from vqa_scratch.data.answers import Answer, Answers
from vqa_scratch.data.image_files import data_url, is_small
from vqa_scratch.data.images import load_image
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.metrics import vqa_accuracy
from vqa_scratch.storage import write_text

STYLE = """
:root { color-scheme: light dark; --paper: #fafaf7; --ink: #1d1d1b; --soft: #64645e; --card: #fff; --line: #e4e3dd;
        --right: #1a7f4b; --partly: #8a5a00; --wrong: #b42318; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #171716; --ink: #ecebe6; --soft: #a3a29b;
        --card: #21211f; --line: #363632; --right: #4cc38a; --partly: #e2b203; --wrong: #ff8a7a; } }
body { margin: 2rem auto; max-width: 76rem; padding: 0 1.25rem; background: var(--paper); color: var(--ink);
       font: 16px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
p.lead { color: var(--soft); margin: 0; max-width: 46rem; }
form { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem 1.5rem; margin: 1.2rem 0 0; }
form[hidden] { display: none; } select, input { font: inherit; accent-color: var(--ink); }
output { color: var(--soft); }
:focus-visible { outline: 2.5px solid var(--right); outline-offset: 2px; }
details { margin-top: 1.6rem; } summary { cursor: pointer; margin-bottom: .8rem; }
h2 { display: inline; font-size: 1.05rem; margin: 0 .5rem 0 0; }
summary span { color: var(--soft); font-size: .875rem; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); }
article { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; overflow: hidden; }
article img { display: block; width: 100%; height: 12rem; object-fit: contain; background: var(--paper); }
img.pixels { image-rendering: pixelated; }
.text { padding: .8rem 1rem 1rem; } .question { font-weight: 600; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.answer { display: flex; flex-wrap: wrap; align-items: baseline; justify-content: space-between; gap: 0 1rem;
          margin: 0 0 .4rem; }
.answer b { font-size: 1.15rem; overflow-wrap: anywhere; } .right b { color: var(--right); }
.partly b { color: var(--partly); } .wrong b { color: var(--wrong); }
.grid:has(.pair) { grid-template-columns: minmax(0, 1fr); } .text p, .text li { overflow-wrap: anywhere; }
.pair { display: grid; gap: 0 2rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
h3 { font-size: .875rem; color: var(--soft); margin: .6rem 0 0; } .text > :first-child { margin-top: 0; }
.pair p { margin: .25rem 0 0; }
.lost { color: var(--wrong); font-size: .875rem; margin: .25rem 0 0; padding-left: 1.2rem; }
del, ins { text-decoration: none; border-radius: .2rem; } del { background: #e5534b33; } ins { background: #46954a44; }
.probability, .people { color: var(--soft); font-size: .875rem; } .people { margin: 0; overflow-wrap: anywhere; }
@media print { form { display: none; } article { break-inside: avoid; } summary { break-after: avoid; }
               body { margin: 0; max-width: none; } .grid { grid-template-columns: repeat(4, 1fr); gap: .5rem; }
               article img { height: 8rem; } }
"""

SCRIPT = """
"use strict";
const form = document.querySelector("form"), boxes = [...form.querySelectorAll("input")];
const family = form.querySelector("select"), groups = [...document.querySelectorAll("details")];
const cards = [...document.querySelectorAll("article")];
const hides = (group, card) => (family.value && group.dataset.name !== family.value) ||
  boxes.some((box) => box.checked && !card.querySelector(`.${box.value}`));
function filter() {
  for (const group of groups) {
    const here = [...group.querySelectorAll("article")];
    for (const card of here) card.hidden = hides(group, card);
    group.hidden = here.every((card) => card.hidden);
  }
  const shown = cards.filter((card) => !card.hidden).length;
  form.querySelector("output").textContent = `${shown} of ${cards.length} shown`;
}
form.addEventListener("input", filter);
addEventListener("beforeprint", () => groups.forEach((group) => { group.open = true; }));
form.hidden = false;
filter();
"""

VERDICTS = ("right", "partly", "wrong")
WRONG_ONLY = {"wrong only": "wrong"}
THUMBNAIL = 320  # pixels a side at most


def card(image: Image.Image, heading: str, said: str, verdict: str, note: str, people: str) -> str:
    """One article: the image, a heading, the model's text (green for the verdict "right", amber for "partly", red for
    "wrong") with a note beside it, and the people's texts below. `people` is HTML; all else is escaped here."""
    head, said = f"<p class=question>{escape(heading)}</p>" if heading else "", said or "(nothing)"
    kind, spoken = ' class="pixels"' if is_small(image) else "", f"{heading} Answer: {said}" if heading else said
    return (
        f'<article><img{kind} alt="{escape(spoken)}" src="{data_url(image, THUMBNAIL)}"><div class=text>{head}'
        f'<p class="answer {verdict}"><b>{escape(said)}</b>'
        f"<span class=probability>{escape(note)}</span></p>"
        f"<p class=people>{people}</p></div></article>"
    )


def _section(name: str, cards: Sequence[str]) -> str:
    """A group that folds, with how many of its cards are right if any was judged."""
    judged = {verdict: sum(f'class="answer {verdict}"' in one for one in cards) for verdict in VERDICTS}
    count = f"{judged['right']} of {len(cards)} right" if any(judged.values()) else f"{len(cards)}"
    return (
        f'<details open data-name="{escape(name)}"><summary><h2>{escape(name)}</h2><span>{count}</span></summary>'
        f"<div class=grid>{''.join(cards)}</div></details>"
    )


def write_page(
    path: Path,
    title: str,
    lead: str,
    sections: Sequence[tuple[str, Sequence[str]]],
    filters: Mapping[str, str] = WRONG_ONLY,
) -> None:
    """A page that needs no network: sections of (heading, cards), with filters by section and by what is in a card.

    `filters` are {label: class of an element}; those that no card has are left out.
    """
    every = "".join(one for _, cards in sections for one in cards)
    boxes = "".join(
        f'<label><input type=checkbox value="{name}"> {escape(label)}</label>'
        for label, name in filters.items()
        if re.search(rf'class="[^"]*\b{name}\b', every)
    )
    names = "".join(f'<option value="{escape(name)}">{escape(name)}' for name, _ in sections)
    page = (
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1><p class=lead>{escape(lead)}</p>"
        f"<form hidden>{boxes}"
        f"<label{'' if len(sections) > 1 else ' hidden'}>show "
        f'<select><option value="">everything{names}</select></label><output></output></form>'
        + "".join(_section(name, cards) for name, cards in sections)
        + f"<script>{SCRIPT}</script>"
    )
    write_text(path, page)


def _card(sample: VQASample, answer: Answer) -> str:
    accuracy = vqa_accuracy(answer.text, sample.answers) if sample.answers else None
    verdict = "" if accuracy is None else "right" if accuracy == 1 else "partly" if accuracy > 0 else "wrong"
    shown = "not scored" if accuracy is None else f"accuracy {accuracy:.2f}"
    people = ", ".join(f"{n}&times; {escape(text)}" for text, n in Counter(sample.answers).most_common())
    note = f"{100 * answer.probability:.0f} % sure, {shown}"
    return card(
        load_image(sample.image_path, upright=sample.upright), sample.question, answer.text, verdict, note, people
    )


def answer_sections(
    samples: Sequence[VQASample], answers: Answers, family: Callable[[VQASample], str], number: int
) -> list[tuple[str, list[str]]]:
    """Sections with about `number` of the answered samples, the same share of every family."""
    groups: dict[str, list[VQASample]] = {}
    for sample in samples:
        if sample.question_id in answers:
            groups.setdefault(family(sample), []).append(sample)
    each = max(1, number // max(1, len(groups)))
    sections = []
    for name, group in sorted(groups.items()):
        step = max(1, len(group) // each)  # spread over the split rather than taken from its start
        sections.append((name, [_card(sample, answers[sample.question_id]) for sample in group[::step][:each]]))
    return sections


def write_gallery(
    path: Path,
    samples: Sequence[VQASample],
    answers: Answers,
    family: Callable[[VQASample], str],
    number: int,
    title: str,
) -> None:
    """About `number` of the answered samples, the same share of every family, as one page that needs no network."""
    lead = (
        "Questions the model was not trained on. Its answer is green where the annotators agree with it "
        "fully, amber where some do, red where none does; the percentage is the probability of its answer: of a "
        "written one the product over its tokens, of one chosen from a list its own. Below stand the annotators' "
        "own answers."
    )
    write_page(path, title, lead, answer_sections(samples, answers, family, number))
