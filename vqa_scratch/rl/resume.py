"""Resumes a run: finds its checkpoint, and checks that options, reference and prompts have not changed."""

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vqa_scratch.data.hashes import Hashes, check_same, facts, hashes_of
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.rl.options import PRESETS, RLHFOptions
from vqa_scratch.rl.ppo import PPO
from vqa_scratch.rl.tasks import Task
from vqa_scratch.storage import read_object, typed
from vqa_scratch.training.checkpoint import fitting, load_checkpoint, set_rng_state
from vqa_scratch.training.resume import checkpoint_path, go_on, is_new, lengthened

PROGRAM = "rlhf.py"
# Of a checkpoint of rlhf.py.
PARTS = {"ppo": dict, "rng": dict, "seconds": float, "precision": str, "reference": str}


def fingerprint(model: nn.Module, order: Iterable[str] | None = None) -> str:
    """A hash of all weights: the reference of a resumed run must be the one it began with.

    `order` names the weights in another order than the model's own.
    """
    digest, weights = hashlib.sha256(), model.state_dict()
    for name in weights if order is None else order:
        digest.update(weights[name].detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def begin_or_go_on(options: RLHFOptions) -> tuple[RLHFOptions, dict[str, Any] | None]:
    """With --resume, the options of the run and its last checkpoint (None if it was stopped before the first).

    Raises UserError if a run would be overwritten, or resumed with options that must not change.
    """
    if is_new(options.out, options.resume, PROGRAM):
        return lengthened(replace(options, resume=False), options.more, {}, "iterations"), None
    config, path = options.out / "config.json", checkpoint_path(options.out)
    if not config.is_file():
        raise UserError(f"{options.out} holds no run to go on with; begin one without --resume")
    values = read_object(config)
    values.pop("program", None)
    saved = load_checkpoint(path) if path.exists() else None
    if saved and "ppo" not in saved:
        raise UserError(f"{path} is no checkpoint of rlhf.py")
    if saved:
        typed(path, saved, PARTS)
    if (preset := values.get("preset")) != options.preset:
        raise UserError(f"{options.out} is a run of preset {preset}, not {options.preset}; give another --out")
    merged = go_on(options, values, PRESETS, config)
    done = {"iterations": typed(path, saved["ppo"], {"iteration": int})[0]} if saved else {}
    return lengthened(merged, options.more, done, "iterations"), saved


def prompt_hashes(task: Task) -> Hashes:
    """Hashes of the prompts that the task trains and is measured on; a prompt about an image has a `VQASample`."""
    splits: dict[str, list[Any]] = {}
    for name, prompts in {"train": task.train, "held_out": task.held_out}.items():
        asked = [p.payload for p in prompts if isinstance(p.payload, VQASample)]
        plain = [p for p in prompts if not isinstance(p.payload, VQASample)]
        splits[name] = [*((p.text, p.reference, *(p.pair or ())) for p in plain), *facts(asked)]
    return hashes_of(splits)


def restore(ppo: PPO, saved: dict[str, Any], about: dict[str, Any]) -> float:
    """Restore the run from the checkpoint; returns the seconds spent so far.

    Raises UserError for another reference or other prompts than those of the run, which `about` describes as it is now.
    """
    if saved["reference"] != about["reference"]:
        raise UserError("the run was begun against a reference with other weights; its KL would change its meaning")
    check_same(saved.get("prompts"), about["prompts"], ppo.options.out)
    with fitting(ppo.options.out):
        ppo.load_state_dict(saved.pop("ppo"))  # a second copy of the model need not stay in memory
        set_rng_state(saved["rng"])
    return saved["seconds"]
