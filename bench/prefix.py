"""What it saves to run an image's prefix through the decoder once: training steps, and answers, with and without."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.results import table
from bench.taps import Steps
from bench.timing import Spread, commit, in_turn, machine, speedup
from vqa_scratch.nn.connecting import Conditioning, Connector
from vqa_scratch.nn.states import States
from vqa_scratch.systems.answering import How

GOAL = 3.0  # of a training step with 8 questions an image
WARM = 2  # rounds before the clock counts
TOLERANCE = 1e-4  # relative, of the loss: sums over some 6,000 tokens in another order


@contextmanager
def apart(connector: Connector) -> Iterator[None]:
    """Inside, each row has a prefix of its own, as if no two were about the same image."""
    real = connector.forward

    def one_each(image: States, text: States | None, image_index: Tensor | None = None) -> Conditioning:
        return Conditioning(prefix=real(image, text).prefix[image_index])  # type: ignore[index]  # it makes a prefix

    connector.forward = one_each  # type: ignore[method-assign]
    try:
        yield
    finally:
        connector.forward = real  # type: ignore[method-assign]


class PrefixSteps(Steps):
    """Training steps on one batch, and answers to its questions."""

    def step_apart(self) -> float:
        with apart(self.system.model.connector):
            return self.step()

    def answer(self) -> float:
        """Seconds for the answers to the questions of the batch."""
        start, split = time.perf_counter(), self.system.splits["train"]
        rows = np.asarray(self.system.epoch(0)[0].rows)
        with torch.no_grad(), self.precision.autocast():
            self.system.model.eval()
            self.said = self.system.respond(split.questions, rows, self.batch, How())
            self.system.model.train()
        return time.perf_counter() - start

    def answer_apart(self) -> float:
        with apart(self.system.model.connector):
            return self.answer()


def run(rounds: int, questions: int, command: str) -> str:
    """The section for RESULTS.md. Raises AssertionError if the loss or an answer differs."""
    rows, kinds = [], set()
    for kind in ("prefix", "qformer"):
        with tempfile.TemporaryDirectory() as folder:
            steps = PrefixSteps(Path(folder), questions, ("--connector", kind, "--question-prompt"))
        loss, model = steps.loss(), steps.system.model
        with apart(model.connector):
            assert torch.isclose(steps.loss(), loss, rtol=TOLERANCE), "the loss differs"
        steps.answer()
        said = steps.said
        steps.answer_apart()
        same = sum(a[0].text == b[0].text for a, b in zip(said, steps.said, strict=True))
        assert same >= 0.98 * len(said), f"only {same} of {len(said)} answers are the same"  # ties in a random model
        kinds.add(steps.precision.kind)
        for what, sides in (
            ("a training step", (steps.step, steps.step_apart)),
            ("answers", (steps.answer, steps.answer_apart)),
        ):
            taken = in_turn(dict(zip(("once", "apart"), sides, strict=True)), WARM + rounds)
            once, each = taken["once"][WARM:], taken["apart"][WARM:]
            ratio = speedup(once, each)
            speed = " / ".join(f"{questions / Spread.of(side).median:,.0f}" for side in (once, each))
            rows.append(
                [
                    f"`{kind}`, {what}",
                    f"{questions} of {len(steps.batch.images)}",
                    speed,
                    f"**{ratio.median:.2f}x** ({ratio.low:.2f} to {ratio.high:.2f})",
                    f"{GOAL}x" if (kind, what) == ("prefix", "a training step") else "",
                ]
            )
    head = ["connector", "questions of images", "questions/s, once / a prefix each", "ratio", "goal"]
    return f"""## A prefix that goes through the decoder once for all questions of its image

Preset `shapes` in {", ".join(sorted(kinds))}, in turn, {rounds} rounds; without the sharing the image is encoded once
too, and only its prefix is repeated. The loss is the same, and so are the answers.

{table(head, rows)}

- {machine()}. torch {torch.__version__}. Commit {commit(Path(__file__).parent)}. `{command}`"""
