"""Starts and ends a run of several processes: errors are printed once, and a rank that dies ends all others.

`torchrun` starts the processes and passes each its rank through the environment.
"""

import gc
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from vqa_scratch.errors import UserError
from vqa_scratch.training.ranks import ALONE, World

# How long the ranks wait for each other, for example while rank 0 draws data, decodes images or writes reports. A rank
# that dies is noticed at once, by torchrun and by its closed connections.
TIMEOUT = timedelta(hours=1)
GRACE = timedelta(seconds=2)  # for rank 0 to print an error that every rank meets
NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def _place() -> World | None:
    """The world described by torchrun's environment; None without it. Raises UserError if it is incomplete."""
    missing = [name for name in NEEDED if name not in os.environ]
    if "RANK" in missing or "WORLD_SIZE" in missing:
        return None
    if missing:
        raise UserError(f"RANK is set, but {', '.join(missing)} not: start several processes with torchrun")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    for name in names:
        if not os.environ[name].isdigit():
            raise UserError(f"{name} is {os.environ[name]!r}, no number: start several processes with torchrun")
    return World(*(int(os.environ[name]) for name in names))


def _backend(device: str, world: World) -> str:
    if device == "mps":
        raise UserError("--device mps computes in one process; leave out torchrun, or take --device cpu")
    if device == "cpu" or not torch.cuda.is_available():
        return "gloo"
    if world.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"there is no GPU for process {world.local_rank} of this machine, which has {torch.cuda.device_count()}: "
            f"give torchrun --nproc-per-node {torch.cuda.device_count()}"
        )
    torch.cuda.set_device(world.local_rank)
    return "cpu:gloo,cuda:nccl"


def _be_quiet() -> None:
    """Hide the bars and the stdout of this process; errors and warnings still reach stderr."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    shown = tqdm.__init__

    def hidden(self: tqdm, *args: Any, **options: Any) -> None:
        shown(self, *args, **options | {"disable": True})

    tqdm.__init__ = hidden


class _Errors:
    """Decides which rank prints an error, so that it appears once. Ranks leave notes in torchrun's store."""

    def __init__(self, store: dist.Store, world: World) -> None:
        self.store, self.world = store, world

    def _noted(self, key: str, patience: timedelta) -> bool:
        try:
            self.store.wait([key], patience)
        except RuntimeError:
            return False
        return True

    def mine(self, message: str) -> bool:
        """Whether this rank prints an error that it met: rank 0 always, another unless rank 0 met the same one."""
        same = "error/" + hashlib.sha256(message.encode()).hexdigest()
        if not self.world.main and self._noted(same, GRACE):
            return False
        with suppress(RuntimeError):
            self.store.set(same, "reported")
            self.store.set("reported", "yes")
        return True

    def loss(self) -> bool:
        """Whether this rank reports that another is gone: only if that one printed nothing and no rank did so."""
        if self._noted("reported", 2 * GRACE):
            return False
        try:
            return self.store.add("gone", 1) == 1
        except RuntimeError:
            return True


def lost(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "Connection" in text or "NCCL" in text


def _short(error: RuntimeError) -> str:
    """The message of a collective's error, without the position in torch's source."""
    return str(error).splitlines()[0].split("] ")[-1][:120]


@contextmanager
def start(device: str = "auto") -> Iterator[World]:
    """The world of this run, from torchrun's environment; it is closed at the end of the block.

    `device` is the value of --device. Raises UserError if the environment or the device does not fit. If every rank
    meets an error in the block, rank 0 prints it; if a single rank does, it prints the error with its number. A rank
    that loses another one ends with one line, and nothing is saved. What shares a model among the ranks is freed before
    their group is: leave no name for it in the function of the block.
    """
    world = _place()
    if world is None:
        yield ALONE
        return
    backend = _backend(device, world)
    if not world.main:
        _be_quiet()
    store, *_ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    errors = _Errors(store, world)
    try:
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=TIMEOUT)
        yield world
    except UserError as error:
        if not errors.mine(str(error)):
            sys.exit(2)
        raise UserError(str(error) if world.main else f"rank {world.rank}: {error}") from error
    except RuntimeError as error:
        if not lost(error):
            raise
        if not errors.loss():
            sys.exit(2)
        raise UserError(f"a rank is gone without a word ({_short(error)}); go on with --resume") from error
    gc.collect()  # a DDP that outlives its process group may hang: one in a cycle would, until it is collected
    dist.destroy_process_group()
