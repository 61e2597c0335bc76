"""The training loop: one function that trains any task, and knows nothing about images or questions.

Order of a step: learning rate, forward and backward of each part, clip, optimizer step; then log, evaluate, save. The
loss of a step is the sum over its tokens divided by their true number, however many parts it is computed in.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vqa_scratch.data.batches import prefetch
from vqa_scratch.engine.checkpoint import load_model_state, rng_state, save_checkpoint, set_rng_state
from vqa_scratch.engine.optim import Optimizers, schedule
from vqa_scratch.engine.precision import Precision
from vqa_scratch.engine.progress import MetricsLog
from vqa_scratch.errors import UserError
from vqa_scratch.storage import write_json


class Task(Protocol):
    """What the loop needs to know about the thing it trains."""

    model: nn.Module

    def epoch(self, number: int) -> list[Any]:
        """What `batch` takes for each step of an epoch; a function of `number` alone."""

    def batch(self, key: Any) -> Any:
        """The batch of that key, on the CPU; has `to(device)`, `pin()` and `parts(number)`."""

    def size(self, batch: Any) -> tuple[int, int]:
        """(samples, tokens that carry a loss) of a batch or part."""

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """(sum of the loss over tokens, number of tokens predicted right); runs inside autocast."""

    def ids(self, batch: Any) -> list[int]:
        """Names of the samples, for the report on a batch that broke the loss."""

    def evaluate(self) -> dict[str, float]:
        """Figures on the validation split; `accuracy` picks the best checkpoint."""


@dataclass(frozen=True)
class Plan:
    """How long and how to train. Exactly one of `steps` and `seconds` bounds the run."""

    steps: int | None
    seconds: float | None
    warmup_steps: int
    decay_from: float
    accumulate: int
    max_grad_norm: float
    log_every: int
    eval_every: int
    save_every: int

    def progress(self, step: int, seconds: float) -> float:
        """The share of the run that is over, 0 to 1."""
        return min(1.0, step / self.steps if self.steps is not None else seconds / max(self.seconds, 1e-9))


@dataclass
class State:
    """Where a run stands; part of every checkpoint."""

    step: int = 0
    epoch: int = 0
    position: int = 0  # batches of the epoch that are done
    samples: int = 0
    seconds: float = 0.0
    best: float = -1.0
    best_step: int = 0


@dataclass
class GracefulStop:
    """While installed, the first SIGINT or SIGTERM asks the loop to save and stop; a second one ends the program."""

    signal: int | None = None
    _previous: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> "GracefulStop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, self._previous[number])


class NotFinite(UserError):
    """The loss or its gradient became NaN or infinite."""


class LossWatch:
    """Collects losses and gradient norms on the device, and looks at them in one go, so that a GPU is not waited for at
    every step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pending: list[tuple[str, int, list[int], Tensor]] = []

    def add(self, what: str, step: int, ids: list[int], value: Tensor) -> None:
        self.pending.append((what, step, ids, value.detach()))

    def look(self) -> None:
        """Raise NotFinite for the first value that is no number, after writing its samples' ids to a file."""
        if not self.pending:
            return
        values = torch.stack([value for *_, value in self.pending]).tolist()
        for (what, step, ids, _), value in zip(self.pending, values, strict=True):
            if not math.isfinite(value):
                path = self.folder / "bad_batch.json"
                write_json(path, {"step": step, what: str(value), "ids": ids})
                raise NotFinite(
                    f"the {what} of step {step} is {value}; its samples are listed in {path}, the last good checkpoint "
                    "is kept; go on from it with --resume and a lower --learning-rate"
                )
        self.pending.clear()


def batches_from(task: Task, state: State, pin: bool) -> Iterator[tuple[int, int, Any]]:
    """(epoch, position after it, batch), endlessly, from where `state` stands."""
    epoch, start = state.epoch, state.position
    while True:
        keys = task.epoch(epoch)
        for position in range(start, len(keys)):
            batch = task.batch(keys[position])
            yield epoch, position + 1, batch.pin() if pin else batch
        epoch, start = epoch + 1, 0


