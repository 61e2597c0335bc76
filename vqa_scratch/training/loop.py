"""The training loop: one function that trains any task, and knows nothing about images or questions.

Order of a step: learning rate, forward and backward of each part, clip, optimizer step; then log, evaluate, save. The
loss of a step is the sum over its tokens divided by their true number, however many parts it is computed in and on
however many ranks: together they see the batches that one process would see, and step, stop and save as one.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vqa_scratch.data.batches import prefetch
from vqa_scratch.training.checkpoint import load_model_state, restore_streams, save_checkpoint, streams
from vqa_scratch.training.distributed import ALONE, World
from vqa_scratch.training.optimizers import Optimizers, schedule
from vqa_scratch.training.parallel import ONE_PROCESS, Alone, for_main, whole
from vqa_scratch.training.precision import Precision
from vqa_scratch.training.progress import MetricsLog
from vqa_scratch.training.task import Plan, State, Task
from vqa_scratch.training.watch import GracefulStop, LossWatch


class Next(NamedTuple):
    """A batch, or this rank's part of it, and what the ranks agreed on before it."""

    epoch: int
    position: int  # in the epoch, after this batch
    batch: Any
    samples: int  # of all ranks
    tokens: int  # of all ranks
    signal: int | None  # that asked any rank to stop


def batches_from(task: Task, state: State, pin: bool, world: World = ALONE) -> Iterator[tuple[int, int, Any]]:
    """(epoch, position after it, this rank's part of the batch), endlessly, from where `state` stands.

    A rank without a part gets a silent batch: it goes through the model like the others, and counts for nothing.
    """
    epoch, start = state.epoch, state.position
    while True:
        keys = task.epoch(epoch)
        for position in range(start, len(keys)):
            key, counts = task.share(keys[position], world) if world.size > 1 else (keys[position], True)
            batch = task.batch(key) if counts else task.batch(key).silent()
            yield epoch, position + 1, batch.pin() if pin else batch
        epoch, start = epoch + 1, 0


