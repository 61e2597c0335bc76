"""Train a system that answers questions about images:  python train.py [--preset NAME] [--out RUN] [--help]

The default needs nothing but this machine: it draws its own data set, trains three small towers on it, and leaves in
the run folder the weights, the curves, a page of answered questions, and summary.json with the final figures. What a
preset trains is a system of its own in `vqa_scratch/systems/`; this file is what they have in common.

    torchrun --nproc-per-node 8 train.py ...   # one process a GPU; docs/scale.md
"""

import sys

from vqa_scratch.command_line import errors_in_one_line, run_program
from vqa_scratch.systems.options import PRESETS, RunOptions, read_command_line

# ruff: noqa: E402 -- the command line is read before torch is imported, so that --help and a wrong flag answer at once
if __name__ == "__main__":
    with errors_in_one_line():
        OPTIONS = read_command_line(sys.argv[1:])

import resource
import shlex
import time
from dataclasses import fields, replace
from typing import Any

import torch

from vqa_scratch.errors import UserError
from vqa_scratch.options import changeable, check_dependencies, flag, from_json
from vqa_scratch.report.curves import draw_panels
from vqa_scratch.run import load_file_state, read_run_config, save_weights
from vqa_scratch.storage import check_writable, remove_unfinished, write_json
from vqa_scratch.systems import system_of
from vqa_scratch.training.allocator import keep_freed_memory
from vqa_scratch.training.checkpoint import load_checkpoint, load_model_state, separate_streams
from vqa_scratch.training.distributed import World, start
from vqa_scratch.training.loop import Plan, State, fit, restore
from vqa_scratch.training.optimizers import Optimizers
from vqa_scratch.training.parallel import check_sharing, share_model
from vqa_scratch.training.precision import Precision, pick_device, pick_precision
from vqa_scratch.training.progress import MetricsLog

# Kept back from --minutes for the final evaluation: a share of the budget, and never more than so many seconds.
RESERVE_SHARE, RESERVE_SECONDS = 0.1, 45.0


def settle(config: RunOptions) -> tuple[RunOptions, dict[str, Any] | None]:
    """With --resume, the config of the run and its last checkpoint (None if it was stopped before the first)."""
    path = config.out / "checkpoints" / "last.pt"
    check_writable(config.out)
    if not config.resume:
        if path.exists():
            raise UserError(f"{config.out} holds a run already; add --resume to go on with it, or give another --out")
        return config, None
    values = read_run_config(config.out)
    if values["program"] != "train.py" or values["train"]["preset"] != config.preset:
        preset = values.get("train", {}).get("preset", values["program"])
        raise UserError(f"{config.out} is a run of preset {preset}, not {config.preset}; give another --out")
    saved = from_json(type(config), values["train"], str(config.out / "config.json"))
    plain = {f.name: f.default for f in fields(config)} | {"minutes": 10.0}
    given = {k: v for k, v in vars(config).items() if v != plain[k] and v != PRESETS[config.preset].get(k)}
    may_change = changeable(type(config))
    other = {k: v for k, v in given.items() if k not in may_change and v != getattr(saved, k)}
    if other:
        what = ", ".join(f"{flag(k)} {getattr(saved, k)}, not {v}" for k, v in other.items())
        raise UserError(f"{config.out} was begun with {what}; a run goes on with the options it was begun with")
    remove_unfinished(config.out)
    changes = {k: v for k, v in given.items() if k in may_change} | {"out": config.out, "resume": False}
    saved = replace(saved, **changes)
    check_dependencies(saved, changes)
    return saved, load_checkpoint(path) if path.exists() else None


