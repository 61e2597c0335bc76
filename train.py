"""Train the visual question answering system:  python train.py [--preset shapes|book] [--out RUN] [--help]

The default needs nothing but this machine: it draws its own data set, trains three small towers on it, and leaves in
the run folder the weights, the curves, a page of answered questions, and summary.json with the final figures.
"""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from vqa_scratch.build import VQATask, build_system, read_splits
from vqa_scratch.config import PRESETS, TrainConfig
from vqa_scratch.engine.allocator import keep_freed_memory
from vqa_scratch.engine.checkpoint import load_checkpoint, load_model_state
from vqa_scratch.engine.evaluation import QuestionOnly, TypePrior, blind
from vqa_scratch.engine.gallery import write_gallery
from vqa_scratch.engine.loop import Plan, State, fit, restore
from vqa_scratch.engine.optim import Optimizers
from vqa_scratch.engine.precision import Precision, pick_device, pick_precision
from vqa_scratch.engine.progress import MetricsLog, draw_panels, moving_average
from vqa_scratch.errors import UserError
from vqa_scratch.options import from_json, parse, run_program
from vqa_scratch.run import load_file_state, read_run_config, save_parts, save_weights
from vqa_scratch.storage import remove_unfinished, write_json

# Kept back from --minutes for the final evaluation: a share of the budget, and never more than so many seconds.
RESERVE_SHARE, RESERVE_SECONDS = 0.1, 30.0
# Between a run and its continuation; the learning rates, for a run whose loss went to infinity.
MAY_CHANGE = set("resume out device data cache learning_rate matrix_learning_rate max_grad_norm".split())
PLAIN = {f.name: f.default for f in fields(TrainConfig)} | {"minutes": 10.0}


def settle(config: TrainConfig) -> tuple[TrainConfig, dict[str, Any] | None]:
    """With --resume, the config of the run and its last checkpoint (None if it was stopped before the first)."""
    path = config.out / "checkpoints" / "last.pt"
    if not config.resume:
        if path.exists():
            raise UserError(f"{config.out} holds a run already; add --resume to go on with it, or give another --out")
        return config, None
    values = read_run_config(config.out)
    if values["program"] != "train.py" or values["train"]["preset"] != config.preset:
        preset = values.get("train", {}).get("preset", values["program"])
        raise UserError(f"{config.out} is a run of preset {preset}, not {config.preset}; give another --out")
    saved = from_json(TrainConfig, values["train"], str(config.out / "config.json"))
    given = {k: v for k, v in vars(config).items() if v != PLAIN.get(k) and v != PRESETS[config.preset].get(k)}
    other = {k: v for k, v in given.items() if k not in MAY_CHANGE and v != getattr(saved, k)}
    if other:
        what = ", ".join(f"--{k.replace('_', '-')} {getattr(saved, k)}, not {v}" for k, v in other.items())
        raise UserError(f"{config.out} was begun with {what}; a run goes on with the options it was begun with")
    remove_unfinished(config.out)
    changes = {k: v for k, v in given.items() if k in MAY_CHANGE} | {"out": config.out, "resume": False}
    saved = replace(saved, **changes)
    return saved, load_checkpoint(path) if path.exists() else None


def draw_curves(path: Path, log: MetricsLog, baselines: dict[str, float]) -> None:
    """Loss, validation accuracy, and accuracy by family, over the questions seen."""
    steps = [row for row in log.rows if "loss" in row]
    evaluations = [row for row in log.rows if "val" in row]
    seen = [row["samples"] / 1000 for row in evaluations]
    families = sorted({k for row in evaluations for k in row["val"] if k.startswith("accuracy/")})
    loss = moving_average([row["loss"] for row in steps], 5)
    axis = {"xlabel": "thousand questions seen"}
    draw_panels(
        path,
        [
            {
                "title": "training loss",
                "ylabel": "nats a token",
                "lines": {"loss": ([row["samples"] / 1000 for row in steps], loss)},
                "log": True,
                **axis,
            },
            {
                "title": "accuracy on held-out scenes",
                "ylabel": "official VQA accuracy",
                "lines": {"validation": (seen, [row["val"]["accuracy"] for row in evaluations])},
                "hlines": baselines,
                "ylim": (0, 1.02),
                **axis,
            },
            {
                "title": "by family",
                "ylabel": "official VQA accuracy",
                "lines": {k.split("/", 1)[1]: (seen, [row["val"].get(k) for row in evaluations]) for k in families},
                "ylim": (0, 1.02),
                **axis,
            },
        ],
    )