def train_step(
    task: Task, batch: Any, optimizers: Optimizers, precision: Precision, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """One optimizer step. Returns (mean loss, share of tokens right, gradient norm), each a scalar on the device."""
    _, tokens = task.size(batch)
    loss_sum = correct_sum = None
    for part in batch.parts(plan.accumulate):
        with precision.autocast():
            loss, correct = task.loss(part)
        precision.scaler.scale(loss / tokens).backward()
        loss_sum = loss.detach() if loss_sum is None else loss_sum + loss.detach()
        correct_sum = correct if correct_sum is None else correct_sum + correct
    for optimizer in optimizers.optimizers:
        precision.scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(optimizers.parameters, plan.max_grad_norm)
    for optimizer in optimizers.optimizers:
        precision.scaler.step(optimizer)
    precision.scaler.update()
    optimizers.zero_grad()
    return loss_sum / tokens, correct_sum / tokens, norm


def checkpoint_state(task: Task, optimizers: Optimizers, precision: Precision, state: State) -> dict[str, Any]:
    return {
        "model": task.model.state_dict(),
        "optimizers": optimizers.state_dict(),
        "scaler": precision.scaler.state_dict(),
        "state": asdict(state),
        "rng": rng_state(),
        "precision": precision.kind,
    }


def restore(saved: dict[str, Any], task: Task, optimizers: Optimizers, precision: Precision, where: str) -> State:
    """Bring everything back to where the checkpoint was taken. Raises UserError if it does not fit the model."""
    load_model_state(task.model, saved["model"], where)
    optimizers.load_state_dict(saved["optimizers"])
    precision.scaler.load_state_dict(saved["scaler"])
    set_rng_state(saved["rng"])
    return State(**saved["state"])


def fit(
    task: Task,
    optimizers: Optimizers,
    precision: Precision,
    plan: Plan,
    log: MetricsLog,
    folder: Path,
    state: State,
    *,
    on_best: Callable[[], None],
    after_evaluation: Callable[[], None] = lambda: None,
) -> int | None:
    """Train until the plan is over. Returns None, or the number of the signal that stopped it early.

    `folder` receives checkpoints/last.pt; `on_best` is called when the validation accuracy is the best so far, and
    `after_evaluation` after every evaluation. `state` is updated in place.
    """
    last, watch, device = folder / "checkpoints" / "last.pt", LossWatch(folder), precision.device
    task.model.train()
    resumed_seconds, began = state.seconds, time.perf_counter()
    window_began, window_samples = began, 0

    def save() -> None:
        watch.look()
        save_checkpoint(last, checkpoint_state(task, optimizers, precision, state))

    def evaluate() -> None:
        watch.look()
        figures = task.evaluate()
        log.write(state.step, samples=state.samples, seconds=round(state.seconds, 2), **{"val": figures})
        if figures["accuracy"] > state.best:
            state.best, state.best_step = figures["accuracy"], state.step
            on_best()
        after_evaluation()

    bar = tqdm(
        total=100.0,
        initial=round(100 * plan.progress(state.step, state.seconds), 2),
        desc="training",
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
    )
    with GracefulStop() as stop, bar:
        source = prefetch(batches_from(task, state, pin=device.type == "cuda"))
        while plan.progress(state.step, state.seconds) < 1 and stop.signal is None:
            epoch, position, batch = next(source)
            progress = plan.progress(state.step, state.seconds)
            optimizers.set_factor(schedule(state.step, progress, plan.warmup_steps, plan.decay_from))
            ids = task.ids(batch)
            samples, _ = task.size(batch)
            batch = batch.to(device)
            loss, right, norm = train_step(task, batch, optimizers, precision, plan)
            watch.add("loss", state.step + 1, ids, loss)
            if not precision.scaler.is_enabled():  # a scaler finds infinite gradients itself, and skips the step
                watch.add("gradient", state.step + 1, ids, norm)
            state.step, state.epoch, state.position = state.step + 1, epoch, position
            state.samples, window_samples = state.samples + samples, window_samples + samples
            state.seconds = resumed_seconds + time.perf_counter() - began

            logging = state.step == 1 or state.step % plan.log_every == 0
            if logging or device.type == "cpu":
                watch.look()  # on a GPU this is where the program waits for it
            if logging:
                now = time.perf_counter()
                rate = window_samples / (now - window_began)
                window_began, window_samples = now, 0
                values = {"loss": loss.item(), "token_accuracy": right.item(), "grad_norm": norm.item()}
                log.write(
                    state.step,
                    samples=state.samples,
                    seconds=round(state.seconds, 2),
                    lr_factor=schedule(state.step, progress, plan.warmup_steps, plan.decay_from),
                    samples_per_second=round(rate, 1),
                    **values,
                )
                bar.set_postfix_str(
                    f"step {state.step}, loss {values['loss']:.3f}, tokens right {values['token_accuracy']:.2f}, "
                    f"{rate:.0f} samples/s" + (f", val {state.best:.3f}" if state.best >= 0 else "")
                )
                bar.update(round(100 * plan.progress(state.step, state.seconds), 2) - bar.n)
            over = plan.progress(state.step, state.seconds) >= 1
            if state.step % plan.eval_every == 0 or over:
                evaluate()
                state.seconds = resumed_seconds + time.perf_counter() - began
                window_began, window_samples = time.perf_counter(), 0
            if state.step % plan.save_every == 0 or over or stop.signal is not None:
                save()
        source.close()
        if stop.signal is None:
            bar.update(100 - bar.n)
    return stop.signal
