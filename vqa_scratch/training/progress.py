"""How far a run is: its bar, metrics.jsonl with its log, and the memory that it takes."""

import json
import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vqa_scratch.errors import UserError
from vqa_scratch.storage import append_line, write_text

RECENT = 10.0  # seconds that the speed on the bar is measured over


class Bar:
    """A context in which a thread draws a progress bar every second, so that the training loop knows nothing of it.

    `share()` is the share of the run that is done, `samples()` the samples seen so far, whose unit is `unit`, and
    `text()` what else to show. The speed is that of the last seconds; nothing is said of the first step, which is slow.
    """

    def __init__(
        self, share: Callable[[], float], samples: Callable[[], int], unit: str, text: Callable[[], str]
    ) -> None:
        self.share, self.samples, self.unit, self.text = share, samples, unit, text
        self.seen: deque[tuple[float, int]] = deque()  # (time, samples) where the number of samples had changed
        self.over = threading.Event()

    def __enter__(self) -> "Bar":
        shape = "{desc} {percentage:5.1f}%|{bar}| {elapsed}<{remaining}{postfix}"
        self.first = self.samples()
        self.bar = tqdm(total=100.0, initial=round(100 * self.share(), 2), desc="training", bar_format=shape)
        self.thread = threading.Thread(target=self._every_second, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self._draw()
        self.bar.close()

    def _every_second(self) -> None:
        while not self.over.wait(1.0):
            self._draw()

    def speed(self, now: float) -> float | None:
        """Samples a second over the last seconds, from the end of the first step on; None before the second one."""
        samples = self.samples()
        if samples > (self.seen[-1][1] if self.seen else self.first):
            self.seen.append((now, samples))
        while len(self.seen) > 2 and self.seen[1][0] < now - RECENT:
            self.seen.popleft()
        if len(self.seen) < 2:
            return None
        return (self.seen[-1][1] - self.seen[0][1]) / (self.seen[-1][0] - self.seen[0][0])

    def _draw(self) -> None:
        speed = self.speed(time.perf_counter())
        self.bar.n = round(100 * self.share(), 2)
        rate = "" if speed is None else f", {speed:.0f} {self.unit}/s"
        self.bar.set_postfix_str(self.text() + rate)


class MetricsLog:
    """metrics.jsonl: one JSON object a line, each with its `step`. `resume_after` drops the lines after that step.

    With `on_disk=False` the rows stay in memory: only one rank writes the file.
    """

    def __init__(self, path: Path, resume_after: int | None = None, *, on_disk: bool = True) -> None:
        self.path, self.on_disk = path, on_disk
        self.rows = [] if resume_after is None else [r for r in read_metrics(path) if r["step"] <= resume_after]
        if on_disk:
            write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, step: int, **values: Any) -> None:
        row = {"step": step, **values}
        self.rows.append(row)
        if self.on_disk:
            append_line(self.path, json.dumps(row))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut short by a kill is left out.

    Raises UserError for any other line that is no row, rather than lose those after it.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line else None
            if line and not (isinstance(row, dict) and isinstance(row.get("step"), int)):
                raise ValueError
        except ValueError:
            if number == len(lines):  # no line break after it: a kill cut it
                break
            raise UserError(
                f"{path}, line {number} is no row of a log; mend or remove it, or move the file away"
            ) from None
        if row is not None:
            rows.append(row)
    return rows


def peak_memory_gb(device: torch.device) -> float:
    """The most memory used so far, in 10**9 bytes: of the GPU if it is the device, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