def peak_memory_gb(device: torch.device) -> float:
    """The most memory used so far: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main(config: RunOptions) -> int | None:
    """Train, evaluate and report. Returns None, or the number of the signal that stopped the run early."""
    with start(config.device) as world:
        return train(config, world)


def train(config: RunOptions, world: World) -> int | None:
    """`main`, as one of the ranks that torchrun started, or as the only one."""
    began = time.perf_counter()
    keep_freed_memory()
    config, checkpoint = settle(config)
    world.check_same(checkpoint and checkpoint["state"]["step"], f"the last step in {config.out}")
    device = pick_device(config.device)
    wanted = checkpoint["precision"] if checkpoint else config.precision
    kind, reason = world.of_main(pick_precision(wanted, device))  # it may be measured, and must be the same
    precision = Precision(kind, device)
    check_sharing(config.parallel, precision)
    print(f"device {device}, {reason}" + (f", {world.size} ranks, {config.parallel}" if world.size > 1 else ""))

    with world.first_one_then_all():  # the first draws data and decodes images
        job = system_of(config.preset).prepare(config, precision)
    job.world = world
    job.model.to(device)
    precision.suit_attention(job.model)
    print(*job.about(), sep="\n")
    ranks = share_model(config.parallel, job.model, world, precision)
    optimizers = Optimizers(
        job.model,
        kind=config.optimizer,
        learning_rate=config.learning_rate,
        matrix_learning_rate=config.matrix_learning_rate,
        weight_decay=config.weight_decay,
    )

    config.out.mkdir(parents=True, exist_ok=True)
    state = State()
    if checkpoint:
        state = restore(checkpoint, job, optimizers, precision, str(config.out), world)
        print(f"going on after step {state.step}")
    else:
        separate_streams(world)
        if world.main:
            job.save_parts(config.out)
    with world.first_one_then_all():  # the first lets frozen encoders run, if their output is kept
        job.precompute()
    resume_after = state.step if checkpoint else None
    log = MetricsLog(config.out / "metrics.jsonl", resume_after, on_disk=world.main)
    seconds = None
    if config.minutes is not None:
        spent = time.perf_counter() - began + min(RESERVE_SHARE * 60 * config.minutes, RESERVE_SECONDS)
        seconds = world.of_main(max(1.0, 60 * config.minutes - spent))
    plan = Plan(
        steps=config.steps,
        seconds=seconds,
        warmup_steps=config.warmup_steps,
        decay_from=config.decay_from,
        accumulate=config.accumulate,
        max_grad_norm=config.max_grad_norm,
        log_every=config.log_every,
        eval_every=config.eval_every,
        save_every=config.save_every,
    )
    weights, curves = config.out / "model.safetensors", config.out / "curves.png"

    def draw_curves() -> None:
        draw_panels(curves, job.panels(log.rows))

    stopped = fit(
        job,
        optimizers,
        precision,
        plan,
        log,
        config.out,
        state,
        ranks=ranks,
        on_best=lambda: save_weights(weights, job.model, world),
        after_evaluation=draw_curves,
    )
    if stopped is not None:
        again = f"python train.py --preset {config.preset} --out {shlex.quote(str(config.out))} --resume"
        print(f"stopped by signal {stopped} after step {state.step}; go on with: {again}")
        return stopped

    load_model_state(job.model, load_file_state(weights), str(weights))
    figures = ranks.with_whole_model(lambda: job.finish(config.out))
    if not world.main:
        return None
    draw_curves()
    training = [row["samples_per_second"] for row in log.rows if "samples_per_second" in row]
    summary = {
        **figures,
        "validation_accuracy": state.best,
        f"{job.unit}_seen": state.samples,
        "steps": state.step,
        "seconds": round(time.perf_counter() - began + (checkpoint["state"]["seconds"] if checkpoint else 0.0), 1),
        "samples_per_second": sorted(training)[len(training) // 2],
        "peak_memory_gb": round(peak_memory_gb(device), 2),
        "device": str(device),
        "precision": kind,
    }
    write_json(config.out / "summary.json", summary)
    print(*job.lines(figures), sep="\n")
    for name in ("seconds", "samples_per_second"):
        print(f"{name:20s} {summary[name]}")
    print(f"look at {config.out / 'samples.html'} and {curves}")
    return None


if __name__ == "__main__":
    run_program(lambda: main(OPTIONS))
