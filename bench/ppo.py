"""One PPO iteration, ours against TRL 0.11.4, in turn on the same machine with the same weights and articles.

    python -m venv trl_env && trl_env/bin/pip install torch==2.13.0 trl==0.11.4 transformers==4.45.2 rich
    python -m bench ppo --trl trl_env/bin/python [--batch 8] [--repeats 5] [--out ppo.json] [--write]

Random weights of the book's sizes (flan-t5-small, two roberta-base), articles of 400 tokens, 24 new tokens, 4 epochs.
Every side is a process of its own that waits; the driver lets them run one iteration each, round after round, and
reports medians. Before that it checks that both sides compute the same logits from the same files. Without --trl only
our own variants run against each other.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench import results, timing
from bench.ppo_ours import prepare
from vqa_scratch.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
# `micro` articles at once changes no result. With all of them the first pass goes back through the rollout's encoding,
# which takes more memory; the others have about the same.
OURS = {
    "ours, fp32": {"micro": 8},
    "ours, fp32, 4 articles at once": {"micro": 4},
    "ours, bf16 autocast": {"precision": "bf16", "micro": 8},
    "ours, bf16, encoder frozen": {"precision": "bf16", "freeze": "encoder", "micro": 8},
    "ours, bf16, 4 samples an article": {"precision": "bf16", "samples": 4, "micro": 4},
}
TRL = {"TRL, all articles at once": ["--mode", "batch"], "TRL, one article at a time": ["--mode", "loop"]}
BATCHED, LOOP = TRL
# (side, column): the goal. Columns against TRL are so many times its samples a second; memory is a share of its own.
GOALS = {("ours, fp32", BATCHED): "1.35x", ("ours, bf16 autocast", BATCHED): "2x", ("ours, bf16 autocast", LOOP): "3x"}
GOALS |= {("ours, fp32, 4 articles at once", "memory"): "at most 0.7"}
TOLERANCE = 1e-3  # between both sides' log-probabilities and reward logits


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    trl: str | None = None  # python of an environment with TRL
    batch: int = 8
    tokens: int = 400
    new: int = 24
    epochs: int = 4
    micro: int | None = None  # our articles at once, for all of ours
    repeats: int = 5
    only: str = ""  # sides whose name contains this
    tiny: bool = False

    def sides(self, folder: Path) -> dict[str, list[str]]:
        """The command of each side that takes part."""
        sides = {}
        for name, options in OURS.items():
            worker = json.dumps(options | {"micro": min(self.micro or options["micro"], self.batch)})
            sides[name] = [sys.executable, "-m", "bench.ppo_ours", str(folder), worker]
        if self.trl:
            for name, options in TRL.items():
                sides[name] = [self.trl, str(ROOT / "bench" / "ppo_trl.py"), str(folder), *options]
        return {name: command for name, command in sides.items() if self.only in name}


class Contestant:
    """A waiting process."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name, self.errors = name, tempfile.TemporaryFile("w+")  # noqa: SIM115  (a pipe that nobody reads fills)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        try:
            self.process = subprocess.Popen(command, text=True, cwd=ROOT, **pipes)
        except OSError as error:
            raise UserError(f"{name}: {command[0]}: {error.strerror}") from None

    def read(self, word: str) -> str:
        """The rest of the line that begins with `word`. Raises UserError if the process ends without one."""
        for line in self.process.stdout:
            if line.startswith(word):
                return line[len(word) :]
        self.errors.seek(0)
        said = self.errors.read().strip()
        print(said[-3000:], file=sys.stderr)
        raise UserError(f"{self.name}: {said.splitlines()[-1] if said else 'ended without an answer: out of memory?'}")

    def run(self) -> dict:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return json.loads(self.read("RESULT"))

    def stop(self) -> None:
        with suppress(OSError):  # it may be gone
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:  # at work when another side failed
            self.process.kill()


def check_comparable(folder: Path) -> str:
    """A line on how far log-probabilities and reward logits are apart. Raises UserError where that is far."""
    ours, theirs = (folder / f"probe-{side}.pt" for side in ("ours", "trl"))
    if not (ours.exists() and theirs.exists()):
        return "The sides' outputs were not compared: that takes ours in fp32 and TRL."
    a, b = (torch.load(path, weights_only=True) for path in (ours, theirs))
    worst = max(float((a[name] - b[name]).abs().max()) for name in a)
    if not worst < TOLERANCE:
        raise UserError(f"the two sides compute different outputs: {worst:.1e}")
    return f"Both sides agree on log-probabilities and reward logits to {worst:.1e}."