def peak_memory_gb(device: torch.device) -> float:
    """The most memory used so far: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main(config: TrainConfig) -> int | None:
    """Train, evaluate and report. Returns None, or the number of the signal that stopped the run early."""
    began = time.perf_counter()
    keep_freed_memory()
    config, checkpoint = settle(config)
    device = pick_device(config.device)
    kind, reason = pick_precision(checkpoint["precision"] if checkpoint else config.precision, device)
    precision = Precision(kind, device)
    print(f"device {device}, {reason}")

    splits = read_splits(config)
    baselines = {
        "prior": blind(splits.samples["test"], TypePrior(splits.samples["train"])),
        "question_only": blind(splits.samples["test"], QuestionOnly(splits.samples["train"])),
    }
    model, encoder, processor = build_system(config, splits.samples["train"])
    model.to(device)
    precision.suit_attention(model)
    print(model.freeze(config.freeze))
    task = VQATask(config, model, encoder, processor, splits, precision)
    print(f"cut to the token limits: {encoder.cut['questions']} questions, {encoder.cut['answers']} answers")
    optimizers = Optimizers(
        model,
        kind=config.optimizer,
        learning_rate=config.learning_rate,
        matrix_learning_rate=config.matrix_learning_rate,
        weight_decay=config.weight_decay,
    )

    config.out.mkdir(parents=True, exist_ok=True)
    state = State()
    if checkpoint:
        state = restore(checkpoint, task, optimizers, precision, str(config.out))
        print(f"going on after step {state.step}")
    else:
        save_parts(config.out, config, model, encoder, processor)
    log = MetricsLog(config.out / "metrics.jsonl", resume_after=state.step if checkpoint else None)
    seconds = None
    if config.minutes is not None:
        spent = time.perf_counter() - began + min(RESERVE_SHARE * 60 * config.minutes, RESERVE_SECONDS)
        seconds = max(1.0, 60 * config.minutes - spent)
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
    stopped = fit(
        task,
        optimizers,
        precision,
        plan,
        log,
        config.out,
        state,
        on_best=lambda: save_weights(weights, model),
        after_evaluation=lambda: draw_curves(curves, log, baselines),
    )
    if stopped is not None:
        print(f"stopped by signal {stopped} after step {state.step}; go on with: python train.py --resume ...")
        return stopped

    load_model_state(model, load_file_state(weights), str(weights))
    test = task.report("test", progress="test")
    write_gallery(
        config.out / "samples.html",
        splits.samples["test"],
        test.answers,
        splits.family,
        config.samples,
        f"What the model answers ({config.preset}, accuracy {test.accuracy:.3f})",
    )
    baselines["shuffled_images"] = task.report("test", shuffled=True, progress="shuffled images").accuracy
    holdout = task.report("holdout", progress="hold-out") if "holdout" in splits.samples else None
    draw_curves(curves, log, baselines)
    training = [row["samples_per_second"] for row in log.rows if "samples_per_second" in row]
    summary = {
        "accuracy": test.accuracy,
        "accuracy_by_family": test.by_family,
        "holdout_accuracy": holdout.accuracy if holdout else None,
        "holdout_accuracy_by_family": holdout.by_family if holdout else None,
        "baselines": baselines,
        "validation_accuracy": state.best,
        "questions_seen": state.samples,
        "steps": state.step,
        "seconds": round(time.perf_counter() - began + (checkpoint["state"]["seconds"] if checkpoint else 0.0), 1),
        "samples_per_second": sorted(training)[len(training) // 2],
        "peak_memory_gb": round(peak_memory_gb(device), 2),
        "device": str(device),
        "precision": kind,
        "fusion": config.fusion,
    }
    write_json(config.out / "summary.json", summary)
    for name in ("accuracy", "holdout_accuracy", "seconds", "samples_per_second"):
        print(f"{name:20s} {summary[name]}")
    print("by family            " + ", ".join(f"{k} {v:.3f}" for k, v in test.by_family.items()))
    print("blind baselines      " + ", ".join(f"{k} {v:.3f}" for k, v in baselines.items()))
    print(f"look at {config.out / 'samples.html'} and {curves}")
    return None


def command_line(argv: Sequence[str]) -> TrainConfig:
    """The config that the flags ask for."""
    about = "Train a visual question answering system. Defaults in brackets are those of the preset `shapes`."
    return parse(TrainConfig, PRESETS, argv, program="train.py", about=about)


if __name__ == "__main__":
    run_program(lambda: main(command_line(sys.argv[1:])))
