"""Train a system, such as one that answers questions about images:  python train.py [--preset NAME] [--help]

The default needs no files: it draws a data set, trains small models on it, and writes to the run folder the weights,
the curves, a page of answered questions, and summary.json with the final figures. What a preset trains is one class in
`vqa_scratch/systems/`; this file is how it is trained, from the options to the last figure.
"""

import time

from vqa_scratch.command_line import count_seconds, read_first, run_program
from vqa_scratch.systems.options import RunOptions, read_command_line

# ruff: noqa: E402 -- the command line is read before torch is imported, so that --help and a wrong flag answer at once
if __name__ == "__main__":
    BEGAN = time.perf_counter() - time.process_time()  # about when the process did
    OPTIONS = read_first(read_command_line)
    if OPTIONS.seeds is None:  # their runs show bars of their own
        count_seconds("train.py")

import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqa_scratch import systems
from vqa_scratch.data.batches import prefetch
from vqa_scratch.options import from_json
from vqa_scratch.report.curves import draw_panels
from vqa_scratch.storage import without_collections, write_json
from vqa_scratch.systems.base import System
from vqa_scratch.systems.run_folder import WEIGHTS, begin_or_go_on, check_same_data, load_weights, restore, save_weights
from vqa_scratch.systems.seeds import run_seeds
from vqa_scratch.training.allocator import keep_freed_memory
from vqa_scratch.training.checkpoint import fitting, save_checkpoint, separate_streams, streams
from vqa_scratch.training.launch import start
from vqa_scratch.training.optimizers import Optimizers, schedule
from vqa_scratch.training.precision import Precision, formats, pick_device
from vqa_scratch.training.profile import profiling
from vqa_scratch.training.progress import Bar, MetricsLog, peak_memory_gb
from vqa_scratch.training.ranks import ONE_PROCESS, Alone, World, for_main, whole
from vqa_scratch.training.recompute import recompute_blocks
from vqa_scratch.training.resume import held
from vqa_scratch.training.sharing import check_sharing, share_model
from vqa_scratch.training.threads import Threads, choose_way, thread_counts
from vqa_scratch.training.watch import GracefulStop, LossWatch

FINAL_SHARE = 0.25  # of --minutes: what the final figures take at most; then they are of fewer samples
WORTHWHILE = 10.0  # seconds: if so many are left once the time kept back was measured again, training goes on


@dataclass
class Progress:
    """Where a run stands; part of every checkpoint."""

    step: int = 0
    epoch: int = 0
    position: int = 0  # batches done in the epoch
    samples: int = 0
    seconds: float = 0.0
    best: float = -1.0
    best_step: int = 0


class Next(NamedTuple):
    """The next batch, or this rank's part of it, and what all ranks agreed on before it."""

    epoch: int
    position: int  # in the epoch, after this batch
    batch: Any
    samples: int  # on all ranks
    counted: int  # on all ranks: labelled tokens or questions, by which the loss is divided
    signal: int | None  # to stop, if any rank received one


def batches_from(system: System, epoch: int, start: int, world: World, pin: bool) -> Iterator[tuple[int, int, Any]]:
    """(epoch, position after the batch, this rank's part of it), without end, from batch `start` of an epoch.

    A rank without a part gets a silent batch: it goes through the model like any other, but adds nothing.
    """
    while True:
        keys = system.epoch(epoch)
        for position in range(start, len(keys)):
            key, counts = system.share(keys[position], world) if world.size > 1 else (keys[position], True)
            batch = system.batch(key) if counts else system.batch(key).silent()
            yield epoch, position + 1, batch.pin() if pin else batch
        epoch, start = epoch + 1, 0


