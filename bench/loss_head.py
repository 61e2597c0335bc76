"""Linear map to a large vocabulary and its cross-entropy, forward and backward: time and peak memory, side by side.

Every side gets the same states, weight and labels, runs in its own process, and must match the loss and both
gradients of the plain way. Peak memory includes inputs and gradients, but not what the process held before them. The
three bare matrix products are the lower bound of the time.

Shapes: N tokens, D width, V vocabulary.
"""

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench import processes, results, timing
from bench.processes import Contestant
from vqa_scratch import kernels
from vqa_scratch.errors import UserError
from vqa_scratch.training.precision import DTYPES

MEMORY_GOAL = 0.35  # of the plain way's peak
# On a GPU: at most so many times the bare products, and at least so many times as fast as torch's own.
GPU_GOALS = {"ours": "goal at most 1.4", "F.linear_cross_entropy": "goal 1.2"}
# Relative difference of a gradient from the plain one, in the 2-norm. fp32: sums in another order; bf16: the gradient
# of the logits and the sums over chunks are rounded at other places, 2**-9 each.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}


@dataclass(frozen=True)
class Case:
    """Sizes, number format and device of the comparison."""

    tokens: int = 2048
    width: int = 768
    vocabulary: int = 50257
    precision: str = "fp32"
    device: str = "cpu"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random states (N, D), weight (V, D) and labels (N,), the same at every call."""
        random = torch.Generator().manual_seed(0)
        dtype = DTYPES[self.precision]
        hidden = torch.randn(self.tokens, self.width, generator=random).to(self.device, dtype)
        weight = torch.randn(self.vocabulary, self.width, generator=random).mul_(self.width**-0.5)
        labels = torch.randint(self.vocabulary, (self.tokens,), generator=random).to(self.device)
        return hidden.requires_grad_(), weight.to(self.device, dtype).requires_grad_(), labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return kernels.linear_cross_entropy(hidden, weight, labels)[0]


def of_torch(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # without them it is the plain way
    return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)


def of_liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, labels)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": plain,
    "ours": ours,
    "F.linear_cross_entropy": of_torch,
    "Liger": of_liger,
}
PRODUCTS = "bare products"


def absent(side: str, case: Case) -> str | None:
    """Why a side cannot take part; None if it can."""
    if side == "F.linear_cross_entropy" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"not in torch {torch.__version__}"
    if side == "Liger" and importlib.util.find_spec("liger_kernel") is None:
        return "not installed"
    if side == "Liger" and case.device == "cpu":
        return "not measured: it needs a GPU"
    return None


class Side:
    """One way to the loss, in its own process."""

    def __init__(self, name: str, case: Case) -> None:
        self.before = timing.held_memory_gb()
        self.loss, self.case, self.inputs = LOSSES.get(name), case, case.inputs()

    def products(self) -> None:
        hidden, weight, _ = (x.detach() for x in self.inputs)
        logits = hidden @ weight.T
        logits @ weight, logits.T @ hidden

    def step(self, times: int = 1) -> None:
        """Forward and backward."""
        for _ in range(times):
            if self.loss is None:
                self.products()
            else:
                hidden, weight, _ = self.inputs
                hidden.grad = weight.grad = None
                self.loss(*self.inputs).backward()
        if self.case.device != "cpu":
            torch.cuda.synchronize()

    def outputs(self, path: Path) -> float:
        """The loss; its gradients go to `path`."""
        loss = self.loss(*self.inputs)
        of_hidden, of_weight = torch.autograd.grad(loss, self.inputs[:2])
        save_file({"hidden": of_hidden, "weight": of_weight}, path)
        return loss.item()

    def backend(self) -> str:
        return kernels.backend()

    def peak(self) -> float:
        """GB beyond what there was before the inputs."""
        return timing.peak_memory_gb() - (self.before if self.case.device == "cpu" else 0.0)


def difference(folder: Path, side: str) -> float:
    """The greater of the two gradients' relative differences from the plain ones."""
    one, two = (load_file(folder / name) for name in (side, "plain"))
    return max(float((one[k].float() - two[k].float()).norm() / two[k].float().norm()) for k in two)


def check(sides: list[Contestant], case: Case, folder: Path) -> dict[str, str]:
    """What each side differs by, in words. Raises UserError where one is wrong."""
    loss = {side.side: side.ask("outputs", folder / side.side)[1] for side in sides}
    said = {}
    for name, value in loss.items():
        off = abs(value - loss["plain"]) / abs(loss["plain"]), difference(folder, name)
        said[name] = f"{name}: loss {value:.4f}, off by {off[0]:.1e}; gradients by {off[1]:.1e}"
        if not max(off) <= TOLERANCE[case.precision]:
            raise UserError(f"loss head, {said[name]}")
    return said


def run(case: Case, rounds: int, command: str) -> str:
    """Time the sides in turn; returns the section of the results file."""
    if case.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {case.device}: there is no GPU here")
    present = [name for name in LOSSES if absent(name, case) is None]
    times = 1 if case.device == "cpu" else 20
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with processes.contestants({name: (Side, name, case) for name in (*present, PRODUCTS)}) as running:
            memory = {}
            for side in running:
                side.ask("step", 2)  # compiles and warms up
                memory[side.side] = side.ask("peak")[1]  # before gradients are copied for the comparison
            said = check(running[:-1], case, folder)
            turns = {s.side: lambda s=s: s.ask("step", times)[0] / times for s in running}
            seconds = timing.in_turn(turns, rounds, lambda line: print(line, file=sys.stderr, flush=True))
            kind = running[present.index("ours")].ask("backend")[1]
    rows = []
    for side in (*LOSSES, PRODUCTS):
        if side not in seconds:
            rows.append([side, absent(side, case) or "", "", "", "", ""])
            continue
        spread, bare = timing.Spread.of(seconds[side]), timing.Spread.of(seconds[PRODUCTS])
        share = "" if side == PRODUCTS else f"{memory[side] / memory['plain']:.2f}"
        share += f" (goal at most {MEMORY_GOAL})" * (side == "ours")
        faster = "" if side == "ours" else f"{timing.speedup(seconds['ours'], seconds[side]).median:.2f}x"
        floor = f"{spread.median / bare.median:.2f}"
        if case.device != "cpu" and side in GPU_GOALS:
            goal = f" ({GPU_GOALS[side]})"
            floor, faster = (floor + goal, faster) if side == "ours" else (floor, faster + goal)
        rows.append([side, spread.text(4), floor, faster, f"{memory[side]:.2f}", share])
    head = ["way", "seconds", "of the bare products", "ours is faster by", "peak GB", "of plain"]
    sizes = f"{case.tokens} tokens, width {case.width}, vocabulary {case.vocabulary:,}, {case.precision}"
    lines = [
        f"## Loss head: {sizes}, on the {case.device.upper()}",
        "",
        __doc__.split("\n\n")[1].replace("\n", " "),
        f"Ours ran in {kind}.",
        "",
        results.table(head, rows),
        "",
        *(f"- {line}." for line in said.values()),
        f"- {timing.machine(case.device)}. torch {torch.__version__}. Commit {timing.commit(Path(__file__).parent)}. "
        f"`{command}`",
    ]
    return "\n".join(lines)
