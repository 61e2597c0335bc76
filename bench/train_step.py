"""One training step of the multimodal model at the book's sizes: this project's against `transformers`' parts.

ViT-B/16 at 224 pixels, DistilBERT, GPT-2 (124M) with cross-attention, random weights, connector `mean`, 16 question
tokens and 8 answer tokens. Both sides load the same files, must agree on the loss and on every gradient, and then take
turns.

Shapes: I images, B questions, N image tokens, T question tokens, A decoder tokens, D width, V vocabulary.
"""

import math
import multiprocessing
import sys
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench import processes, results, timing
from bench.gradients import gradient_difference
from bench.processes import Contestant
from bench.sides import SIDES, Case, save_random_weights
from vqa_scratch.errors import UserError
from vqa_scratch.models.bert import BertConfig
from vqa_scratch.models.gpt2 import GPT2Config
from vqa_scratch.models.vit import ViTConfig
from vqa_scratch.training.precision import DTYPES
from vqa_scratch.weights.files import read_config

LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2**-9}  # relative; bf16: the rounding of one operation
# fp32 gradients: sums over up to 8,000 rows (40 x 197 tokens) in another order, 12 blocks deep, leave about 1e-5 of a
# tensor's norm; 1e-3 of it is a mistake.
GRADIENT_TOLERANCE = 1e-3
# bf16 gradients: measured against the fp32 ones, ours may be off by so many times what the peer is off by.
ERROR_BUDGET = 1.5
GOALS = {("fp32", False): 1.15, ("bf16", False): 1.6, ("fp32", True): 3.5, ("bf16", True): 3.5}
GPU_GOAL = 1.3  # against the peer compiled
CASES = [Case(precision, questions) for questions in (8, 40) for precision in ("fp32", "bf16")]
ROUNDS = {8: 5, 40: 3}  # by questions, by default


def step_operations(image: Any, text: Any, decoder: Any, case: Case) -> float:
    """Multiplications and additions in the matrix products of one step, from the models' configs (ours).

    Two a weight and token forward, four backward; pixels get no gradient. Counts what has to be computed: the peer,
    which encodes every image once a question, has `images == questions`.
    """

    def blocks(tokens: int, rows: int, dim: int, layers: int, hidden: int) -> float:
        return layers * rows * (tokens * (4 * dim * dim + 2 * dim * hidden) + 2 * tokens * tokens * dim)

    patches, dim = math.prod(image.grid), decoder.dim
    rows, images, answers = case.questions, case.images, case.answer_tokens
    products = blocks(patches + 1, images, image.dim, image.layers, image.hidden)
    products += blocks(case.question_tokens, rows, text.dim, text.layers, text.hidden)
    products += blocks(answers, rows, dim, decoder.layers, decoder.hidden or 4 * dim)
    # Cross-attention: queries and outputs for every answer token, keys and values for the one memory token of a row.
    products += decoder.layers * rows * (answers * 2 * dim * dim + 2 * dim * dim + 2 * answers * dim)
    products += rows * answers * dim * decoder.vocab_size
    products += images * image.dim * dim + rows * case.question_tokens * text.dim * dim  # the image's average alone
    patching = images * patches * image.dim * image.channels * image.patch_size**2
    return 6.0 * products + 4.0 * patching


def contestants(folder: Path, case: Case, sides: tuple[str, ...]) -> AbstractContextManager[list[Contestant]]:
    """A process for each side."""
    return processes.contestants({side: (SIDES[side], folder, case) for side in sides})