def rounds(commands: dict[str, list[str]], repeats: int) -> Iterator[dict[str, dict]]:
    """Let every side run once a round, in turn; the results of each round by side, first those of one to warm up."""
    running: list[Contestant] = []
    try:
        for name, command in commands.items():
            running.append(Contestant(name, command))
            running[-1].read("READY")  # one builds after the other
        for number in range(repeats + 1):
            of_sides = {}
            for side in running:
                result = of_sides[side.name] = side.run()
                print(f"round {number} {side.name}: {result['seconds']:.2f} s", file=sys.stderr, flush=True)
            yield of_sides
    finally:
        for side in running:
            side.stop()


def collect(commands: dict[str, list[str]], repeats: int, new: int, compare: Callable[[], str]) -> tuple[dict, str]:
    """Every result of every side but the first, and what `compare` says of their outputs after it.

    Raises UserError if responses do not run to the limit of `new` tokens.
    """
    taken, said = {name: [] for name in commands}, ""
    for number, of_sides in enumerate(rounds(commands, repeats)):
        if number == 0:
            said = compare()
        for name, result in of_sides.items():
            if result["tokens"] < 0.95 * new * result["responses"]:
                raise UserError(f"{name}: {result['tokens']} tokens; responses should run to the limit")
            if number > 0:
                taken[name].append(result)
    return taken, said


def measure(plan: Plan) -> tuple[dict[str, list[dict]], str]:
    """Every iteration of every side, and a line on how far they agree."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sizes = {name: getattr(plan, name) for name in ("batch", "tokens", "new", "epochs", "tiny")}
        prepare(folder, **sizes)
        return collect(plan.sides(folder), plan.repeats, plan.new, lambda: check_comparable(folder))


def medians(taken: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
    """By side: the median of every figure, the greatest peak, and samples a second."""
    sides = {}
    for name, runs in taken.items():
        sides[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        sides[name]["peak_mb"] = max(run["peak_mb"] for run in runs)
        sides[name]["samples_per_second"] = sides[name]["responses"] / sides[name]["seconds"]
    return sides


def rows(sides: dict[str, dict[str, float]], trl: bool) -> list[list[str]]:
    """The table. A side that did not run says why; `trl`: whether TRL could."""
    lines = []
    for name in (*TRL, *OURS):
        if name not in sides:
            why = "left out by --only" if trl or name in OURS else "no TRL environment; give --trl PYTHON"
            lines.append([name, f"not measured: {why}", *[""] * 7])
            continue
        side, cells = sides[name], []
        for peer, key in ((BATCHED, "samples_per_second"), (LOOP, "samples_per_second"), (BATCHED, "peak_mb")):
            column = "memory" if key == "peak_mb" else peer
            goal = GOALS.get((name, column))
            ratio = "not measured" if goal else ""
            if peer in sides and name != peer:
                ratio = f"{side[key] / sides[peer][key]:.2f}" + "x" * (key != "peak_mb")
            cells.append(f"{ratio} (goal {goal})" if goal else ratio)
        times = [f"{side[key]:.2f}" for key in ("seconds", "generate", "update")]
        lines.append([name, *times, f"{side['samples_per_second']:.3f}", *cells[:2], f"{side['peak_mb'] / 1e3:.2f}"])
        lines[-1].append(cells[2])
    return lines


def run(plan: Plan, command: str, out: Path | None = None) -> str:
    """The section of the results file; `out` gets every figure as JSON."""
    taken, said = measure(plan)
    sides = medians(taken)
    about = {"about": {**asdict(plan), "threads": torch.get_num_threads(), "torch": torch.__version__}}
    if out:
        out.write_text(json.dumps(about | {"medians": sides, "runs": taken}, indent=2) + "\n")
    head = "side|s an iteration|generate|update|samples/s|against TRL, all at once|against its loop|peak GB|of TRL's"
    size = "tiny sizes, which say nothing" if plan.tiny else "the book's sizes"
    return "\n".join(
        [
            "### Speed against TRL 0.11.4",
            "",
            "TRL has an environment of its own with transformers 4.45.2. One PPO iteration at "
            f"{size}: random weights of flan-t5-small and two roberta-base, {plan.batch} articles of {plan.tokens} "
            f"tokens, {plan.new} new tokens, {plan.epochs} epochs; every side a process of its own, in turn, medians "
            f"of {plan.repeats} rounds after one to warm up. {said}",
            "",
            results.table(head.split("|"), rows(sides, plan.trl is not None)),
            "",
            f"- {timing.machine()}. torch {torch.__version__}. Commit {timing.commit(ROOT)}. `{command}`",
        ]
    )
