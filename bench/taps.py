"""The cost of the taps without an active trace: the calls of a training step, replayed with and without what they do.

A step makes some hundred calls of some ten nanoseconds each, and takes a hundred milliseconds. To time whole steps with
and without them tells how steady the machine is, a hundredth or two, and nothing of the taps.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from bench.results import command_given, present, table
from bench.timing import Spread, commit, in_turn, machine, peak_memory_gb
from train import train_step
from vqa_scratch import systems
from vqa_scratch.data.shapes import ShapesSpec, ensure_shapes
from vqa_scratch.nn import taps
from vqa_scratch.systems.options import read_command_line
from vqa_scratch.training.optimizers import Optimizers
from vqa_scratch.training.precision import Precision, formats

GOAL = 0.99
WARM = 3  # rounds before the clock counts
REPLAYS = 1000  # of the calls of a step, in a round
SCENES = ShapesSpec(train=64, val=2, test=2, holdout=2)


@contextmanager
def instead(tap: Callable[..., Any], wanted: Callable[..., Any]) -> Iterator[None]:
    """Inside, the models call these two."""
    real = taps.tap, taps.wanted
    taps.tap, taps.wanted = tap, wanted
    try:
        yield
    finally:
        taps.tap, taps.wanted = real


def cut_out() -> Any:
    """Inside, a tap is a function that returns its tensor, and nothing is ever wanted: a build without taps."""
    return instead(lambda prefix, label, tensor: tensor, lambda prefix, *labels: False)


Call = tuple[str, tuple[Any, ...]]  # "tap" or "wanted", and what it is given; None for a tensor


def replay(calls: list[Call]) -> float:
    """CPU seconds of the calls of one step, none of which needs its tensor without a trace."""
    start = time.process_time()
    for _ in range(REPLAYS):
        for name, given in calls:
            getattr(taps, name)(*given)
    return (time.process_time() - start) / REPLAYS


class Steps:
    """Training steps of the `shapes` preset on one batch."""

    def __init__(self, folder: Path, questions: int, more: tuple[str, ...] = ()) -> None:
        device = torch.device("cpu")
        self.precision = Precision(formats("auto", device)[-1], device)
        data = ensure_shapes(folder, SCENES, progress=False)
        flags = ["--data", str(data), "--cache", str(folder), "--steps", "1", "--questions-per-step", str(questions)]
        flags += more
        options, kind = read_command_line(flags), systems.find("shapes")
        samples = kind.read(options)
        self.system = kind.build(options, samples, self.precision)
        self.system.train_on(samples)
        self.optimizers = Optimizers(
            self.system.model, kind="muon", learning_rate=0.0, matrix_learning_rate=0.0, weight_decay=0.0
        )
        self.batch = self.system.batch(self.system.epoch(0)[0])

    def step(self) -> float:
        """Seconds of one step. The learning rate is 0, so every step does the same work."""
        start = time.perf_counter()
        train_step(self.system.loss, self.batch, self.optimizers, self.precision)
        return time.perf_counter() - start

    def calls(self) -> list[Call]:
        """Those that one step makes, in order."""
        made: list[Call] = []

        def tap(prefix: str | None, label: str, tensor: Tensor) -> Tensor:
            made.append(("tap", (prefix, label, None)))
            return tensor

        def wanted(*given: str | None) -> bool:
            made.append(("wanted", given))
            return False

        with instead(tap, wanted):
            self.step()
        return made

    def loss(self) -> Tensor:
        with torch.no_grad(), self.precision.autocast():
            return self.system.loss(self.batch)[0]


def run(rounds: int, questions: int, command: str) -> str:
    """The section for RESULTS.md. Raises AssertionError if the taps change the loss by a bit."""
    with tempfile.TemporaryDirectory() as folder:
        steps = Steps(Path(folder), questions)
    with_taps = steps.loss()
    with cut_out():
        assert torch.equal(steps.loss(), with_taps), "the loss differs without taps"
    calls = steps.calls()

    def replay_without() -> float:
        with cut_out():
            return replay(calls)

    taken = in_turn({"with": lambda: replay(calls), "without": replay_without, "step": steps.step}, WARM + rounds)
    ours, theirs, step = (Spread.of(seconds[WARM:]) for seconds in taken.values())
    ratio = step.median / (step.median + ours.median - theirs.median)
    row = [
        str(questions),
        str(len(calls)),
        *(f"{1e6 * side.median:.1f} ({1e6 * side.low:.1f} to {1e6 * side.high:.1f})" for side in (ours, theirs)),
        f"{1e3 * step.median:.0f} ({1e3 * step.low:.0f} to {1e3 * step.high:.0f})",
        f"**{ratio:.5f}x**",
        f"{GOAL}x",
        f"{peak_memory_gb():.2f}",
    ]
    head = "questions|calls|with taps, us|without, us|a step, ms|speed of a step|goal|peak GB of the process".split("|")
    return f"""## Taps with no trace active, against the same code with the tap functions cut out

The calls of a training step of the `shapes` preset in {steps.precision.kind}, replayed {REPLAYS} times a round,
{rounds} rounds in turn, in CPU time, and the step by the clock. Its loss is the same bit for bit without them.

{table(head, [row])}

- {machine()}. torch {torch.__version__}. Commit {commit(Path(__file__).parent)}. `{command}`"""


@click.command("taps")
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True, help="Turns of each side.")
@click.option("--questions", type=click.IntRange(8), default=128, show_default=True, help="Questions of a step.")
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md.")
def command(rounds: int, questions: int, write: bool) -> None:
    """What the taps of the study tools cost a training step while no trace is active."""
    present("taps", run(rounds, questions, command_given()), write)
