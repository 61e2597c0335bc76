"""Decoding answers: this project's `generate` against that of `transformers`, the same weights, the same tokens.

Both sides load one GPT-2 with cross-attention, one Llama or one Mixtral ("moe"), whose answers have given lengths
(see `decode_sides.py`), start from one token a row, read the same memory if there is one, and run in a process each.
In fp32 their tokens must be equal. In bf16 two candidates are often nearly equal, so only the lengths must be equal,
and no token of ours may be further from the best one, by fp32 scores, than twice the peer's worst. Peak memory is
that of a side's process after loading.

On a GPU ours replays a CUDA graph, and the peer takes part twice: as it is, and with a static cache and a compiled
step.
"""

import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from bench import processes, results, timing
from bench.decode_sides import SIZES, Case, CompiledPeer, Ours, Peer, make_model
from bench.processes import Contestant
from vqa_scratch.errors import UserError

SECONDS = 1.0  # of one measurement, at least: small batches are decoded many times for it
# (size, batch, beams, precision, lengths): the goal, as so many times the speed of `generate` in the same precision;
# None where there is none: in bf16 a step costs the reading of the weights, however few rows are left. A batch of 16
# answers of real lengths takes six steps, so that what comes before them weighs as much: its goal is 1.8 at any size.
GOALS = {
    ("shapes", 1, 1, "fp32", "20"): 4.0,
    ("shapes", 16, 1, "fp32", "real"): 1.8,
    ("gpt2", 1, 1, "fp32", "20"): 1.15,
    ("gpt2", 1, 1, "bf16", "20"): 1.15,
    ("gpt2", 16, 1, "fp32", "real"): 1.8,
    ("gpt2", 16, 1, "bf16", "real"): None,
    ("shapes", 8, 4, "fp32", "20"): 2.0,
    ("gpt2", 8, 4, "fp32", "20"): 1.1,
    ("llama", 1, 1, "fp32", "20"): 1.15,
    ("llama", 16, 1, "fp32", "real"): 1.8,
    ("moe", 1, 1, "fp32", "20"): 1.15,
}
CASES = [Case(*key) for key in GOALS]
GPU_GOALS = {"peer": 3.0, "compiled": 1.0}  # GPT-2 size, batch 1
BF16_GOAL = 1.6  # ours in bf16 against the peer in fp32, GPT-2 size, batch 1
SIDES = {"ours": Ours, "peer": Peer, "compiled": CompiledPeer}
HEAD = "case|ours, ms a batch|transformers, ms a batch|ratio|goal|ms a step, ours / its|peak GB, ours / its".split("|")
BYTES_HEAD = "case|MB a token reads|ms a token|GB/s|bytes, of llama's|time, of llama's|off its bytes|goal".split("|")
GPU_HEAD = [*HEAD, "its compiled step, ms a batch", "ratio", "goal"]


@dataclass
class Outcome:
    """What one case gave; by side."""

    case: Case
    seconds: dict[str, list[float]]
    memory: dict[str, float]
    said: str

    def goal(self, side: str) -> str:
        """What is to be reached against that side."""
        case = self.case
        if case.device == "cuda":
            first = (case.size, case.batch, case.beams) == ("gpt2", 1, 1)
            return f"{GPU_GOALS[side]}x" if first else "none"
        goal = GOALS.get((case.size, case.batch, case.beams, case.precision, case.lengths))
        return f"{goal}x" if goal else "none"

    def against(self, side: str) -> tuple[str, str, str]:
        """That side's milliseconds, how many times faster ours is, and the goal."""
        ratio = timing.speedup(self.seconds["ours"], self.seconds[side])
        spread = timing.Spread.of([1e3 * s for s in self.seconds[side]]).text(1)
        return spread, f"**{ratio.median:.2f}x** ({ratio.low:.2f} to {ratio.high:.2f})", self.goal(side)

    def row(self) -> list[str]:
        steps = max(self.case.tokens()) + 1
        spread = {side: timing.Spread.of([1e3 * s for s in values]) for side, values in self.seconds.items()}
        return [
            self.case.name,
            spread["ours"].text(1),
            *self.against("peer"),
            " / ".join(f"{spread[side].median / steps:.2f}" for side in ("ours", "peer")),
            " / ".join(f"{self.memory[side]:.2f}" for side in ("ours", "peer")),
            *(self.against("compiled") if "compiled" in self.seconds else ()),
        ]


def check(sides: Sequence[Contestant], case: Case, folder: Path) -> str:
    """A line on how far the sides agree; the first is ours. Raises UserError where they do not."""
    tokens = {side.side: side.ask("tokens")[1] for side in sides}
    wanted = [length + 1 for length in case.tokens()]
    for name, rows in tokens.items():
        lengths = [len(row) for row in rows]
        if lengths != wanted:
            raise UserError(f"{case.name}: {name} wrote {lengths} tokens a row instead of {wanted}")
    ours, *peers = tokens
    if all(tokens[peer] == tokens[ours] for peer in peers):
        return "all tokens are equal"
    if case.precision == "fp32":
        raise UserError(f"{case.name}: the sides wrote different tokens")
    exact, said = Ours(folder, replace(case, precision="fp32")), []
    gap = {name: exact.gap(rows) for name, rows in tokens.items()}
    for peer in peers:
        same = sum(a == b for a, b in zip(tokens[ours], tokens[peer], strict=True))
        line = f"ours is at most {gap[ours]:.3f} below the best fp32 score, {peer} {gap[peer]:.3f}"
        if case.beams == 1 and not gap[ours] <= 2 * gap[peer] + 2**-8:
            raise UserError(f"{case.name}: {line}")
        said.append(f"{same} of {case.batch} rows have equal tokens; {line}")
    return "; ".join(said)


