"""Writes and reads metrics.jsonl, the log of a run, and measures the memory that the run takes."""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from vqa_scratch.storage import append_line, write_text


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
    """The rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def peak_memory_gb(device: torch.device) -> float:
    """The most memory used so far, in 10**9 bytes: of the GPU if it is the device, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
