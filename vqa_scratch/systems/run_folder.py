"""A run folder of `train.py`: what is in it, and how it is written, opened and resumed.

config.json            {"program", "train": the options, "model": the sizes of the model, "data": hashes of the splits}
text_tokenizer/        tokenizer.json of the text encoder;  decoder_tokenizer/  of the decoder
preprocessor_config.json
model.safetensors      the best weights so far
checkpoints/last.pt    everything needed to resume
metrics.jsonl, curves.png, samples.html, summary.json
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from vqa_scratch.data.hashes import Hashes, check_same
from vqa_scratch.errors import UserError, note
from vqa_scratch.nn.quantized import BF16_ONLY, FORMATS, Format, install, matrices, take
from vqa_scratch.options import to_json
from vqa_scratch.storage import LOCK, parse_json, read_object, read_text, typed, write_json
from vqa_scratch.systems.older import todays_moments, todays_names
from vqa_scratch.systems.presets import PRESETS
from vqa_scratch.systems.run_options import RunOptions
from vqa_scratch.training.checkpoint import fitting, load_checkpoint, load_model_state, restore_streams
from vqa_scratch.training.optimizers import Optimizers
from vqa_scratch.training.precision import Precision
from vqa_scratch.training.ranks import ALONE, World, for_main
from vqa_scratch.training.resume import checkpoint_path, go_on, is_new, lengthened
from vqa_scratch.weights.files import read_safetensors, write_safetensors

PROGRAM = "train.py"
CONFIG, WEIGHTS, LAST = "config.json", "model.safetensors", "checkpoints/last.pt"
QUIET = 300.0  # seconds
PARTS = {"model": dict, "optimizers": list, "scaler": dict, "state": dict, "rng": dict, "precision": str}  # of LAST


def write_run_config(folder: Path, options: RunOptions, sizes: dict[str, Any], data: Hashes | None = None) -> None:
    """config.json: the options of the run, the `sizes` from which its model is built, and hashes of its data."""
    values = {"program": PROGRAM, "train": to_json(options), "model": sizes}
    write_json(folder / CONFIG, values | ({"data": data} if data else {}))


def check_same_data(options: RunOptions, found: Hashes) -> None:
    """Raise UserError if a run that is resumed would go on with other data; an option may cut the test split."""
    values, where = read_run_config(options.out), options.out / CONFIG
    cut = any(values["train"].get(name) != getattr(options, name) for name in options.limits_test)
    check_same(values.get("data"), found, where, but="test" if cut else None)


def read_run_config(folder: Path) -> dict[str, Any]:
    """config.json of a run of train.py or rlhf.py. Raises UserError if the folder is not a run."""
    path = folder / CONFIG
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; a run is a folder, as train.py leaves it below runs/")
    if not folder.exists():
        raise UserError(f"no run folder {folder}; train one with: python train.py --out {folder}")
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.json")
    values = read_object(path)
    if "program" not in values:
        raise UserError(f"{path} is not the config of a run: it does not say which program wrote it")
    if values["program"] == PROGRAM:
        typed(path, values, {"train": dict, "model": dict})
        typed(f"{path}: 'train'", values["train"], {"preset": str | None})
        values["train"].pop("more_steps", None)  # which 0.3.0 wrote, always as null
    return values


def save_weights(path: Path, model: nn.Module, world: World = ALONE) -> None:
    """All parameters as safetensors, atomically; called by all ranks, written by the main one."""
    tensors = for_main(model.state_dict(), world)
    if world.main:
        write_safetensors(path, {name: p.detach().cpu().contiguous() for name, p in tensors.items()})


def load_weights(model: nn.Module, folder: Path, precision: Precision, kind: Format | None = None) -> None:
    """Load the best weights of a run, in the format `kind`, kept so where it has a product, with a note elsewhere.

    Raises UserError if there are none yet, the file is cut short or does not fit.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{folder} has no model.safetensors yet: the run has not reached its first checkpoint")
    tensors = todays_names(read_safetensors(path))
    codes = {} if kind is None else take(tensors, kind, path)
    if kind is not None and codes.keys() != matrices(model).keys():
        raise UserError(f"{path} does not hold the matrices of its decoder in {kind.name}")
    plain = {f"{name}.weight": kind.dequantize(stored) for name, stored in codes.items() if kind}
    load_model_state(model, tensors | plain, str(path))
    if kind is None:
        return
    if kind.multiplies and precision.kind == "bf16" and precision.device.type == "cpu":
        install(model, kind, codes)
    else:
        how = BF16_ONLY if kind.multiplies else f"{kind.name} is a format for files, without a product"
        note(f"{folder} has weights in {kind.name}; here they are unpacked to {precision.kind}: {how}")


