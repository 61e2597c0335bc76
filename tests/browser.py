"""A headless Chromium for tests, by Playwright: one process for all tests of a worker, a window of its own for each."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any, Self

try:
    from playwright.sync_api import Browser as Chromium
    from playwright.sync_api import Page, Playwright, sync_playwright
except ImportError:
    sync_playwright = None

MISSING = "needs playwright and a Chromium: pip install playwright, then playwright install chromium or the system's"
SYSTEM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGUMENTS = ["--no-sandbox", "--disable-dev-shm-usage", "--use-fake-device-for-media-stream"]

# Every text whose contrast with what it is drawn on is less than 4.5 : 1 (WCAG 2), as the body of a function.
AUDIT = """
const rgba = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
const over = (c, below) => [0, 1, 2].map((i) => c[i] * c[3] + below[i] * (1 - c[3]));
const light = (rgb) => rgb.map((v) => v / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const bad = [];
for (const e of document.querySelectorAll("body *")) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || !e.checkVisibility() || e.closest("script, .hidden, option")) continue;
  const above = [];
  for (let at = e; at; at = at.parentElement) above.unshift(rgba(getComputedStyle(at).backgroundColor));
  const ground = above.reduce((below, c) => over(c, below), [255, 255, 255]);
  const ink = over(rgba(getComputedStyle(e).color), ground), [a, b] = [light(ink), light(ground)].sort((x, y) => x - y);
  if ((b + 0.05) / (a + 0.05) < 4.5) bad.push(`${e.className || e.tagName}: ${e.textContent.slice(0, 30)}`);
}
return bad;
"""


def _system() -> str | None:
    return next(filter(None, map(shutil.which, SYSTEM)), None)


@cache
def _driver() -> "Playwright":
    return sync_playwright().start()


@cache
def chromium() -> "Chromium":
    """The system's Chromium, else Playwright's own; started once, and closed by `close`."""
    return _driver().chromium.launch(executable_path=_system(), args=ARGUMENTS)


@cache
def available() -> bool:
    """Whether this machine has Playwright and a browser for it."""
    if sync_playwright is None:
        return False
    return _system() is not None or Path(_driver().chromium.executable_path).exists()


def close() -> None:
    """End the browser and Playwright, if they were started."""
    if chromium.cache_info().currsize:
        chromium().close()
    if _driver.cache_info().currsize:
        _driver().stop()
    chromium.cache_clear()
    _driver.cache_clear()


class Browser:
    """One window, with storage of its own. Use with `with`; `page` is Playwright's."""

    page: "Page"

    def __init__(self, *, dark: bool = False, width: int = 1280, height: int = 1000) -> None:
        scheme = "dark" if dark else "light"
        size = {"width": width, "height": height}
        self.context = chromium().new_context(viewport=size, color_scheme=scheme, accept_downloads=True)
        self.context.set_default_timeout(30_000)  # of a machine with much else to do
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.context.close()

    def open(self, path: Path) -> None:
        """A file from disk."""
        self.page.goto(path.resolve().as_uri())

    def resize(self, width: int, height: int = 1000) -> None:
        """Lay pages out for a screen of this size; a phone's is narrower than any window."""
        self.page.set_viewport_size({"width": width, "height": height})

    def script(self, code: str) -> Any:
        """What the body of a function returns."""
        return self.page.evaluate(f"() => {{ {code}\n }}")

    def click(self, selector: str) -> None:
        """As a mouse would: the first element of a CSS selector, scrolled into view."""
        self.page.locator(selector).first.click()

    def press(self, key: str) -> None:
        """One key, by Playwright's name for it, to whatever has the focus."""
        self.page.keyboard.press(key)

    def log(self) -> list[str]:
        """Console messages and uncaught errors since the last call."""
        self.page.evaluate("0")  # so that what was said before this has arrived
        said, self.said = self.said, []
        return said
