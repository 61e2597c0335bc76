"""The ranks of a run: who is who, the small messages between them, and tensors of which each rank holds a part.

Without torchrun a run is a world of one, in which every message is a no-op. Numbers and Python objects travel by gloo
between CPUs even where gradients travel by NCCL between GPUs, so that agreeing on a clock or a signal never waits for a
GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vqa_scratch.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees it. `local_rank` counts within the machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this is the one that logs, draws and writes."""
        return self.rank == 0

    def totals(self, values: Sequence[float]) -> list[float]:
        """The sum of each number over the ranks, exact up to 2**53; all ranks get the same."""
        if self.size == 1:
            return list(values)
        return self.sum_(torch.tensor(values, dtype=torch.float64)).tolist()

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place, on whatever device the tensor is."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """The value of every rank in order, on every rank. Values are pickled: keep tensors on the CPU."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def of_main(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def from_main_(self, tensor: Tensor) -> Tensor:
        """Rank 0's values, in place, on whatever device the tensor is."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's run of the items: shares differ by one item at most, and may be empty."""
        return items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size]

    def check_same(self, value: Any, what: str) -> None:
        """Raise UserError on every rank if they do not hold the same value."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise UserError(f"{what} on rank 0 is {values[0]}, on rank {rank} {other}; all ranks must see the same")

    @contextmanager
    def first_one_then_all(self) -> Iterator[None]:
        """The body runs on one rank of each machine, then on its others, which find what the first left on disk."""
        if self.local_rank == 0:
            yield
        self.totals([0])  # nobody passes before everybody came
        if self.local_rank != 0:
            yield


ALONE = World()


# ------------------------------------------------------------------------------------------------ whole and part


def in_parts(value: Any) -> bool:
    """Whether this is a tensor of which each rank holds a part; without the import, which costs 40 MB."""
    return hasattr(value, "full_tensor")


def whole(value: Any) -> Any:
    """The same nested dictionaries and lists with every sharded tensor gathered; all ranks must call it."""
    if in_parts(value):
        return value.detach().full_tensor()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(item) for item in value)
    return value


def for_main(value: Any, world: World) -> Any:
    """`whole`, for a file that the main rank writes: it gets tensors on the CPU, the others None; all must call it.

    One tensor after the other, so that no rank's device ever holds more than one of them whole.
    """
    if in_parts(value):
        value = whole(value)
        return value.cpu() if world.main else None
    if isinstance(value, dict):
        return {key: for_main(item, world) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(for_main(item, world) for item in value)
    return value


def like(own: Tensor, value: Tensor) -> Tensor:
    """`value`, whole and the same on all ranks, cut as `own` is; nothing is sent."""
    if not in_parts(own):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


# ------------------------------------------------------------------------------------------- how a model is shared


class Alone:
    """One process: nothing to share."""

    def __init__(self, world: World = ALONE) -> None:
        self.world = world

    def shared(self, work: Callable[..., T]) -> Callable[..., T]:
        """`work`, which uses the model, as a function whose gradients the ranks exchange."""
        return work

    def run(self, work: Callable[..., T], *args: Any) -> T:
        """`self.shared(work)(*args)`."""
        return self.shared(work)(*args)

    def backward_of(self, last: bool) -> AbstractContextManager:
        """Around the forward and backward pass of one part of a step; gradients are exchanged in the last."""
        return nullcontext()

    def with_whole_model(self, work: Callable[[], T]) -> T:
        """`work()` with plain tensors for weights: ranks may do different things in it. No gradients."""
        return work()

    def passes(self, parts: Sequence[T], idle: T) -> list[tuple[T, bool]]:
        """What a rank goes through the model with in a step: its parts, each with True.

        Where ranks must go through it equally often, `idle` with False follows until there are enough.
        """
        return [(part, True) for part in parts]

    def backward(self, loss: Tensor, counts: bool) -> None:
        """The backward pass of one of `passes`; gradients become sums over parts and, after `collect`, over ranks."""
        loss.backward()

    def collect(self, parameters: Sequence[nn.Parameter]) -> None:
        """After the last of `passes`: whatever is still to be exchanged of the gradients."""


ONE_PROCESS = Alone()
