"""Saves and loads checkpoints, from which a run resumes bit for bit; loading one runs no code from the file."""

import os
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vqa_scratch.errors import UserError
from vqa_scratch.storage import write_whole
from vqa_scratch.training.ranks import World, like
from vqa_scratch.weights.files import check_finite


def rng_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's generators, as tensors and plain values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = [torch.cuda.get_rng_state()]  # of the one device that this process uses
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """The inverse of `rng_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])


def separate_streams(world: World, step: int = 0) -> None:
    """From here on, ranks other than the main one draw their own random numbers, by rank and step."""
    if not world.main:
        torch.manual_seed(torch.initial_seed() + 1_000_003 * world.rank + step)


def streams(world: World) -> dict[str, Any]:
    """`rng_state` of the main rank, with those of the others under "ranks". All ranks must call it."""
    first, *others = world.gather(rng_state())
    return first | ({"ranks": others} if others else {})


def restore_streams(saved: dict[str, Any], world: World, step: int) -> None:
    """Give every rank its state back; a rank that the saved run did not have starts its own stream."""
    states = [saved, *saved.get("ranks", ())]
    if world.rank < len(states):
        set_rng_state(states[world.rank])
    else:
        separate_streams(world, step)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values; nothing else is allowed, so that `load_checkpoint` need not trust the file."""

    def write(unfinished: Path) -> None:
        with open(unfinished, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    write_whole(path, write)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Raises UserError on a file that is missing, cut short, changed, or holds more than tensors and plain values.

    The file is a zip archive with a checksum of each of its parts, which `torch.load` does not look at.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise UserError(f"{path} is damaged: its part {damaged} does not match its checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} not found: there is no checkpoint to go on from") from None
    except UserError:
        raise
    except Exception as error:  # the pickle and zip readers raise many kinds on broken files
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a whole checkpoint ({reason})") from None


def load_model_state(model: torch.nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Load the weights. UserError on missing, extra or misshapen tensors, with the first few and their number, and on
    values that are NaN or infinite."""
    own = model.state_dict()
    problems = [f"missing {k}" for k in own if k not in state] + [f"extra {k}" for k in state if k not in own]
    problems += [
        f"{k} is {tuple(state[k].shape)}, the model has {tuple(v.shape)}"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{where} does not fit the model: " + "; ".join(problems[:5]) + more)
    check_finite(state, where)
    model.load_state_dict({k: like(v, state[k]) for k, v in own.items()})
