"""Saves and loads checkpoints, from which a run resumes bit for bit; loading one runs no code from the file."""

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vqa_scratch.errors import UserError, some
from vqa_scratch.storage import typed, write_whole
from vqa_scratch.training.ranks import World, like
from vqa_scratch.weights.files import check_finite, load_plain
from vqa_scratch.weights.hub import first_line


def rng_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's generators, as tensors and plain values."""
    numpy = np.random.get_state(legacy=False)
    own, cached = numpy["state"], (numpy["has_gauss"], numpy["gauss"])
    state = {
        "python": random.getstate(),
        "numpy": (numpy["bit_generator"], torch.from_numpy(own["key"].astype(np.int64)), own["pos"], *cached),
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


def load_checkpoint(path: Path, types: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `save_checkpoint` wrote, with values of the given types.

    Raises UserError on a file that is missing, damaged or something else, and on numbers that are not finite.
    """
    if not path.exists():
        raise UserError(f"{path} not found: there is no checkpoint to go on from")
    saved = load_plain(path)
    typed(path, saved, types or {})
    for name, tensor in _tensors(saved):
        check_finite(name, tensor, path)
    return saved


def _tensors(tree: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every tensor in dictionaries and lists."""
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


@contextmanager
def fitting(where: object) -> Iterator[None]:
    """Within it, what is read from `where`, a file that other versions of a run may have written, is taken apart: an
    error that its shape leads to becomes a UserError."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{where} does not fit this run ({first_line(error)})") from error


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
        raise UserError(f"{where} does not fit the model: {some(problems, between='; ')}")
    for name, tensor in state.items():
        check_finite(name, tensor, where)
    model.load_state_dict({k: like(v, state[k]) for k, v in own.items()})


def load_whole_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """`load_state_dict` for a state of whole tensors, which are sharded like their parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    cut = {
        i: {k: like(params[i], v) if getattr(v, "shape", ()) == params[i].shape else v for k, v in s.items()}
        for i, s in saved["state"].items()
    }
    optimizer.load_state_dict(saved | {"state": cut})
