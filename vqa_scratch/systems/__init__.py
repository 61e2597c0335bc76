"""The systems that `train.py` can train and the commands can open, found by the preset's name.

Their modules are imported when they are asked for: the options beside them must be read without torch.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from vqa_scratch.errors import UserError
from vqa_scratch.options import choices_of, from_json

if TYPE_CHECKING:
    import torch

    from vqa_scratch.systems.base import System, Trained

MODULES = ("vqa", "vilt", "caption")  # in the order of `options.CLASSES`


def system_of(preset: str) -> "System":
    """Raises UserError on a preset that this version does not know, as a run folder may name one."""
    from vqa_scratch.systems.options import CLASSES

    modules = {name: module for module, its in zip(MODULES, CLASSES, strict=True) for name in choices_of(its, "preset")}
    if preset not in modules:
        raise UserError(f"there is no preset {preset}; there are {', '.join(modules)}")
    return getattr(importlib.import_module(f"vqa_scratch.systems.{modules[preset]}"), modules[preset].upper())


def open_trained(folder: Path, device: "torch.device", precision: str = "fp32") -> "Trained":
    """Open a run of `train.py` with its best weights, in eval mode.

    `precision` is fp32, bf16, fp16 or auto. Raises UserError if the folder is no such run, has no weights yet, or if
    they do not fit.
    """
    from vqa_scratch.run import PROGRAM, read_run_config
    from vqa_scratch.training.precision import Precision, pick_precision

    values = read_run_config(folder)
    if values["program"] != PROGRAM:
        raise UserError(f"{folder} is a run of {values['program']}, not of {PROGRAM}")
    system = system_of(values["train"].get("preset"))
    options = from_json(system.config, values["train"], str(folder / "config.json"))
    return system.open(folder, values, options, Precision(pick_precision(precision, device)[0], device))