def run_case(case: Case, rounds: int, sizes: dict[str, int], names: Sequence[str]) -> Outcome:
    """Make the model, hold the sides of these names to each other, time them in turn."""
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _in_a_process(folder, case, sizes)
        with processes.contestants({name: (SIDES[name], folder, case) for name in names}) as sides:
            said = check(sides, case, folder)
            say(f"{case.name}: {said}")
            times = {side.side: max(1, round(SECONDS / side.ask("seconds", 2)[1])) for side in sides}
            turns = {side.side: lambda side=side: side.ask("seconds", times[side.side])[1] for side in sides}
            seconds = timing.in_turn(turns, rounds, lambda line: say(f"  {line}"))
            memory = {side.side: side.ask("peak")[1] for side in sides}
    return Outcome(case, seconds, memory, said)


def by_bytes(rounds: int, sizes: dict[str, dict]) -> str:
    """Ours at batch 1 in fp32, in turn: "llama" and "moe" read as many bytes a token, "moe" and "wide" hold as many."""
    cases = {size: Case(size) for size in ("llama", "moe", "wide")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size, case in cases.items():
            _in_a_process(folder / size, case, sizes[size])
        with processes.contestants({size: (Ours, folder / size, case) for size, case in cases.items()}) as models:
            turns = {one.side: lambda one=one: one.ask("seconds", 1)[1] for one in models}
            timing.in_turn(turns, 1)
            seconds = timing.in_turn(turns, rounds, lambda line: print(f"  {line}", file=sys.stderr, flush=True))
            return bytes_table(seconds, {one.side: one.ask("reads")[1] for one in models})


def bytes_table(seconds: dict[str, list[float]], reads: dict[str, int]) -> str:
    """Does the time of a token follow the bytes it reads? By size: seconds of `Case(size)`, and these bytes."""
    rows = []
    for size, taken in seconds.items():
        time, of_bytes = timing.speedup(seconds["llama"], taken), reads[size] / reads["llama"]
        step = timing.Spread.of(taken).median / (max(Case(size).tokens()) + 1)
        off = max(time.median / of_bytes, of_bytes / time.median)
        cells = [f"{reads[size] / 1e6:.0f}", f"{1e3 * step:.2f}", f"{reads[size] / step / 1e9:.1f}", f"{of_bytes:.2f}x"]
        rows.append([f"{size} size, batch 1, fp32", *cells, time.text(), f"{off:.2f}x", "at most 1.25x"])
    return results.table(BYTES_HEAD, rows)


def _in_a_process(folder: Path, case: Case, sizes: dict[str, int]) -> None:
    """Make the model in a process of its own, which gives its memory back."""
    process = multiprocessing.get_context("spawn").Process(target=make_model, args=(folder, case, sizes))
    process.start()
    process.join()
    if process.exitcode:
        raise UserError("the model could not be made; is transformers installed? pip install '.[test]'")


def names_of(case: Case) -> list[str]:
    """The sides of a case: on a GPU greedy decoding meets the compiled step as well."""
    return ["ours", "peer", "compiled"] if case.device == "cuda" and case.beams == 1 else ["ours", "peer"]


def run(cases: list[Case], rounds: int, command: str, sizes: dict[str, dict] | None = None) -> str:
    """Time the cases; returns the section of the results file. `sizes` changes the models' sizes, for tests."""
    if any(case.device != "cpu" for case in cases) and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here")
    outcomes = [run_case(case, rounds, (sizes or SIZES)[case.size], names_of(case)) for case in cases]
    by_key = {(o.case.size, o.case.batch, o.case.beams, o.case.precision, o.case.lengths): o for o in outcomes}
    lines = [f"- {o.case.name}: {o.said}." for o in outcomes]
    low, full = (by_key.get(("gpt2", 1, 1, precision, "20")) for precision in ("bf16", "fp32"))
    if low and full:
        ratio = timing.speedup(low.seconds["ours"], full.seconds["peer"]).median
        lines.append(f"- GPT-2 size, batch 1, ours in bf16 against the peer's fp32: {ratio:.2f}x (goal {BF16_GOAL}x).")
    hardware = timing.machine() if cases[0].device == "cpu" else torch.cuda.get_device_name()
    copy = f" A copy runs at {timing.copy_gb_per_second():.1f} GB/s (read plus written)." if not sizes else ""
    return "\n".join(
        [
            f"## Decoding against `transformers.generate`, on the {cases[0].device.upper()}",
            "",
            *(text.replace("\n", " ") for text in __doc__.split("\n\n")[1 : 2 if cases[0].device == "cpu" else 3]),
            "",
            results.table(HEAD if cases[0].device == "cpu" else GPU_HEAD, [outcome.row() for outcome in outcomes]),
            *(("", by_bytes(rounds, sizes or SIZES)) if Case("moe") in cases else ()),
            "",
            *lines,
            f"- {hardware}.{copy} torch {torch.__version__}, transformers {version('transformers')}. "
            f"Commit {timing.commit(Path(__file__).parent)}. `{command}`",
        ]
    )
