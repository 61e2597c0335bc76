"""A training step with frozen encoders: their features read from the cache, against running the encoders again.

The book's encoders and decoder with random weights, on drawn scenes scaled to 224 pixels. Both sides are this project's
and share one model: a step makes its batch, runs forward and backward, clips and steps AdamW. At equal weights their
losses are compared before the clock starts.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import results, timing
from train import train_step
from vqa_scratch.connectors import connector_class
from vqa_scratch.data.shapes import ShapesSpec, ensure_shapes
from vqa_scratch.errors import UserError
from vqa_scratch.systems.options import PRESETS, VQAOptions
from vqa_scratch.systems.vqa import VQASystem
from vqa_scratch.training.allocator import keep_freed_memory
from vqa_scratch.training.optimizers import Optimizers
from vqa_scratch.training.precision import Precision, pick_device

GOAL = 4.0
# fp32: sums in another order; bf16: one rounding, since what is kept is what the projection would have rounded.
TOLERANCE = {"fp32": 1e-5, "bf16": 2**-8}
SPEC = ShapesSpec(val=4, test=4, holdout=4, questions_per_scene=8)
PART = 32  # questions that the preset `book` sends through the model at once: 256 in 8 parts


@dataclass(frozen=True)
class Case:
    """One comparison: number format, connector, questions and images of a step, and where it runs."""

    precision: str = "fp32"
    connector: str = "mean"
    questions: int = 8
    images: int = 8
    device: str = "cpu"


def cases(case: Case) -> list[Case]:
    """Two connectors and both precisions, and `mean` with as many questions, one an image, as a part of `book` has."""
    kinds = [replace(case, connector=c, precision=p) for c in ("mean", "tokens") for p in ("fp32", "bf16")]
    return [*kinds, *(replace(kind, questions=PART, images=PART) for kind in kinds if kind.connector == "mean")]


class Sides:
    """One model in two systems, one of them with the cache."""

    def __init__(self, case: Case, folder: Path, changes: dict[str, Any]) -> None:
        keep_freed_memory()
        data = ensure_shapes(folder, replace(SPEC, train=2 * case.images), progress=False)
        values = PRESETS["book"] | {
            "preset": "book",
            "data": data,
            "cache": folder / "cache",
            "init": "random",
            "freeze": "encoders",
            "connector": case.connector,
            "question_prompt": not connector_class(case.connector).reads_text,
            "image_cache": True,
            "val_split": "val",
            "questions_per_step": case.questions,
            "questions_per_image": case.questions // case.images,
        }
        options = VQAOptions(**values | changes)
        data = VQASystem.read(options)
        self.precision = Precision(case.precision, pick_device(case.device))
        plain = VQASystem.build(options, data, self.precision)
        self.model = plain.model.to(self.precision.device).train()
        parts = (self.model, plain.tokenizers, plain.processor, self.precision)
        self.systems = {"recomputed": plain, "cached": VQASystem(replace(options, feature_cache=True), *parts)}
        for system in self.systems.values():
            system.train_on(data)
            system.precompute()
        self.keys = [key for key in plain.epoch(0) if len(key.rows) == case.questions]
        self.optimizers = Optimizers(
            self.model, kind="adamw", learning_rate=5e-5, matrix_learning_rate=0.0, weight_decay=0.0
        )
        self.taken = dict.fromkeys(self.systems, 0)

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """The loss of each side on the first batch, at the weights of now, in eval mode (no dropout on either side)."""
        self.model.eval()
        found = {}
        for name, system in self.systems.items():
            batch = system.batch(self.keys[0])
            with self.precision.autocast():
                loss, _ = system.loss(batch.to(self.precision.device))
            found[name] = float(loss) / batch.counts[1]
        self.model.train()
        return found

    def step(self, name: str) -> float:
        """Seconds of one step of that side."""
        system = self.systems[name]
        key = self.keys[self.taken[name] % len(self.keys)]
        self.taken[name] += 1
        start = time.perf_counter()
        train_step(system.loss, system.batch(key).to(self.precision.device), self.optimizers, self.precision)
        if self.precision.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def compare(case: Case, rounds: int, changes: dict[str, Any]) -> list[str]:
    """One row of the table. Raises UserError if the losses differ."""
    say: Callable[[str], None] = lambda line: print(f"  {line}", file=sys.stderr, flush=True)  # noqa: E731
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(case, Path(folder), changes)
        losses = sides.losses()
        off = abs(losses["cached"] - losses["recomputed"]) / abs(losses["recomputed"])
        if not off <= TOLERANCE[case.precision]:
            raise UserError(f"the losses differ: {losses['cached']:.7f} cached, {losses['recomputed']:.7f} recomputed")
        for name in sides.systems:  # the first step makes the optimizer's state
            sides.step(name)
        turns = {name: partial(sides.step, name) for name in ("cached", "recomputed")}
        taken = timing.in_turn(turns, rounds, say)
        size = sum(path.stat().st_size for path in (Path(folder) / "cache").glob("features-*"))
    ratio = timing.speedup(taken["cached"], taken["recomputed"])
    spreads = [timing.Spread.of(taken[name]).text(3) for name in ("cached", "recomputed")]
    ratio_text = f"**{ratio.median:.2f}x** ({ratio.low:.2f} to {ratio.high:.2f})"
    cells = [case.precision, case.connector, str(case.questions), str(case.images), *spreads, ratio_text]
    return [*cells, f"{GOAL:.0f}x" if case.connector == "mean" else "none", f"{off:.1e}", f"{size / 1e6:.1f}"]


HEAD = "precision|connector|questions|images|cached, s|recomputed, s|ratio|goal|losses differ by|cache, MB".split("|")


def run(cases: list[Case], rounds: int, command: str, changes: dict[str, Any] | None = None) -> str:
    """Time the cases; returns the report. `changes` are options of the training config, for tests."""
    rows = [compare(case, rounds, changes or {}) for case in cases]
    return "\n".join(
        [
            "## Frozen encoders: features from the cache against recomputing them",
            "",
            __doc__.split("\n\n")[1].replace("\n", " "),
            "Times are medians of the turns with their quartiles. The cache is that of two steps' images.",
            "",
            results.table(HEAD, rows),
            "",
            f"- Peak memory of the process that holds both sides: {timing.peak_memory_gb():.2f} GB.",
            f"- {timing.machine()}. Python {sys.version.split()[0]}, torch {torch.__version__}. "
            f"Commit {timing.commit(Path(__file__).parent)}. `{command}`",
        ]
    )