def train_step(
    task: Task,
    batch: Any,
    optimizers: Optimizers,
    precision: Precision,
    plan: Plan,
    ranks: Alone = ONE_PROCESS,
    tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One optimizer step. Returns (mean loss, share of tokens right, gradient norm), each a scalar on the device.

    `tokens` is the number of labelled tokens on all ranks; None: those of the batch.
    """
    tokens = task.size(batch)[1] if tokens is None else tokens
    parts = list(batch.parts(plan.accumulate))
    if ranks.world.size > 1:  # every rank goes through the model equally often
        parts += [parts[0].silent()] * (plan.accumulate - len(parts))
    loss_sum = correct_sum = None
    for number, part in enumerate(parts, 1):
        with ranks.backward_of(last=number == len(parts)):
            with precision.autocast():
                loss, correct = ranks.run(task.loss, part)
            # Gradients are averaged over ranks, and here their sum is wanted.
            precision.scaler.scale(loss / (tokens / ranks.world.size)).backward()
        loss_sum = loss.detach() if loss_sum is None else loss_sum + loss.detach()
        correct_sum = correct if correct_sum is None else correct_sum + correct
    for optimizer in optimizers.optimizers:
        precision.scaler.unscale_(optimizer)
    norm = whole(nn.utils.clip_grad_norm_(optimizers.parameters, plan.max_grad_norm))
    for optimizer in optimizers.optimizers:
        precision.scaler.step(optimizer)
    precision.scaler.update()
    optimizers.zero_grad()
    loss_sum, correct_sum = ranks.world.sum_(torch.stack([loss_sum.float(), correct_sum.float()]))
    return loss_sum / tokens, correct_sum / tokens, norm


def checkpoint_state(
    task: Task, optimizers: Optimizers, precision: Precision, state: State, world: World
) -> dict[str, Any]:
    """Everything needed to go on, whole on the main rank, so that another number can; all ranks must call it."""
    return {
        "model": for_main(task.model.state_dict(), world),
        "optimizers": for_main(optimizers.state_dict(), world),
        "scaler": precision.scaler.state_dict(),
        "state": asdict(state),
        "rng": streams(world),
        "precision": precision.kind,
    }


def restore(
    saved: dict[str, Any],
    task: Task,
    optimizers: Optimizers,
    precision: Precision,
    where: str,
    world: World = ALONE,
) -> State:
    """Bring everything back to where the checkpoint was taken. Raises UserError if it does not fit the model.

    Takes weights and moments out of `saved`, so that a second copy of them does not stay in memory.
    """
    load_model_state(task.model, saved.pop("model"), where)
    optimizers.load_state_dict(saved.pop("optimizers"))
    precision.scaler.load_state_dict(saved["scaler"])
    restore_streams(saved["rng"], world, saved["state"]["step"])
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
    ranks: Alone = ONE_PROCESS,
    on_best: Callable[[], None],
    after_evaluation: Callable[[], None] = lambda: None,
) -> int | None:
    """Train until the plan is over. Returns None, or the number of the signal that stopped it early.

    `folder` receives checkpoints/last.pt; `on_best` is called when the validation accuracy is the best so far, on all
    ranks, and `after_evaluation` after every evaluation, on the main one. `state` is updated in place.
    """
    world = ranks.world
    last, watch, device = folder / "checkpoints" / "last.pt", LossWatch(folder, world), precision.device
    task.model.train()
    resumed_seconds, began = state.seconds, time.perf_counter()
    window_began, window_samples = began, 0

    def clock() -> float:
        """Seconds of the run so far, by the main rank's clock; the others add nothing."""
        return resumed_seconds + time.perf_counter() - began if world.main else 0.0

    def ahead() -> Next:
        """The next batch, and what ranks must agree on before it: its size, the time, whether to stop."""
        epoch, position, batch = next(source)
        samples, tokens, state.seconds, *votes = world.totals([*task.size(batch), clock(), *stop.votes()])
        return Next(epoch, position, batch, int(samples), int(tokens), stop.elected(votes))

    def save() -> None:
        watch.look()
        saved = checkpoint_state(task, optimizers, precision, state, world)
        if world.main:
            save_checkpoint(last, saved)

    def evaluate() -> None:
        watch.look()
        figures = ranks.with_whole_model(task.evaluate)
        log.write(state.step, samples=state.samples, seconds=round(state.seconds, 2), val=figures)
        if figures["accuracy"] > state.best:
            state.best, state.best_step = figures["accuracy"], state.step
            on_best()
        if world.main:
            after_evaluation()
        (state.seconds,) = world.totals([clock()])

    bar = tqdm(
        total=100.0,
        initial=round(100 * plan.progress(state.step, state.seconds), 2),
        desc="training",
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
    )
    with GracefulStop() as stop, bar:
        source = prefetch(batches_from(task, state, device.type == "cuda", world))
        over = plan.progress(state.step, state.seconds) >= 1
        now = None if over else ahead()
        while not over and now.signal is None:
            progress = plan.progress(state.step, state.seconds)
            optimizers.set_factor(schedule(state.step, progress, plan.warmup_steps, plan.decay_from))
            ids = task.ids(now.batch)
            loss, right, norm = train_step(task, now.batch.to(device), optimizers, precision, plan, ranks, now.tokens)
            watch.add("loss", state.step + 1, ids, loss)
            if not precision.scaler.is_enabled():  # a scaler finds infinite gradients itself, and skips the step
                watch.add("gradient", state.step + 1, ids, norm)
            state.step, state.epoch, state.position = state.step + 1, now.epoch, now.position
            state.samples, window_samples = state.samples + now.samples, window_samples + now.samples
            now = ahead()

            logging = state.step == 1 or state.step % plan.log_every == 0
            if logging or device.type == "cpu":
                watch.look()  # on a GPU this is where the program waits for it
            if logging:
                moment = time.perf_counter()
                rate = window_samples / (moment - window_began)
                window_began, window_samples = moment, 0
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
                window_began, window_samples = time.perf_counter(), 0
            if state.step % plan.save_every == 0 or over or now.signal is not None:
                save()
        source.close()
        stopped = stop.elected(world.totals(stop.votes()))
        if stopped is None:
            bar.update(100 - bar.n)
    return stopped
