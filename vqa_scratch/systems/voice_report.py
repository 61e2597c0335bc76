"""How a voice run is judged and shown: word errors by way of decoding, and a page of what was said and heard."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vqa_scratch.data.spoken import Utterance, plain
from vqa_scratch.data.vqa_v2 import spread
from vqa_scratch.metrics import word_error_rate
from vqa_scratch.report.gallery import card, write_page
from vqa_scratch.systems.finals import cut_short

WAYS = ("attention greedy", "attention beam", "ctc greedy", "ctc beam")  # the first is that of `transcribe`
Heard = dict[str, dict[int, str]]  # by way of decoding, by row


def error_rates(
    utterances: Sequence[Utterance], heard: Heard, kind: str | None = None, *, other: int = 0
) -> dict[str, float]:
    """{way: word error rate} of the rows that were heard, or of those of a kind; with `other`, each text is compared
    with what was heard so many rows further on."""
    rates = {}
    for way, texts in heard.items():
        rows = sorted(row for row in texts if kind in (None, utterances[row].kind))
        said, found = [plain(utterances[row].text) for row in rows], [plain(texts[row]) for row in rows]
        rates[way] = word_error_rate(said, found[other:] + found[:other])
    return rates


def figures_of(utterances: Sequence[Utterance], heard: Heard) -> dict[str, Any]:
    """The figures of what was heard in all of the `WAYS`, for summary.json."""
    rows = heard[WAYS[0]]
    errors = error_rates(utterances, heard)
    kinds = dict.fromkeys(utterances[row].kind for row in rows)
    return {
        "accuracy": max(0.0, 1 - errors[WAYS[0]]),
        "wer": errors[WAYS[0]],
        "utterances_heard": len(rows),
        "word_errors": errors,
        "word_errors_by_kind": {kind: error_rates(utterances, heard, kind) for kind in kinds},
        "baselines": {"shuffled_audio": error_rates(utterances, heard, other=len(rows) // 2)},
    }


def lines_of(summary: Mapping[str, Any]) -> list[str]:
    """The figures as a table, a way of decoding a row."""
    columns = {
        "all": summary["word_errors"],
        **summary["word_errors_by_kind"],
        "shuffled audio": summary["baselines"]["shuffled_audio"],
    }
    if "seconds_an_utterance" in summary:
        columns["s an utterance"] = summary["seconds_an_utterance"]
    lines = ["word errors         " + "".join(f"{name:>16s}" for name in columns)]
    lines += [f"{way:20s}" + "".join(f"{column[way]:16.4f}" for column in columns.values()) for way in WAYS]
    if times := summary.get("word_times_ms"):
        lines.append("middle of a word, ms " + ", ".join(f"{name} {ms:.0f}" for name, ms in times.items()))
    return [*lines, *(cut_short(dict(summary)) if "cut_short" in summary else [])]


def picture_of(mel: np.ndarray) -> Image.Image:
    """A log-mel (T, M) as a picture: time to the right, high frequencies above."""
    low, high = float(mel.min()), float(mel.max())
    shades = (255 * (mel.astype(np.float32) - low) / max(high - low, 1e-6)).astype(np.uint8)
    return Image.fromarray(np.flipud(shades.T).copy()).convert("RGB")


def show(folder: Path, figures: Mapping[str, Any], utterances: Sequence[Utterance], heard: Heard, number: int) -> None:
    """samples.html: some utterances of each kind, with what each way of decoding makes of them."""
    sections = []
    kinds = list(figures["word_errors_by_kind"])
    for kind in kinds:
        cards = []
        for row in spread(
            [row for row in sorted(heard[WAYS[0]]) if utterances[row].kind == kind], number // len(kinds)
        ):
            one, said = utterances[row], plain(utterances[row].text)
            rate = word_error_rate([said], [plain(heard[WAYS[0]][row])])
            verdict = "right" if rate == 0 else "partly" if rate < 0.5 else "wrong"
            others = "<br>".join(f"{way}: {escape(heard[way][row]) or '(nothing)'}" for way in WAYS[1:])
            note = f"word errors {rate:.2f}"
            cards.append(card(picture_of(one.mel), one.text, heard[WAYS[0]][row], verdict, note, others))
        sections.append((kind, cards))
    rates = ", ".join(f"{way} {rate:.4f}" for way, rate in figures["word_errors"].items())
    blind = figures["baselines"]["shuffled_audio"][WAYS[0]]
    lead = (
        f"Utterances that training never heard: the log-mel, what was said, and what {WAYS[0]} decoding hears: green "
        f"if all words are right, amber if most are. Word errors of all: {rates}; {blind:.2f} if each hears another "
        "utterance."
    )
    write_page(folder / "samples.html", f"What is heard (word errors {figures['wer']:.4f})", lead, sections)
