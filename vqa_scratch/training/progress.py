"""The log of a run, metrics.jsonl, its progress bar, and the memory that it takes."""

import json
import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from tqdm import tqdm

from vqa_scratch.errors import UserError
from vqa_scratch.storage import append_line, parse_json, write_text

INTERVAL = 0.5  # seconds between two looks of a bar
SEEN = 1.0  # the same once a training loop has made its first step, which is awaited
RECENT = 10.0  # seconds that the speed on the bar is measured over


class MetricsLog:
    """metrics.jsonl: one JSON object a line, each with its `step`. `resume_after` drops the lines after that step.

    With `on_disk=False` the rows stay in memory: only one rank writes the file. `also` sends them to "tensorboard"
    (event files beside the log) or "wandb" too.
    """

    def __init__(
        self, path: Path, resume_after: int | None = None, on_disk: bool = True, also: str | None = None
    ) -> None:
        self.path, self.on_disk = path, on_disk
        self.send = SENDERS[also](path.parent) if also and on_disk else lambda step, values: None
        self.rows = [] if resume_after is None else [r for r in read_metrics(path) if r["step"] <= resume_after]
        if on_disk:
            write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, step: int, **values: Any) -> None:
        row = {"step": step, **values}
        self.rows.append(row)
        if self.on_disk:
            append_line(self.path, json.dumps(row))
        self.send(step, plain_numbers(values))


def plain_numbers(values: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """The numbers among `values` and inside its dicts, by name: "val/accuracy"."""
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            numbers |= plain_numbers(value, f"{before}{name}/")
        elif isinstance(value, int | float):
            numbers[before + name] = value
    return numbers


def to_tensorboard(folder: Path) -> Callable[[int, dict[str, float]], None]:
    """A function that writes the numbers of a step for TensorBoard. Raises UserError if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--log-to tensorboard needs it: pip install 'vqa-scratch[log]'") from None
    writer = SummaryWriter(folder)

    def send(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send


def to_wandb(folder: Path) -> Callable[[int, dict[str, float]], None]:
    """A function that sends the numbers of a step to Weights & Biases. Raises UserError if it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError("--log-to wandb needs it: pip install 'vqa-scratch[log]'") from None
    run = wandb.init(dir=folder, name=folder.name, id=folder.name, resume="allow")
    return lambda step, values: run.log(values, step=step)


SENDERS = {"tensorboard": to_tensorboard, "wandb": to_wandb}


def _drawn(value: Any) -> bool:
    """Whether a value of a row can be drawn: a number, or several by name, of which some may be missing."""
    if isinstance(value, dict):
        return all(part is None or isinstance(part, int | float) for part in value.values())
    return isinstance(value, int | float)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut short by a kill is left out.

    Raises UserError for any other line that is no row, rather than lose those after it.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line.decode(), path) if line else None
            if line and not (
                isinstance(row, dict) and isinstance(row.get("step"), int) and all(map(_drawn, row.values()))
            ):
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


class Display:
    """stderr for a progress bar. What nobody reads any more is dropped: a run outlives the reader of its output."""

    def __init__(self) -> None:
        self.stream = sys.stderr

    def write(self, text: str) -> None:
        with suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Redrawn:
    """A context in which a thread calls `draw` every `interval` seconds: what runs there knows nothing of it."""

    interval = INTERVAL

    def __init__(self, draw: Callable[[], object]) -> None:
        self.draw, self.over = draw, threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _run(self) -> None:
        while not self.over.wait(self.interval):
            self.draw()


class Bar(Redrawn):
    """The progress bar of a training loop.

    `share()` is the share of the run that is done. `progress` has its `step`, its `samples`, whose unit is `unit`, and
    the `best` validation so far; `rows` are those of its log. The speed is that of the last seconds; nothing is said of
    the first step, which is slow.
    """

    def __init__(self, share: Callable[[], float], progress: Any, rows: list[dict[str, Any]], unit: str) -> None:
        self.share, self.progress, self.rows, self.unit = share, progress, rows, unit
        super().__init__(self._draw)
        self.seen: deque[tuple[float, int]] = deque()  # (time, samples) where the number of samples had changed

    def __enter__(self) -> Self:
        shape = "{desc} {percentage:5.1f}%|{bar}| {elapsed}<{remaining}{postfix}"
        self.first = self.progress.samples
        done = round(100 * self.share(), 2)
        self.bar = tqdm(total=100.0, initial=done, desc="training", bar_format=shape, file=Display())
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._draw()
        self.bar.close()

    def speed(self, now: float) -> float | None:
        """Samples a second over the last seconds, from the end of the first step on; None before the second one."""
        samples = self.progress.samples
        if samples > (self.seen[-1][1] if self.seen else self.first):
            self.seen.append((now, samples))
            self.interval = SEEN
        while len(self.seen) > 2 and self.seen[1][0] < now - RECENT:
            self.seen.popleft()
        if len(self.seen) < 2:
            return None
        return (self.seen[-1][1] - self.seen[0][1]) / (self.seen[-1][0] - self.seen[0][0])

    def _draw(self) -> None:
        speed = self.speed(time.perf_counter())
        self.bar.n = round(100 * self.share(), 2)
        rate = "" if speed is None else f", {speed:.0f} {self.unit}/s"
        row = next((row for row in reversed(self.rows) if "loss" in row), {"step": 0})
        loss = f", loss {row['loss']:.3f}, right {row['token_accuracy']:.2f}" if row["step"] > 1 else ""
        best = f", val {self.progress.best:.3f}" if self.progress.best >= 0 else ""
        self.bar.set_postfix_str(f"step {self.progress.step}{loss}{best}{rate}")


def peak_memory_gb(device: torch.device) -> float:
    """The most memory used so far, in 10**9 bytes: of the GPU if it is the device, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