@dataclass
class Outcome:
    """What one case gave."""

    case: Case
    seconds: dict[str, list[float]]  # by side
    memory: dict[str, float]  # GB, by side
    loss: float
    loss_difference: float  # relative
    gradients: str  # what was found about them, in words
    ceiling: float  # GFLOP/s of a product in the case's format
    operations: dict[str, float] = field(default_factory=dict)  # of a step, by side

    @property
    def ratio(self) -> timing.Spread:
        return timing.speedup(self.seconds["ours"], self.seconds["peer"])

    @property
    def goal(self) -> float:
        shared = self.case.questions > self.case.images
        return GOALS[self.case.precision, shared] if self.case.device == "cpu" or shared else GPU_GOAL

    def row(self) -> list[str]:
        c = self.case
        spread = {name: timing.Spread.of(values) for name, values in self.seconds.items()}
        cells = [c.precision, str(c.questions), str(c.images)]
        digits = 2 if c.device == "cpu" else 4
        cells += [spread["ours"].text(digits), spread["peer"].text(digits)]
        cells += [f"**{self.ratio.median:.2f}x** ({self.ratio.low:.2f} to {self.ratio.high:.2f})", f"{self.goal}x"]
        if "peer, fused AdamW" in self.seconds:
            cells.append(f"{timing.speedup(self.seconds['ours'], self.seconds['peer, fused AdamW']).median:.2f}x")
        else:
            cells.append("not timed")
        cells.append(" / ".join(f"{c.questions / spread[side].median:.2f}" for side in ("ours", "peer")))
        cells.append(
            " / ".join(
                f"{self.operations[side] / spread[side].median / 1e9 / self.ceiling:.0%}" for side in ("ours", "peer")
            )
        )
        return cells + [" / ".join(f"{self.memory[side]:.2f}" for side in ("ours", "peer"))]


HEAD = (
    "precision|questions|images|ours, s|transformers, s|ratio|goal|ratio, its AdamW fused too|"
    "samples/s, ours / its|of the product ceiling, ours / its|peak GB, ours / its"
).split("|")


def check(ours: Contestant, peer: Contestant, case: Case, work: Path) -> tuple[float, float, str]:
    """(loss, relative difference of the losses, a line about the gradients). Raises UserError where they disagree."""
    reference = work / f"gradients-fp32-{case.questions}-{case.images}"  # the peer's; an fp32 case leaves them here
    loss = {}
    folders = {contestant.side: work / contestant.side for contestant in (ours, peer)}
    if case.precision == "fp32":
        folders["peer"] = reference
    elif not reference.exists():
        peer.ask("gradients", reference, fp32=True)
    for contestant in (ours, peer):
        loss[contestant.side] = contestant.ask("gradients", folders[contestant.side])[1]
    difference = abs(loss["ours"] - loss["peer"]) / abs(loss["peer"])
    if not difference <= LOSS_TOLERANCE[case.precision]:
        raise UserError(f"{case.name}: the losses differ, ours {loss['ours']:.7f}, peer {loss['peer']:.7f}")
    off, worst, name = gradient_difference(folders["ours"], reference)
    if case.precision == "fp32":
        said = f"all gradients differ by {off:.1e}, the worst tensor by {worst:.1e} ({name})"
        agree = worst <= GRADIENT_TOLERANCE
    else:
        peer_off = gradient_difference(folders["peer"], reference)[0]
        said = f"gradients are {off:.1e} from the fp32 ones, the peer's {peer_off:.1e}"
        agree = off <= ERROR_BUDGET * peer_off
    if not agree:
        raise UserError(f"{case.name}: {said}")
    return loss["ours"], difference, said


def run_case(case: Case, folder: Path, work: Path, rounds: int, towers: tuple[Any, Any, Any]) -> Outcome:
    """Build both sides from `folder`, hold them to each other, time them in turn. `work` receives gradients."""
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    say(f"{case.name}: loading both sides")
    with contestants(folder, case, ("ours", "peer")) as (ours, peer):
        loss, difference, said = check(ours, peer, case, work)
        say(f"  loss {loss:.6f}, relative difference {difference:.1e}; {said}")
        sides = {"ours": lambda: ours.ask("turn")[0], "peer": lambda: peer.ask("turn")[0]}
        if case.questions == case.images:
            sides["peer, fused AdamW"] = lambda: peer.ask("turn", fused=True)[0]
        for contestant in (ours, peer):
            contestant.ask("turn")  # the first step makes the optimizer's state
        turns = timing.in_turn(sides, rounds, lambda line: say(f"  {line}"))
        seconds = {name: [turn / case.steps for turn in taken] for name, taken in turns.items()}
        memory = {contestant.side: contestant.ask("peak_memory_gb")[1] for contestant in (ours, peer)}
    ceiling = timing.matmul_gflops(DTYPES[case.precision], device=case.device)
    repeated = replace(case, images=case.questions)
    operations = {"ours": step_operations(*towers, case), "peer": step_operations(*towers, repeated)}
    return Outcome(case, seconds, memory, loss, difference, said, ceiling, operations)


