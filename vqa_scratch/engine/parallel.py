"""How the ranks of a run share a model: each holds all of it (DDP), or each a part of every tensor (FSDP2).

DDP: Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training" (2006.15704); gradients
are averaged in buckets while the backward pass still runs. FSDP: Zhao et al. 2023, "PyTorch FSDP" (2304.11277), after
ZeRO (Rajbhandari et al. 2020, 1910.02054); weights are gathered block by block when they are needed, and gradients and
optimizer state stay in parts.

Both average gradients over ranks. The loop wants their sum, so it multiplies the loss by the number of ranks.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from vqa_scratch.engine.distributed import ALONE, World
from vqa_scratch.engine.precision import Precision
from vqa_scratch.errors import UserError

T = TypeVar("T")
KINDS = ("ddp", "fsdp")


# ------------------------------------------------------------------------------------------------ whole and part


def whole(value: Any) -> Any:
    """The same nested dictionaries and lists with every sharded tensor gathered; all ranks must call it."""
    if isinstance(value, DTensor):
        return value.detach().full_tensor()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(item) for item in value)
    return value


def like(own: Tensor, value: Tensor) -> Tensor:
    """`value`, whole and the same on all ranks, cut as `own` is; nothing is sent."""
    if not isinstance(own, DTensor):
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


# ---------------------------------------------------------------------------------------------------- strategies


class Alone:
    """One process: nothing to share."""

    def __init__(self, world: World = ALONE) -> None:
        self.world = world

    def run(self, work: Callable[..., T], *args: Any) -> T:
        """`work(*args)`, which may use the model and whose result may be differentiated."""
        return work(*args)

    def backward_of(self, last: bool) -> AbstractContextManager:
        """Around the forward and backward pass of one part of a step; gradients are exchanged in the last."""
        return nullcontext()

    def with_whole_model(self, work: Callable[[], T]) -> T:
        """`work()` with plain tensors for weights: ranks may do different things in it. No gradients."""
        return work()


ONE_PROCESS = Alone()


class _Forward(nn.Module):
    """DDP and FSDP act around a module's forward; this one's forward is any function that uses the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[..., T], *args: Any) -> T:
        return work(*args)


class Replicas(Alone):
    """DDP: the same weights on every rank, made equal to rank 0's at the start."""

    def __init__(self, model: nn.Module, world: World) -> None:
        super().__init__(world)
        # An axis of length 1 has no stride to speak of, but DDP compares it.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        self.module = DistributedDataParallel(_Forward(model), gradient_as_bucket_view=True)

    def run(self, work: Callable[..., T], *args: Any) -> T:
        return self.module(work, *args)

    def backward_of(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.module.no_sync()


class Shards(Alone):
    """FSDP2: every block's tensors are cut along their first axis; the rest of the model is one more such group.

    `model` is changed in place: make its optimizer afterwards. Gradients are exchanged after every part of a step: to
    keep them until the last would need the memory that this saves.
    """

    def __init__(self, model: nn.Module, world: World, device: torch.device) -> None:
        super().__init__(world)
        mesh = init_device_mesh(device.type, (world.size,))
        self.blocks = [block for m in model.modules() if isinstance(m, nn.ModuleList) for block in m]
        for block in self.blocks:
            fully_shard(block, mesh=mesh)
        self.module = fully_shard(_Forward(model), mesh=mesh)

    def run(self, work: Callable[..., T], *args: Any) -> T:
        return self.module(work, *args)

    def with_whole_model(self, work: Callable[[], T]) -> T:
        @torch.no_grad()
        def unsharded() -> T:
            with self._held():
                return work()

        return self.module(unsharded)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """All blocks gathered, and kept so after their forward passes."""
        for block in self.blocks:
            block.set_reshard_after_forward(False, recurse=False)
            block.unshard()
        try:
            yield
        finally:
            for block in self.blocks:
                block.set_reshard_after_forward(True, recurse=False)
                block.reshard()


def share_model(kind: str, model: nn.Module, world: World, precision: Precision) -> Alone:
    """The strategy that `--parallel` names. Raises UserError where it cannot be used."""
    assert kind in KINDS
    if kind == "fsdp":
        if not torch.distributed.is_initialized():
            raise UserError("--parallel fsdp cuts the model over processes: start the run with torchrun")
        if precision.kind == "fp16":
            raise UserError("--parallel fsdp takes bf16 or fp32: the loss scaling of fp16 looks at whole gradients")
        return Shards(model, world, precision.device)
    if world.size > 1:
        return Replicas(model, world)
    return Alone(world)


# ------------------------------------------------------------------------------------- gradients without a wrapper

BUCKET = 8_000_000  # numbers sent at once


def add_gradients(parameters: Sequence[nn.Parameter], world: World) -> None:
    """Replace every gradient by its sum over the ranks, for updates whose passes differ from rank to rank.

    A rank that has no gradient where another has one counts as zero; where nobody has one, there is none afterwards.
    """
    if world.size == 1:
        return
    having = world.totals([float(p.grad is not None) for p in parameters])
    bucket: list[nn.Parameter] = []
    used = [p for p, count in zip(parameters, having, strict=True) if count]
    for p in used:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        bucket.append(p)
        if sum(q.numel() for q in bucket) >= BUCKET or p is used[-1]:
            flat = world.sum_(torch.cat([q.grad.flatten() for q in bucket]))
            for q, piece in zip(bucket, flat.split([q.numel() for q in bucket]), strict=True):
                q.grad.copy_(piece.view_as(q))
            bucket = []
