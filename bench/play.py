"""The live page in Chromium: how long a visitor waits for it, and its pictures.

Times are taken inside the page: from the click to the frame that shows the answer. Each is the median of `repeats`;
dragging is measured for two seconds, with the mouse.
"""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import click
import torch

from bench import results, timing
from vqa_scratch.errors import UserError

if TYPE_CHECKING:
    from playwright.sync_api import Page

IMAGES = results.ROOT / "docs" / "images"
ASK = "document.getElementById('asked').requestSubmit()"
CHANGE = "document.querySelector('.make').requestSubmit()"
UNDO = "document.querySelector('.undo').click()"
GOALS = {
    "first paint, ms": "at most 1000",
    "ask to answer, ms": "at most 150",
    "knock-out to new answer, ms": "at most 150",
    "re-asks a second, dragging": "10",
    "all heads, s": "at most 3",
}


@contextmanager
def served(*arguments: str | Path) -> Iterator[tuple[str, int]]:
    """(address, process id) of `python -m vqa_scratch play` with these arguments; it ends with the context."""
    words = [sys.executable, "-m", "vqa_scratch", "play", *map(str, arguments), "--no-browser", "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"http://\S+", line):
                yield found[0], process.pid
                return
        raise UserError(f"the page was not served: {' '.join(words[1:])}")
    finally:
        process.terminate()
        process.wait(10)


def after(page: "Page", event: str, act: str) -> float:
    """Milliseconds from `act`, a statement of the page, to the frame after `event`."""
    return page.evaluate(
        f"""() => new Promise((done) => {{
            const began = performance.now();
            const end = () => requestAnimationFrame(() => setTimeout(() => done(performance.now() - began)));
            document.addEventListener("live-{event}", end, {{ once: true }});
            {act};
        }})"""
    )


def re_asks(page: "Page", seconds: float) -> float:
    """Answers a second while the first object of the scene is dragged around."""
    page.evaluate("() => { window.asked = 0; document.addEventListener('live-answered', () => (window.asked += 1)); }")
    box = page.locator("#canvas").bounding_box()
    item = page.locator("#canvas .object").first.bounding_box()
    assert box is not None and item is not None
    page.mouse.move(item["x"] + item["width"] / 2, item["y"] + item["height"] / 2)
    page.mouse.down()
    began, step = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        step += 1
        page.mouse.move(box["x"] + box["width"] * (0.3 + 0.004 * (step % 100)), box["y"] + box["height"] / 2)
    page.mouse.up()
    return page.evaluate("() => window.asked") / (time.perf_counter() - began)


def opened(page: "Page", address: str) -> None:
    """Open the page and wait for the study of the first answer, and for its heads."""
    page.add_init_script("document.addEventListener('live-counted', () => { window.counted = true; })")
    page.goto(address)
    page.wait_for_function("() => window.counted")


def figures(page: "Page", address: str, repeats: int = 5, seconds: float = 2.0) -> dict[str, float]:
    """{what: figure} of the page at this address."""
    opened(page, address)
    painted = page.evaluate("() => performance.getEntriesByName('first-contentful-paint')[0].startTime")
    asked = [after(page, "answered", ASK) for _ in range(repeats)]
    changed = []
    for _ in range(repeats):
        changed.append(after(page, "answered", CHANGE))
        after(page, "answered", UNDO)
    after(page, "studied", ASK)
    heads = after(page, "counted", "")
    measured = (painted, median(asked), median(changed), re_asks(page, seconds), heads / 1000)
    return dict(zip(GOALS, measured, strict=True))


def pictures(page: "Page", address: str, folder: Path) -> None:
    """play.png: a question; play-change.png: without the heads that matter most, until the answer is another;
    play-tour.png: the tour, dark."""
    opened(page, address)
    where = "[...document.querySelectorAll('#examples button')].find((b) => b.textContent.startsWith('where'))"
    after(page, "counted", f"{where}.click()")
    page.screenshot(path=folder / "play.png")
    for _ in range(4):
        after(page, "counted", "document.querySelector('.matter [aria-label^=\"knock out d\"]').click()")
        if page.locator(".unchanged.differs").count():
            break
    page.screenshot(path=folder / "play-change.png")
    page.locator("#theme").click()
    after(page, "studied", UNDO)
    page.locator("#start-tour").click()
    page.locator("#tour .next").click()
    page.screenshot(path=folder / "play-tour.png")


def run(folder: Path, repeats: int, write: bool, command: str) -> str:
    """Serve the run, measure, and with `write` take the pictures; returns the section of the results file."""
    from tests import browser  # which needs what only tests are installed with

    if not browser.available():
        raise UserError(f"the benchmark {browser.MISSING}")
    with served(folder) as (address, _), browser.Browser(height=900) as window:
        measured = figures(window.page, address, repeats)
        if write:
            with browser.Browser(width=1440, height=1000) as camera:
                pictures(camera.page, address, IMAGES)
    browser.close()
    rows = [[name, f"{value:.{0 if value >= 20 else 1}f} (goal {GOALS[name]})"] for name, value in measured.items()]
    return "\n".join(
        [
            "## The live page",
            "",
            " ".join(__doc__.split("\n\n")[1].split()),
            "",
            results.table(["what", "in Chromium"], rows),
            "",
            f"- {timing.machine('cpu')}. torch {torch.__version__}. Commit {timing.commit(Path(__file__).parent)}. "
            f"`{command}`",
        ]
    )


@click.command("play")
@click.option("--run", "folder", type=click.Path(path_type=Path), default="runs/vqa", show_default=True, help="Served.")
@click.option("--repeats", type=click.IntRange(1), default=9, show_default=True, help="Of each time.")
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md, and the pictures into docs/images.")
def command(folder: Path, repeats: int, write: bool) -> None:
    """The live page in Chromium: first paint, ask, knock-out, dragging, all heads; and its pictures."""
    results.present("play", run(folder, repeats, write, results.command_given()), write)