def train_step(
    loss_of: Any,
    batch: Any,
    optimizers: Optimizers,
    precision: Precision,
    *,
    accumulate: int = 1,
    max_grad_norm: float = 1.0,
    counted: int | None = None,
    ranks: Alone = ONE_PROCESS,
) -> tuple[Tensor, Tensor, Tensor]:
    """One optimizer step. Returns (mean loss, share predicted right, gradient norm), each a scalar on the device.

    `loss_of(part)` is `System.loss`, wrapped by `ranks.shared`. The loss of a step is the sum over the labelled tokens
    divided by their number on all ranks, `counted` (None: those of the batch). So it does not depend on how many parts
    the batch is split into (gradient accumulation), nor on the number of ranks.
    """
    counted = batch.counts[1] if counted is None else counted
    parts = list(batch.parts(accumulate))
    if ranks.world.size > 1:  # every rank must go through the model equally often
        parts += [parts[0].silent()] * (accumulate - len(parts))
    sums = torch.zeros(2, device=precision.device)
    for number, part in enumerate(parts, 1):
        with ranks.backward_of(last=number == len(parts)):
            with precision.autocast():
                loss, right = loss_of(part)
            # Times the ranks: they average their gradients, and the step needs the sum.
            precision.scaler.scale(loss * (ranks.world.size / counted)).backward()
        sums += torch.stack([loss.detach().float(), right.float()])
    for optimizer in optimizers.optimizers:
        precision.scaler.unscale_(optimizer)
    norm = whole(nn.utils.clip_grad_norm_(optimizers.parameters, max_grad_norm))
    for optimizer in optimizers.optimizers:
        precision.scaler.step(optimizer)
    precision.scaler.update()
    optimizers.zero_grad()
    mean_loss, share_right = ranks.world.sum_(sums) / counted
    return mean_loss, share_right, norm


