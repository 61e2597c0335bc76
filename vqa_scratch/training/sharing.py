"""How the ranks of a run share a model: each holds all of it (DDP) or a part of every tensor (FSDP2).

DDP: Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training" (2006.15704); gradients
are averaged in buckets during the backward pass. FSDP: Zhao et al. 2023, "PyTorch FSDP" (2304.11277), after
ZeRO (Rajbhandari et al. 2020, 1910.02054); weights are gathered block by block when needed; gradients and optimizer
state stay in parts. Both average gradients over ranks. A step needs the sum, so it multiplies the loss by their number.

In an update of PPO, ranks may need different numbers of passes through the model; `passes`, `backward` and `collect`
allow for that. `Copies` (in `rl/ranks.py`) adds up the gradients after the last pass. `Shards` communicates in every
pass, so ranks with fewer parts make idle passes.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vqa_scratch.errors import UserError
from vqa_scratch.training.precision import Precision
from vqa_scratch.training.ranks import Alone, World

T = TypeVar("T")
KINDS = ("ddp", "fsdp")


@torch.no_grad()
def make_alike(model: nn.Module, world: World) -> None:
    """Give every rank the weights and buffers of rank 0, as DDP does on its own."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.copy_(world.from_main_(tensor.detach().contiguous()))


class _Forward(nn.Module):
    """A module whose forward is any function that uses the model: DDP and FSDP wrap a module's forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[..., T], *args: Any) -> T:
        return work(*args)


class Replicas(Alone):
    """DDP: the weights of rank 0 on every rank."""

    def __init__(self, model: nn.Module, world: World) -> None:
        super().__init__(world)
        # The stride of an axis of length 1 does not matter, but DDP compares it.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        self.module = DistributedDataParallel(_Forward(model), gradient_as_bucket_view=True)

    def shared(self, work: Callable[..., T]) -> Callable[..., T]:
        return partial(self.module, work)

    def backward_of(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.module.no_sync()


class Shards(Alone):
    """FSDP2: rank 0's weights, sharded along their first axis; each block is a group, and so is the rest of the model.

    `model` is changed in place: make its optimizer afterwards. Gradients are exchanged after every part of a step:
    keeping them until the last part would cost the memory that sharding saves. `frozen` are models without gradients,
    used only inside `with_whole_model`; they are sharded and gathered along with the model.
    """

    def __init__(self, model: nn.Module, world: World, device: torch.device, frozen: Sequence[nn.Module] = ()) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        super().__init__(world)
        # An output may be a view (values are); nothing here changes outputs in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        make_alike(model, world)
        self.frozen = [Shards(other, world, device) for other in frozen]
        mesh = init_device_mesh(device.type, (world.size,))
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        self.blocks = [fully_shard(block, mesh=mesh) for blocks in lists for block in blocks]
        self.module = _Forward(model)
        self.rest = fully_shard(self.module, mesh=mesh)  # the same module

    def shared(self, work: Callable[..., T]) -> Callable[..., T]:
        return partial(self.module, work)

    def passes(self, parts: Sequence[T], idle: T) -> list[tuple[T, bool]]:
        most = max(self.world.gather(len(parts)))
        return super().passes(parts, idle) + [(idle, False)] * (most - len(parts))

    def backward(self, loss: Tensor, counts: bool) -> None:
        (loss * (self.world.size if counts else 0)).backward()

    def with_whole_model(self, work: Callable[[], T]) -> T:
        for other in self.frozen:
            work = partial(other.with_whole_model, work)

        @torch.no_grad()
        def unsharded() -> T:
            with self._held():
                return work()

        try:
            return self.module(unsharded)
        finally:
            self.rest.reshard()

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Gather all blocks, and keep them so through forward passes and calls of `state_dict`."""
        cut_again = [(m, m._state_dict_pre_hooks) for m in self.module.modules()]
        for m, _ in cut_again:
            m._state_dict_pre_hooks = OrderedDict()
        for block in self.blocks:
            block.set_reshard_after_forward(False, recurse=False)
            block.unshard()
        try:
            yield
        finally:
            for block in self.blocks:
                block.set_reshard_after_forward(True, recurse=False)
                block.reshard()
            for m, hooks in cut_again:
                m._state_dict_pre_hooks = hooks


def check_sharing(kind: str, precision: Precision) -> None:
    """Raise UserError if the strategy that `--parallel` names cannot be used."""
    assert kind in KINDS
    if kind == "fsdp" and not torch.distributed.is_initialized():
        raise UserError("--parallel fsdp cuts the model over processes: start the run with torchrun")
    if kind == "fsdp" and precision.kind == "fp16":
        raise UserError("--parallel fsdp takes bf16 or fp32: the loss scaling of fp16 looks at whole gradients")


def share_model(
    kind: str,
    model: nn.Module,
    world: World,
    precision: Precision,
    replicas: Callable[[nn.Module, World], Alone] = Replicas,
    frozen: Sequence[nn.Module] = (),
) -> Alone:
    """The strategy that `--parallel` names. Raises UserError if it cannot be used.

    `replicas` is the strategy for whole models; `frozen` are the run's models without gradients.
    """
    check_sharing(kind, precision)
    if kind == "fsdp":
        return Shards(model, world, precision.device, frozen)
    return replicas(model, world) if world.size > 1 else Alone(world)
