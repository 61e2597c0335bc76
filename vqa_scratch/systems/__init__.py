"""The systems that `train.py` can train and the commands can open. One system, one class, one file, one line here.

A system's module is imported when it is asked for: the programs read their options without torch.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqa_scratch.errors import UserError, naming
from vqa_scratch.systems.options import BY_PRESET

if TYPE_CHECKING:
    from vqa_scratch.systems.base import System
    from vqa_scratch.systems.run_options import RunOptions
    from vqa_scratch.training.precision import Precision

SYSTEMS = {  # by the name of its options: module and class
    "VQAOptions": ("vqa", "VQASystem"),
    "ViLTOptions": ("vilt", "ViLTSystem"),
    "CaptionOptions": ("caption", "CaptionSystem"),
    "CLIPOptions": ("clip", "CLIPSystem"),
    "VoiceOptions": ("voice", "VoiceSystem"),
    "SpokenOptions": ("spoken", "SpokenSystem"),
}


def find(preset: str) -> "type[System]":
    """The system of a preset. Raises UserError for an unknown one: a run of another version may name it."""
    if preset not in BY_PRESET:
        raise UserError(f"there is no preset {preset}; there are {', '.join(BY_PRESET)}")
    module, name = SYSTEMS[BY_PRESET[preset].__name__]
    return getattr(importlib.import_module(f"vqa_scratch.systems.{module}"), name)


def _config(folder: Path) -> "tuple[type[System], dict[str, Any], RunOptions]":
    """(system, config.json, options) of a run folder. Raises UserError if it is not a run of `train.py`."""
    from vqa_scratch.options import from_json
    from vqa_scratch.systems.run_folder import CONFIG, PROGRAM, read_run_config

    values = read_run_config(folder)
    if values["program"] != PROGRAM:
        raise UserError(f"{folder} is a run of {values['program']}, not of {PROGRAM}")
    preset = values["train"].get("preset")
    system = find(preset)
    return system, values, from_json(BY_PRESET[preset], values["train"], str(folder / CONFIG))


def load(folder: "Path | str", device: Any = "cpu", precision: str = "fp32") -> "System":
    """Open a run of `train.py` with its best weights, in eval mode.

    `precision` is fp32, bf16, fp16 or auto: on a CPU the format that the run found faster for its training. Raises
    UserError if the folder is not such a run, or has no weights that fit.
    """
    import torch

    from vqa_scratch.storage import read_object
    from vqa_scratch.systems.run_folder import quantized_as
    from vqa_scratch.training.precision import Precision, formats

    folder, device = Path(folder), torch.device(device)
    system, config, options = _config(folder)
    kinds, summary = formats(precision, device), folder / "summary.json"
    found = read_object(summary).get("precision") if len(kinds) > 1 and summary.is_file() else None
    with naming(folder):
        number_format = Precision(found if found in kinds else kinds[0], device)
        return system.load(folder, config["model"], options, number_format, quantized_as(config, folder))


def load_latest(folder: Path, device: Any = "cpu", precision: str = "fp32") -> "tuple[System, int | None]":
    """A run that may still be training, and the step of its weights: those of its last checkpoint, if it has one.

    Once it has ended, or before its first checkpoint, as `load`, with no step. The folder is only read. Raises
    UserError as `load`.
    """
    import torch

    from vqa_scratch.systems.older import todays_names
    from vqa_scratch.systems.run_folder import LAST, PARTS
    from vqa_scratch.training.checkpoint import load_checkpoint, load_model_state
    from vqa_scratch.training.precision import Precision, formats

    last, summary = folder / LAST, folder / "summary.json"
    ended = last.is_file() and summary.is_file() and summary.stat().st_mtime >= last.stat().st_mtime
    if ended or not last.is_file():
        return load(folder, device, precision), None
    system, config, options = _config(folder)
    saved = load_checkpoint(last, PARTS)
    with naming(folder):
        number_format = Precision(formats(precision, torch.device(device))[0], torch.device(device))
        opened = system.open(folder, config["model"], options, number_format)
        load_model_state(opened.model, todays_names(saved["model"]), str(last))
        opened.model.to(number_format.device).eval()
    return opened, saved["state"].get("step")


def open_parts(folder: Path, options: "RunOptions", precision: "Precision") -> "System":
    """A run to resume with these options: everything it saved except the weights."""
    system, config, _ = _config(folder)
    with naming(folder):
        return system.open(folder, config["model"], options, precision)