def train(options: RunOptions, world: World, began: float) -> int | None:
    """Train, evaluate and report; --minutes count from `began`. Returns the signal that stopped it early, if any."""
    # ---- the machine
    keep_freed_memory()
    options, checkpoint = begin_or_go_on(options)
    world.check_same(checkpoint and checkpoint["state"]["step"], f"the last step in {options.out}")
    device = pick_device(options.device)
    kinds = formats(checkpoint["precision"] if checkpoint else options.precision, device)
    precision = Precision(kinds[0], device)
    check_sharing(options.parallel, precision)

    # ---- the system and its data
    kind_of_system = systems.find(options.preset)
    if not checkpoint:
        kind_of_system.check(options)
    with world.first_one_then_all(), without_collections():  # the first rank draws data and decodes images
        data = kind_of_system.read(options)
        hashes = data.hashes()
        if checkpoint:  # with the tokenizers and answers of the run
            check_same_data(options, hashes)
            system = systems.open_parts(options.out, options, precision)
        else:
            system = kind_of_system.build(options, data, precision)
        system.data_hashes = hashes
        system.train_on(data)
    system.model.to(device)
    threads = Threads(thread_counts(options.threads, device, world.size > 1 or options.compile), system.unit)
    precision, why = choose_way(kinds, threads, device, system.trial, world)
    system.precision, system.world = precision, world
    print(f"device {device}, {why}" + (f", {world.size} ranks, {options.parallel}" if world.size > 1 else ""))
    print(*system.about(), sep="\n")
    if options.gradient_checkpointing:
        recompute_blocks(system.model)
    ranks = share_model(options.parallel, system.model, world, precision)
    optimizers = Optimizers(
        system.model,
        kind=options.optimizer,
        learning_rate=options.learning_rate,
        matrix_learning_rate=options.matrix_learning_rate,
        weight_decay=options.weight_decay,
    )
    system.trained_by(optimizers)

    # ---- where the run stands
    options.out.mkdir(parents=True, exist_ok=True)
    weights, curves, last = (options.out / name for name in (WEIGHTS, "curves.png", "checkpoints/last.pt"))
    progress = Progress()
    if checkpoint:
        progress = from_json(Progress, restore(checkpoint, system, optimizers), str(last))
        print(f"resuming after step {progress.step}")
    else:
        separate_streams(world)
    if world.main:
        system.save(options.out)  # also of a run that goes on, with what it may change: the next --resume reads it
    with world.first_one_then_all():  # the first rank runs frozen encoders, if their output is cached
        system.precompute()
    log = MetricsLog(options.out / "metrics.jsonl", progress.step if checkpoint else None, world.main, options.log_to)
    with fitting(log.path):  # what is wrong with the rows of a resumed run shows now, not when curves are drawn
        system.panels(log.rows)
    watch = LossWatch(options.out, world, system.ids)
    reporting, reserve = 0.0, 0.0  # seconds that weights and curves take, and those kept back for the end, as measured

    def keep_back() -> None:
        """Measure how much of --minutes is kept back for the final figures."""
        nonlocal reserve
        seconds = ranks.with_whole_model(lambda: system.seconds_to_finish(FINAL_SHARE * 60 * (options.minutes or 0)))
        reserve = world.of_main(seconds + 2 * reporting)  # the last checkpoint and the pages too

    budget = None  # seconds of training and final figures, if --minutes limits the run
    if options.minutes is not None:
        keep_back()
        budget = world.of_main(60 * options.minutes - (time.perf_counter() - began))
    resumed_seconds, loop_began = progress.seconds, time.perf_counter()

    def clock() -> float:
        """Seconds of the run so far by the main rank's clock; 0 on the others, so that a sum gives it to all."""
        return resumed_seconds + time.perf_counter() - loop_began if world.main else 0.0

    def share_done(seconds: float | None = None) -> float:
        """The share of the training that is done, 0 to 1, after these seconds; by default as the ranks last agreed."""
        if budget is None:
            return min(1.0, progress.step / (options.steps or 1))
        return min(1.0, (progress.seconds if seconds is None else seconds) / max(budget - reserve, 1.0))

    def next_batch() -> Next:
        """The next batch; before it the ranks agree on its size, the time, and whether to stop."""
        epoch, position, batch = next(source)
        samples, counted, progress.seconds, *votes = world.totals([*batch.counts, clock(), *stop.votes()])
        return Next(epoch, position, batch, int(samples), int(counted), stop.elected(votes))

    def evaluate() -> None:
        nonlocal reporting
        watch.look()
        figures = ranks.with_whole_model(system.evaluate)
        answered = time.perf_counter()
        log.write(progress.step, samples=progress.samples, seconds=round(progress.seconds, 2), val=figures)
        if figures["accuracy"] > progress.best:
            progress.best, progress.best_step = figures["accuracy"], progress.step
            save_weights(weights, system.model, world)
        if world.main:
            draw_panels(curves, system.panels(log.rows))
        reporting = time.perf_counter() - answered
        if budget is not None:
            keep_back()
        (progress.seconds,) = world.totals([clock()])

    def save() -> None:
        """Everything needed to resume, gathered on the main rank, so that any number of ranks can."""
        watch.look()
        saved = {
            "model": for_main(system.model.state_dict(), world),
            "optimizers": for_main(optimizers.state_dict(), world),
            "scaler": precision.scaler.state_dict(),
            "state": asdict(progress),
            "rng": streams(world),
            "precision": precision.kind,
        }
        if world.main:
            save_checkpoint(last, saved)

    # ---- the loop: learning rate, step, log, evaluate, save
    loss_of = ranks.shared(torch.compile(system.loss, dynamic=True) if options.compile else system.loss)
    plain = partial(train_step, accumulate=options.accumulate, max_grad_norm=options.max_grad_norm, ranks=ranks)
    profiled = profiling(plain, options.profile, options.out / "trace.json", world.main)
    system.model.train()
    window_began, window_samples = time.perf_counter(), 0
    bar = Bar(lambda: share_done(clock()), progress, log.rows, system.unit)
    with GracefulStop() as stop, bar, profiled as step:
        source = prefetch(batches_from(system, progress.epoch, progress.position, world, pin=device.type == "cuda"))
        over = share_done() >= 1
        now = None if over else next_batch()
        while now is not None and now.signal is None and not over:
            factor = schedule(progress.step, share_done(), options.warmup_steps, options.decay_from)
            optimizers.set_factor(factor)
            step_began = time.perf_counter()
            loss, right, norm = step(loss_of, now.batch.to(device), optimizers, precision, counted=now.counted)
            step_ended = time.perf_counter()
            if step_ended >= threads.due:  # not each short step
                threads.look(now.samples, step_began, step_ended)
            progress.step, progress.epoch, progress.position = progress.step + 1, now.epoch, now.position
            progress.samples, window_samples = progress.samples + now.samples, window_samples + now.samples
            # A gradient scaler finds infinite gradients itself, and skips the step.
            watch.add(progress.step, now.batch.rows, loss, None if precision.scaler.is_enabled() else norm)
            now = next_batch()

            logging = progress.step == 1 or progress.step % options.log_every == 0
            if logging or device.type == "cpu":
                watch.look()  # this is where the program waits for a GPU
            if logging:
                rate = window_samples / (time.perf_counter() - window_began)
                window_began, window_samples = time.perf_counter(), 0
                log.write(
                    progress.step,
                    samples=progress.samples,
                    seconds=round(progress.seconds, 2),
                    lr_factor=factor,
                    samples_per_second=round(rate, 1),
                    threads=torch.get_num_threads(),
                    loss=loss.item(),
                    token_accuracy=right.item(),
                    grad_norm=norm.item(),
                )
            over = share_done() >= 1
            if progress.step % options.eval_every == 0 or over:
                evaluate()
                over = over and (budget is None or budget - reserve - progress.seconds < WORTHWHILE)
                window_began, window_samples = time.perf_counter(), 0
            if progress.step % options.save_every == 0 or over or now.signal is not None:
                save()
        source.close()
        stopped = stop.elected(world.totals(stop.votes()))
    if stopped is not None:
        again = f"python train.py --preset {options.preset} --out {shlex.quote(str(options.out))} --resume"
        print(f"stopped by signal {stopped} after step {progress.step}; resume with: {again}")
        return stopped

    # ---- the final figures, with the best weights
    load_weights(system.model, options.out, system.precision)
    if budget is not None:  # a run that was resumed after its time has as much as it would have kept back
        ends = loop_began + budget - resumed_seconds - reporting
        system.pace.ends = max(ends, time.perf_counter() + reserve) if resumed_seconds else ends
    figures = ranks.with_whole_model(lambda: system.finish(options.out))
    if not world.main:
        return None
    draw_panels(curves, system.panels(log.rows))
    rates = sorted(row["samples_per_second"] for row in log.rows if "samples_per_second" in row)
    summary = {
        **figures,
        "validation_accuracy": progress.best,
        f"{system.unit}_seen": progress.samples,
        "steps": progress.step,
        "seconds": round(time.perf_counter() - began + (checkpoint["state"]["seconds"] if checkpoint else 0.0), 1),
        "samples_per_second": rates[len(rates) // 2] if rates else None,
        "peak_memory_gb": round(peak_memory_gb(device), 2),
        "device": str(device),
        "precision": precision.kind,
    }
    write_json(options.out / "summary.json", summary)
    speed = [f"{name:20s} {summary[name]}" for name in ("seconds", "samples_per_second")]
    print(*system.lines(figures), *speed, sep="\n")
    print(f"look at {options.out / 'samples.html'} and {curves}", *system.what_next(options.out), sep="\n")
    return None


def main(options: RunOptions, began: float | None = None) -> int | None:
    """Run `train` as one of the ranks that torchrun started, or as the only one; `began`: when, if not now."""
    if options.seeds is not None:
        return run_seeds(options, __file__)
    with start(options.device) as world, held(options.out, options.resume, "train.py", world):
        return train(options, world, time.perf_counter() if began is None else began)


if __name__ == "__main__":
    run_program(main, OPTIONS, BEGAN)