def quantized_as(config: dict[str, Any], folder: Path) -> Format | None:
    """The format of a run whose weights are quantised, as its config says. Raises UserError for an unknown one."""
    (name,) = typed(folder / CONFIG, config, {"quantized": str | None})
    if name is not None and name not in FORMATS:
        raise UserError(f"{folder} has weights in the format {name}; known are {', '.join(FORMATS)}")
    return None if name is None else FORMATS[name]


def newest_run(folder: Path) -> Path:
    """The run below a folder that changed last. Raises UserError if there is none with weights."""
    found = [path for name in (WEIGHTS, LAST) for path in folder.glob(f"*/{name}")]
    if not found:
        raise UserError(f"there is no run below {folder}/: give RUN, or --model, or train one: python train.py")
    last = max(found, key=lambda path: path.stat().st_mtime)
    return folder / last.relative_to(folder).parts[0]


def stamps(folder: Path | None) -> list[int]:
    """When the weights and the last checkpoint of a run changed; a newer one may be opened."""
    paths = [] if folder is None else [folder / name for name in (WEIGHTS, LAST)]
    return [path.stat().st_mtime_ns for path in paths if path.is_file()]


def still_trains(folder: Path | None) -> bool:
    """Whether a run still trains. Its lock is looked at, not taken: it lies there until the end, and the last row of
    metrics.jsonl is not older than `QUIET`, since a kill leaves the lock."""
    if folder is None or not (folder / LOCK).is_file() or not (log := folder / "metrics.jsonl").is_file():
        return False
    return time.time() - log.stat().st_mtime < QUIET


def log_of(folder: Path | None, after: int = 0) -> dict[str, Any]:
    """The rows of metrics.jsonl after so many, how many there are, and whether the run still trains. It is only
    read."""
    path = None if folder is None else folder / "metrics.jsonl"
    if path is None or not path.is_file():
        return {"rows": [], "total": 0, "running": False}
    running = still_trains(folder)  # before the rows are read, so that the last are among them
    lines = [line for line in read_text(path).splitlines() if line.endswith("}")]  # the last may be half written
    return {"rows": [parse_json(line, path) for line in lines[after:]], "total": len(lines), "running": running}


def check_trainable(folder: Path) -> dict[str, Any]:
    """config.json of a run, as `read_run_config`. Raises UserError if its weights are quantised."""
    config = read_run_config(folder)
    if (kind := quantized_as(config, folder)) is not None:
        raise UserError(f"{folder} has weights in {kind.name}, which cannot be trained; take the run they come from")
    return config


def restore(saved: dict[str, Any], system: Any, optimizers: Optimizers) -> dict[str, Any]:
    """Restore weights, moments, scaler and random numbers of a `System` from a checkpoint; returns its progress.

    Removes weights and moments from `saved`, so that no second copy of them stays in memory. Raises UserError if it
    does not fit the model.
    """
    weights, moments = saved.pop("model"), saved.pop("optimizers")
    with fitting(system.options.out / LAST):
        optimizers.load_state_dict(todays_moments(moments, system.model, weights))
        load_model_state(system.model, todays_names(weights), str(system.options.out))
        system.precision.scaler.load_state_dict(saved["scaler"])
        restore_streams(saved["rng"], system.world, saved["state"]["step"])
    return saved["state"]


def begin_or_go_on(options: RunOptions) -> tuple[RunOptions, dict[str, Any] | None]:
    """With --resume, the options of the run and its last checkpoint (None if it was stopped before the first).

    Raises UserError if a run would be overwritten, or resumed with options that must not change.
    """
    if is_new(options.out, options.resume, PROGRAM):
        return lengthened(replace(options, resume=False), options.more, {}, "steps"), None
    values = check_trainable(options.out)
    if (preset := values["train"].get("preset") or PROGRAM) != options.preset:
        raise UserError(f"{options.out} is a run of preset {preset}, not {options.preset}; give another --out")
    merged, path = go_on(options, values["train"], PRESETS, options.out / CONFIG), checkpoint_path(options.out)
    checkpoint, done = load_checkpoint(path, PARTS) if path.exists() else None, {}
    if checkpoint:
        steps, seconds = typed(f"{path}: 'state'", checkpoint["state"], {"step": int, "seconds": float})
        done = {"steps": steps, "minutes": seconds / 60}
    return lengthened(merged, options.more, done, "steps"), checkpoint
