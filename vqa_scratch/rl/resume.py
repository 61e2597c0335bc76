"""Resumes a run: finds its checkpoint, and checks that options and reference have not changed."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from vqa_scratch.errors import UserError
from vqa_scratch.options import from_json
from vqa_scratch.rl.options import RLHFOptions
from vqa_scratch.rl.ppo import PPO
from vqa_scratch.storage import read_object, typed
from vqa_scratch.training.checkpoint import check_unchanged, checkpoint_path, fitting, load_checkpoint, set_rng_state

# Of a checkpoint of rlhf.py.
PARTS = {"ppo": dict, "rng": dict, "seconds": float, "config": dict, "precision": str, "reference": str}


def fingerprint(model: nn.Module, order: Iterable[str] | None = None) -> str:
    """A hash of all weights: the reference of a resumed run must be the one it began with.

    `order` names the weights in another order than the model's own.
    """
    digest, weights = hashlib.sha256(), model.state_dict()
    for name in weights if order is None else order:
        digest.update(weights[name].detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def last_checkpoint(options: RLHFOptions) -> dict[str, Any] | None:
    """With --resume, the run's last checkpoint.

    Raises UserError if it is of another run, or would be overwritten, and if the folder cannot be written to.
    """
    about = options.out / "config.json"
    program = read_object(about).get("program", "rlhf.py") if about.is_file() else "rlhf.py"
    if program != "rlhf.py":
        raise UserError(f"{options.out} is a run of {program}; give another --out")
    path = checkpoint_path(options.out, options.resume)
    if not options.resume:
        return None
    saved = load_checkpoint(path)
    if "ppo" not in saved:
        raise UserError(f"{path} is no checkpoint of rlhf.py")
    typed(path, saved, PARTS)
    check_unchanged(from_json(type(options), saved["config"], str(path)), vars(options), options.out)
    return saved


def restore(ppo: PPO, saved: dict[str, Any], reference: str) -> float:
    """Restore the run from the checkpoint; returns the seconds spent so far. Raises UserError for another reference."""
    if saved["reference"] != reference:
        raise UserError("the run was begun against a reference with other weights; its KL would change its meaning")
    with fitting(ppo.options.out):
        ppo.load_state_dict(saved.pop("ppo"))  # a second copy of the model need not stay in memory
        set_rng_state(saved["rng"])
    return saved["seconds"]