def report(outcomes: list[Outcome], command: str, copy: float) -> str:
    """The section of the results file."""
    ceilings = {o.case.precision: o.ceiling for o in outcomes}
    lines = [
        "## Training step at the book's sizes, against the same model assembled from `transformers`",
        "",
        __doc__.split("\n\n")[1].replace("\n", " "),
        "A step is forward, loss, backward, clipping to norm 1, AdamW. Times are medians with quartiles of the rounds; "
        "the ratio is of the medians, with the quartiles of the ratios round by round. The peer attends through SDPA "
        "and has AdamW's default form (`adamw_torch`); the column after the goal gives it the fused form as well, the "
        "default of its Trainer since torch 2.8. Its forward pass takes one image a question, so with 40 questions "
        "about 8 images it encodes 40. On a GPU the peer goes through `torch.compile`. Peak memory is of a process "
        "with one side alone, imports included.",
        "",
        results.table(HEAD, [outcome.row() for outcome in outcomes]),
        "",
    ]
    for o in outcomes:
        lines.append(f"- {o.case.name}: loss {o.loss:.5f}, losses differ by {o.loss_difference:.1e}; {o.gradients}.")
    device = outcomes[0].case.device
    product = "x".join(map(str, timing.PRODUCT[device]))
    rates = ", ".join(f"{kind} {rate:.0f} GFLOP/s" for kind, rate in ceilings.items())
    lines += [
        f"- The ceiling here: a {product} product at {rates}; a copy at {copy:.1f} GB/s (read plus written).",
        f"- {timing.machine(device)}. Python {sys.version.split()[0]}, torch {torch.__version__}, "
        f"transformers {version('transformers')}. Commit {timing.commit(Path(__file__).parent)}. `{command}`",
    ]
    return "\n".join(lines)


def prepared(folder: Path, sizes: dict[str, dict]) -> tuple[Any, Any, Any]:
    """Write random weights to `folder`; returns the models' configs, read back as ours."""
    process = multiprocessing.get_context("spawn").Process(target=save_random_weights, args=(folder, sizes))
    process.start()
    process.join()
    if process.exitcode:
        raise UserError("the weights could not be made; is transformers installed? pip install '.[test]'")
    kinds = {"image": ViTConfig, "text": BertConfig, "decoder": GPT2Config}
    return tuple(kind.from_hf(read_config(folder / name)) for name, kind in kinds.items())


def run(cases: list[Case], rounds: int | None, command: str, sizes: dict[str, dict] | None = None) -> str:
    """Time the cases; returns the report. `sizes` changes the models' sizes, for tests."""
    copy = timing.copy_gb_per_second(device=cases[0].device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        towers = prepared(folder / "weights", sizes or {})
        outcomes = [
            run_case(case, folder / "weights", folder, rounds or ROUNDS.get(case.questions, 3), towers)
            for case in cases
        ]
    return report(outcomes, command, copy)


def run_alone(side: str, case: Case, rounds: int) -> str:
    """One side by itself: its seconds a step and its peak memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared(folder, {})
        with contestants(folder, case, (side,)) as (contestant,):
            contestant.ask("turn")
            seconds = [contestant.ask("turn")[0] / case.steps for _ in range(rounds)]
            memory = contestant.ask("peak_memory_gb")[1]
    return f"{side}, {case.name}: {timing.Spread.of(seconds).text()} s a step, peak memory {memory:.2f} GB"
