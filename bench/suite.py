"""Runs every benchmark in its own process, and prints a table of figures and goals.

A benchmark prints its section as Markdown. The figures are read from it: those before a column called "goal", or in a
cell before "(goal ...)".
"""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from bench.results import ROOT, about, cells_of, table

# The options with which the figures of RESULTS.md are taken, in the order of running.
CPU = {
    "train-step": ["--all"],
    "decode": ["--all"],
    "loss-head": ["--rounds", "3"],
    "cached-features": ["--all", "--rounds", "3"],
    "image-loading": [],
    "taps": [],
    "prefix": [],
    "ppo": ["--batch", "8", "--repeats", "3"],
    "grpo": [],
    "scale": [],
    "resolution": [],
    "binding": [],
    "quantize": [],
    "voice": [],
    "speak": ["--out", "runs/spoken"],
}
GPU = {
    "attention": [],
    "t5-bias": [],
    "loss-head": "--device cuda --precision bf16 --tokens 8192 --rounds 3".split(),
    "logprob": [],
    "decode": "--device cuda --size gpt2 --precision bf16".split(),
    "train-step": "--device cuda --precision bf16 --questions 64 --images 64 --rounds 3".split(),
    "cached-features": "--device cuda --all --rounds 3".split(),
}
NUMBER = re.compile(r"\d+(?:\.\d+)?")
INLINE = re.compile(r"(?P<figure>[^/()]*?) \(goal (?P<goal>[^)]*)\)")

Run = Callable[[Sequence[str]], tuple[int, str, str]]  # the words of a command -> exit status, stdout, stderr


class Figure(NamedTuple):
    """One figure beside its goal."""

    benchmark: str
    case: str
    figure: str
    goal: str

    @property
    def reached(self) -> str:
        """ "yes", "no", or "" where there is nothing to compare."""
        ours, goal = NUMBER.search(self.figure), NUMBER.search(self.goal)
        if not (ours and goal) or "not measured" in self.figure:
            return ""
        ours, goal = float(ours[0]), float(goal[0])
        return "yes" if (ours <= goal if "at most" in self.goal else ours >= goal) else "no"


def figures(benchmark: str, text: str) -> list[Figure]:
    """What the tables of a section say of goals."""
    found: list[Figure] = []
    head: list[str] | None = None
    for line in text.splitlines():
        if not line.startswith("|"):
            head = None
            continue
        cells = cells_of(line)
        if head is None:
            head = cells
        elif any(set(cell) - set("-: ") for cell in cells):
            found += _of_row(benchmark, head, cells)
    return found


def _of_row(benchmark: str, head: list[str], cells: list[str]) -> list[Figure]:
    named, pairs = zip(head, about(cells), strict=False), []
    case = ", ".join(f"{cell} {name}" if cell.isdecimal() else cell for name, cell in named)
    for at, (name, cell) in enumerate(zip(head, cells, strict=True)):
        if name == "goal" and cell not in ("", "none"):
            pairs.append((head[at - 1], cells[at - 1], cell))
        pairs += [(name, match["figure"], match["goal"]) for match in INLINE.finditer(cell)]
    several = len(pairs) > 1
    return [
        Figure(benchmark, f"{case}: {name}" if several else case, figure.replace("*", "").strip(), goal)
        for name, figure, goal in pairs
    ]


def process(words: Sequence[str]) -> tuple[int, str, str]:
    """Run `python -m bench WORDS`; what it says on stderr is shown as it comes, and kept."""
    command = [sys.executable, "-m", "bench", *words]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    with running, ThreadPoolExecutor(1) as reader:
        out, said = reader.submit(running.stdout.read), []
        for line in running.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            said.append(line)
        text = out.result()
    return running.returncode, text, "".join(said)


def run_all(plan: Mapping[str, Sequence[str]], write: bool, run: Run = process) -> tuple[str, list[str]]:
    """Run the benchmarks of the plan in order. Returns the table of what was reached, and who failed."""
    lines, failed = [], []
    for name, options in plan.items():
        words = [name, *options, *(["--write"] if write else [])]
        print(f"\n== python -m bench {' '.join(words)}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        status, text, said = run(words)
        seconds = f"{time.perf_counter() - start:.0f}"
        print(text)
        if status:
            why = (said.strip().splitlines() or [f"ended with status {status}"])[-1]
            failed.append(name)
            lines.append([name, f"failed: {why.removeprefix('error: ')}", "", "", "", seconds])
            continue
        found = figures(name, text)
        lines += [[*figure, figure.reached, seconds] for figure in found]
        if not found:
            lines.append([name, "done; it has no goal", "", "", "", seconds])
    return table(["benchmark", "case", "figure", "goal", "reached", "seconds"], lines), failed
