"""The ranks of a run: their numbers, the small messages between them, and tensors of which each rank holds a part.

Without torchrun a run is a world of one, in which every message is a no-op. Numbers and Python objects go through gloo
on the CPU even if gradients go through NCCL, so agreeing on a clock or a signal never waits for a GPU.
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
    """The processes of a run, seen from one of them. `local_rank` counts within the machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this is the rank that logs, draws and writes."""
        return self.rank == 0

    def totals(self, values: Sequence[float]) -> list[float]:
        """The sum of each number over the ranks, the same on all of them; exact up to 2**53."""
        if self.size == 1:
            return list(values)
        return self.sum_(torch.tensor(values, dtype=torch.float64)).tolist()

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place, on the device of the tensor."""
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
        """Rank 0's values, in place, on the device of the tensor."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's share, a slice of the items. Shares differ by one item at most, and may be empty."""
        return items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size]

    def check_same(self, value: Any, what: str) -> None:
        """Raise UserError on every rank if they do not hold the same value."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise UserError(f"{what} on rank 0 is {values[0]}, on rank {rank} {other}; all ranks must see the same")

    @contextmanager
    def first_one_then_all(self) -> Iterator[None]:
        """Run the body on one rank of each machine first; the others then find what it wrote to disk."""
        if self.local_rank == 0:
            yield
        self.totals([0])  # a barrier
        if self.local_rank != 0:
            yield


ALONE = World()


def in_parts(value: Any) -> bool:
    """Whether each rank holds a part of this tensor (a DTensor, whose import would cost 40 MB)."""
    return hasattr(value, "full_tensor")


def whole(value: Any) -> Any:
    """The same tensor, or list of them, with every sharded one gathered. All ranks must call it."""
    if in_parts(value):
        return value.detach().full_tensor()
    if isinstance(value, (list, tuple)):
        return type(value)(whole(item) for item in value)
    return value


def for_main(value: Any, world: World) -> Any:
    """`whole`, for a file that the main rank writes: there the tensors are on the CPU, on other ranks None.

    All ranks must call it. They gather one tensor at a time, so that no device holds two whole ones.
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
    """`value`, which is whole and the same on all ranks, sharded like `own`; nothing is sent."""
    if not in_parts(own):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(own, DTensor)
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


class Alone:
    """How a single process uses the model. The other strategies, in `sharing.py`, override these methods."""

    def __init__(self, world: World = ALONE) -> None:
        self.world = world

    def shared(self, work: Callable[..., T]) -> Callable[..., T]:
        """`work`, which uses the model, wrapped so that the ranks exchange its gradients."""
        return work

    def backward_of(self, last: bool) -> AbstractContextManager:
        """The context of a part's forward and backward pass; gradients are exchanged in the last part of a step."""
        return nullcontext()

    def with_whole_model(self, work: Callable[[], T]) -> T:
        """`work()` with whole weights and without gradients; ranks may do different things in it."""
        return work()

    def passes(self, parts: Sequence[T], idle: T) -> list[tuple[T, bool]]:
        """The inputs of this rank's passes through the model in a step: its parts, each with True.

        If all ranks need equally many passes, (`idle`, False) fills the missing ones.
        """
        return [(part, True) for part in parts]

    def backward(self, loss: Tensor, counts: bool) -> None:
        """The backward pass of one of `passes`. Gradients are summed over parts and, after `collect`, over ranks."""
        loss.backward()

    def collect(self, parameters: Sequence[nn.Parameter]) -> None:
        """Exchange the gradients after the last of `passes`, unless that is already done."""


ONE_PROCESS = Alone()
