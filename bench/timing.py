"""Times things fairly: in turn, in one run, and compared with the limits of the machine.

Clocks, neighbours and caches drift, so one program after the other is no fair comparison. Here they take turns (A B A B
...), a figure is a median with its quartiles, and a ratio is taken round by round as well. The ceiling is measured in
the same run: the matrix product that a ViT-B MLP makes of 8 images, and a copy of memory.
"""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

# On a CPU 8 images x 197 tokens, through the first linear map of an MLP of width 768; on a GPU what fills it.
PRODUCT = {"cpu": (1576, 768, 3072), "cuda": (8192, 8192, 8192)}


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements, in their unit."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Self:
        """Quartiles interpolate between the values; a single value is all three. Raises ValueError on none."""
        if not values:
            raise ValueError("no measurements")
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))

    def text(self, digits: int = 2) -> str:
        """`median (low to high)`."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def in_turn(
    sides: Mapping[str, Callable[[], float]], rounds: int, said: Callable[[str], None] = lambda line: None
) -> dict[str, list[float]]:
    """Let every side make one measurement, in order, `rounds` times; a side returns its own seconds.

    `said` gets a line after each round.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, measure in sides.items():
            taken[name].append(measure())
        last = ", ".join(f"{name} {values[-1]:.2f} s" for name, values in taken.items())
        said(f"round {number + 1} of {rounds}: {last}")
    return taken


def speedup(ours: list[float], theirs: list[float]) -> Spread:
    """How many times faster ours is: the ratio of the medians, with the quartiles of the ratios round by round."""
    rounds = Spread.of([b / a for a, b in zip(ours, theirs, strict=True)])
    return Spread(statistics.median(theirs) / statistics.median(ours), rounds.low, rounds.high, rounds.count)


def _best_seconds(given: Callable[[], object], seconds: float, device: str) -> float:
    def work() -> None:
        given()
        if device != "cpu":
            torch.cuda.synchronize()

    work()
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def matmul_gflops(dtype: torch.dtype, seconds: float = 1.0, device: str = "cpu") -> float:
    """The best rate of the device's `PRODUCT` in that type, in 1e9 operations a second."""
    rows, inner, columns = PRODUCT[device]
    x = torch.randn(rows, inner, dtype=dtype, device=device)
    w = torch.randn(columns, inner, dtype=dtype, device=device)
    with torch.no_grad():
        best = _best_seconds(lambda: torch.nn.functional.linear(x, w), seconds, device)
    return 2 * rows * inner * columns / best / 1e9


def copy_gb_per_second(megabytes: int | None = None, seconds: float = 1.0, device: str = "cpu") -> float:
    """The best rate of a copy that fits no cache, bytes read plus bytes written, in 1e9 a second."""
    megabytes = megabytes or (256 if device == "cpu" else 2048)
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    best = _best_seconds(lambda: target.copy_(source), seconds, device)
    return 2 * source.nbytes / best / 1e9


def read_gb_per_second(megabytes: int = 256, seconds: float = 1.0) -> float:
    """The best rate at which a sum reads what fits no cache of the CPU, in 1e9 bytes a second."""
    source = torch.ones(megabytes * 2**18)
    return source.nbytes / _best_seconds(source.sum, seconds, "cpu") / 1e9


def held_memory_gb() -> float:
    """What this process holds now, in 1e9 bytes; on systems without /proc the most it has held."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    except OSError:
        return peak_memory_gb()


def peak_memory_gb() -> float:
    """The most memory this process has held at once, in 1e9 bytes; of the GPU's, if it has used one.

    On Linux from the process itself: what `getrusage` says there starts at the size of the program that started it.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) * 1024 / 1e9
    except (OSError, StopIteration):
        import resource

        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def forget_peak() -> None:
    """Count the peak from now on, where the system can (Linux), so that loading a checkpoint is not in it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def processor_name() -> str:
    """The CPU as it calls itself, with the matrix and bf16 instructions that matter here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in fields.get("flags", "").split()]
    return " ".join([fields.get("model name", platform.machine()), *([f"({', '.join(flags)})"] if flags else [])])


def machine(device: str = "cpu") -> str:
    """Hardware and threads, one line."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {memory:.0f} GB of memory"


def commit(folder: Path) -> str:
    """The commit checked out in `folder`, with a mark if tracked files differ from it; "unknown" outside git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if git("status", "-s", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
