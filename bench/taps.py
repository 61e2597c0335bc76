"""The cost of the taps without an active trace: training steps with and without both tap functions, in turn."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import torch
from torch import Tensor

from bench.results import command_given, present, table
from bench.timing import Spread, commit, in_turn, machine, peak_memory_gb, speedup
from train import train_step
from vqa_scratch import systems
from vqa_scratch.data.shapes import ShapesSpec, ensure_shapes
from vqa_scratch.nn import taps
from vqa_scratch.systems.options import read_command_line
from vqa_scratch.training.optimizers import Optimizers
from vqa_scratch.training.precision import Precision, formats

GOAL = 0.99
WARM = 3  # rounds before the clock counts
SCENES = ShapesSpec(train=64, val=2, test=2, holdout=2)


@contextmanager
def cut_out() -> Iterator[None]:
    """Inside, a tap is a function that returns its tensor, and nothing is ever wanted: a build without taps."""
    real = taps.tap, taps.wanted
    taps.tap, taps.wanted = (lambda prefix, label, tensor: tensor), (lambda prefix, *labels: False)
    try:
        yield
    finally:
        taps.tap, taps.wanted = real


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

    def step_without(self) -> float:
        with cut_out():
            return self.step()

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
    taken = in_turn({"with": steps.step, "without": steps.step_without}, WARM + rounds)
    ours, theirs = taken["with"][WARM:], taken["without"][WARM:]
    ratio = speedup(ours, theirs)
    row = [
        str(questions),
        *(Spread.of([1000 * s for s in side]).text(0) for side in (ours, theirs)),
        f"**{ratio.median:.3f}x** ({ratio.low:.3f} to {ratio.high:.3f})",
        f"{GOAL}x",
        f"{peak_memory_gb():.2f}",
    ]
    head = ["questions", "with taps, ms", "without, ms", "ratio", "goal", "peak GB of the process"]
    return f"""## Taps with no trace active, against the same code with the tap functions cut out

Training steps of the `shapes` preset in {steps.precision.kind}, in turn, {rounds} rounds. The loss is the same bit for
bit.

{table(head, [row])}

- {machine()}. torch {torch.__version__}. Commit {commit(Path(__file__).parent)}. `{command}`"""


@click.command("taps")
@click.option("--rounds", type=click.IntRange(1), default=200, show_default=True, help="Turns of each side.")
@click.option("--questions", type=click.IntRange(8), default=128, show_default=True, help="Questions of a step.")
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md.")
def command(rounds: int, questions: int, write: bool) -> None:
    """What the taps of the study tools cost a training step while no trace is active."""
    present("taps", run(rounds, questions, command_given()), write)
