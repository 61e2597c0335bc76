"""A step of GRPO and of RLOO, ours against TRL's trainers, in turn, with the same weights and prompts.

    python -m venv trl_now && trl_now/bin/pip install torch==2.13.0 transformers==5.24.0 trl==1.16.0
    python -m bench grpo --trl trl_now/bin/python [--prompts 2] [--samples 8] [--repeats 5] [--write]

A random GPT-2 of 124 million weights in fp32, KL at the same price against a frozen copy, one pass over the responses.
Every side is a process of its own that waits. In its first step TRL leaves its responses, and ours says what it makes
of them: log-probabilities, advantages, loss and the norm of the gradient must be those of TRL.
"""

import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import torch

from bench import ppo, results, timing
from bench.grpo_ours import prepare
from vqa_scratch.errors import UserError

NAMES = {"grpo": "GRPO", "rloo": "RLOO"}
FASTER, LEANER = "1.3x", "at most 0.8"
TOLERANCE = 1e-4  # of log-probabilities and advantages, and of the gradient's norm as a share


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    trl: str | None = None  # python of an environment with TRL
    prompts: int = 2
    samples: int = 8
    tokens: int = 128  # of a prompt
    new: int = 64
    repeats: int = 5
    tiny: bool = False

    def sides(self, algorithm: str, folder: Path) -> dict[str, list[str]]:
        """The command of each side; TRL's come first, since ours looks at what they leave."""
        name, program = NAMES[algorithm], str(ppo.ROOT / "bench" / "grpo_trl.py")
        sides = {}
        if self.trl:
            sides[f"TRL, {name}"] = [self.trl, program, str(folder), algorithm, "keep"]
            if algorithm == "grpo":
                sides[f"TRL, {name}, activations recomputed (its default)"] = [
                    self.trl,
                    program,
                    str(folder),
                    algorithm,
                    "recompute",
                ]
        return sides | {f"ours, {name}": [sys.executable, "-m", "bench.grpo_ours", str(folder), algorithm]}


def check_comparable(folder: Path, algorithm: str) -> str:
    """A line on how far both sides are apart. Raises UserError where that is far."""
    paths = [folder / f"probe-{algorithm}{side}.pt" for side in ("", "-trl")]
    if not all(path.exists() for path in paths):
        return f"Outputs of {NAMES[algorithm]} were not compared: that takes TRL."
    ours, theirs = (torch.load(path, weights_only=True) for path in paths)
    length = theirs["mask"].sum(1).float().mean()
    if algorithm == "rloo":  # TRL's loss is of whole responses, ours of tokens: as many times larger
        ours |= {"logprobs": ours["logprobs"].sum(1)}
        ours |= {name: ours[name] * length for name in ("loss", "gradient")}
    scale = {"gradient": float(theirs["gradient"]), "logprobs": float(length) if algorithm == "rloo" else 1.0}
    apart = {n: float((ours[n] - theirs[n]).abs().max()) / scale.get(n, 1.0) for n in ours}
    for name, worst in apart.items():
        if not worst < TOLERANCE:
            raise UserError(f"the two sides compute another {name} of {NAMES[algorithm]}: {worst:.1e}")
    figures = ", ".join(f"{name} to {worst:.0e}" for name, worst in apart.items())
    return f"Of TRL's first responses ours has TRL's values ({NAMES[algorithm]}: {figures})."


def rows(sides: dict[str, dict[str, float]]) -> list[list[str]]:
    """The table; figures against TRL are of the same algorithm."""
    lines = []
    for name, side in sides.items():
        peer, cells = sides.get(name.replace("ours", "TRL")), ["not measured: no TRL", ""]
        if peer is side or "recomputed" in name:
            cells = ["", ""]
        elif peer is not None:
            cells = [f"{peer['seconds'] / side['seconds']:.2f}x", f"{side['peak_mb'] / peer['peak_mb']:.2f}"]
        if name == "ours, GRPO" and peer is not None:
            cells = [f"{cells[0]} (goal {FASTER})", f"{cells[1]} (goal {LEANER})"]
        rest = side["seconds"] - side["generate"]
        times = [f"{value:.2f}" for value in (side["seconds"], side["generate"], rest)]
        lines.append([name, *times, cells[0], f"{side['peak_mb'] / 1e3:.2f}", cells[1]])
    return lines


def run(plan: Plan, command: str) -> str:
    """The section of the results file."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sizes = {name: getattr(plan, name) for name in ("prompts", "samples", "tokens", "new", "tiny")}
        prepare(folder, **sizes)
        taken, lines = {}, []
        for algorithm in NAMES:  # one after the other: waiting processes hold memory
            compare = partial(check_comparable, folder, algorithm)
            of_sides, line = ppo.collect(plan.sides(algorithm, folder), plan.repeats, plan.new, compare)
            taken |= of_sides
            lines.append(line)
    size = "tiny sizes, which say nothing" if plan.tiny else "the size of GPT-2, 124 million weights in fp32"
    head = "side|s a step|generate|the rest|against TRL|peak GB|of TRL's"
    return "\n".join(
        [
            "### GRPO and RLOO against TRL 1.16",
            "",
            f"One step at {size}: {plan.prompts} prompts of {plan.tokens} tokens, {plan.samples} responses of "
            f"{plan.new} to each, a frozen reference, one pass over the responses. TRL has an environment of its own. "
            f"Every side is a process, in turn, medians of {plan.repeats} rounds after one to warm up.",
            *lines,
            "",
            results.table(head.split("|"), rows(ppo.medians(taken))),
            "",
            f"- {timing.machine()}. torch {torch.__version__}. Commit {timing.commit(ppo.ROOT)}. `{command}`",
        ]
    )


# ------------------------------------------------------------------------------------------------ command


@click.command("grpo")
@click.option("--trl", help="Python of an environment with the current TRL.")
@click.option("--prompts", type=click.IntRange(1), default=2, show_default=True, help="Prompts of a step.")
@click.option("--samples", type=click.IntRange(2), default=8, show_default=True, help="Responses to each of them.")
@click.option("--tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens of a prompt.")
@click.option("--new", type=click.IntRange(1), default=64, show_default=True, help="Tokens of a response.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Steps of each side.")
@click.option("--tiny", is_flag=True, help="A tiny model, to try the benchmark itself.")
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md.")
def command(write: bool, **plan: int | str | bool | None) -> None:
    """One step of GRPO and RLOO at the size of GPT-2 against the trainers of the current TRL."""
    if write and plan["tiny"]:
        raise UserError("--write does not go with --tiny: the table is of the size of GPT-2")
    results.present("grpo", run(Plan(**plan), results.command_given()), write)
