"""The systems that `train.py` can train and the commands can open, found by the preset's name."""

from pathlib import Path

import torch

from vqa_scratch.config import PRESETS
from vqa_scratch.errors import UserError
from vqa_scratch.options import from_json
from vqa_scratch.run import PROGRAM, read_run_config
from vqa_scratch.systems.base import System, Trained
from vqa_scratch.systems.caption import CAPTION
from vqa_scratch.systems.vilt import VILT
from vqa_scratch.systems.vqa import VQA
from vqa_scratch.training.precision import Precision, pick_precision

SYSTEMS = (
    VQA,
    VILT,
    CAPTION,
)
BY_PRESET = {preset: system for system in SYSTEMS for preset in system.presets}
assert BY_PRESET.keys() == PRESETS.keys(), "every preset has its values, and all values a system"


def system_of(preset: str) -> System:
    """Raises UserError on a preset that this version does not know, as a run folder may name one."""
    if preset not in BY_PRESET:
        raise UserError(f"there is no preset {preset}; there are {', '.join(BY_PRESET)}")
    return BY_PRESET[preset]


def open_trained(folder: Path, device: torch.device, precision: str = "fp32") -> Trained:
    """Open a run of `train.py` with its best weights, in eval mode.

    `precision` is fp32, bf16, fp16 or auto. Raises UserError if the folder is no such run, has no weights yet, or if
    they do not fit.
    """
    values = read_run_config(folder)
    if values["program"] != PROGRAM:
        raise UserError(f"{folder} is a run of {values['program']}, not of {PROGRAM}")
    system = system_of(values["train"].get("preset"))
    config = from_json(system.config, values["train"], str(folder / "config.json"))
    return system.open(folder, values, config, Precision(pick_precision(precision, device)[0], device))
