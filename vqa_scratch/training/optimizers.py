"""The optimizers of a run (AdamW and Muon) and the learning-rate schedule.

Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") moves a hidden matrix along the
nearest semi-orthogonal matrix to its momentum. `torch.optim.Muon` takes one matrix at a time; here all matrices of one
shape go through the Newton-Schulz iteration together. The steps are the same, and several times faster on small models.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vqa_scratch.training.adamw import AdamW
from vqa_scratch.training.checkpoint import load_whole_state
from vqa_scratch.training.parameter_groups import split_parameters, stacked_matrices
from vqa_scratch.training.ranks import like, whole

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic's coefficients, from the paper
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(K, rows, columns) -> the same shape, each matrix nearly semi-orthogonal: all its singular values are about 1.

    bfloat16 is enough: only the direction of the result matters.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices.to(dtype) if wide else matrices.to(dtype).mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # singular values into [0, 1]
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def orthogonal_steps(matrices: list[Tensor]) -> list[Tensor]:
    """The step of Muon along each matrix at a learning rate of 1; matrices of one shape go through it together.

    Scaled by sqrt(max(1, rows / columns)), as Muon's authors do.
    """
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for number, matrix in enumerate(matrices):
        by_shape[matrix.shape].append(number)
    steps = list(matrices)
    for (rows, columns), numbers in by_shape.items():
        made = orthogonalize(torch.stack([matrices[n] for n in numbers])).to(matrices[numbers[0]].dtype)
        for number, step in zip(numbers, made.mul_(math.sqrt(max(1.0, rows / columns))), strict=True):
            steps[number] = step
    return steps


class Muon(torch.optim.Optimizer):
    """Muon for matrices (rows, columns) only.

    `stacked` says of a parameter that is several matrices on top of each other how many rows each has: every one of
    them is orthogonalized for itself. As one, queries and keys would follow the values, whose gradient is larger.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        stacked: Mapping[Tensor, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.stacked = stacked or {}
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.ndim != 2:
                raise ValueError(f"Muon takes matrices, got a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch's may take a closure
        assert closure is None, "closures are not used here"
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            grads = [p.grad for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            ahead = whole(torch._foreach_lerp(grads, buffers, group["momentum"]))  # Nesterov; sharded or not
            pieces = [
                matrix.split(list(self.stacked.get(p, p.shape[:1]))) for p, matrix in zip(params, ahead, strict=True)
            ]
            made = iter(orthogonal_steps([piece for of_one in pieces for piece in of_one]))
            steps = [like(p, torch.cat([next(made) for _ in of_one])) for p, of_one in zip(params, pieces, strict=True)]
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, steps, alpha=-group["lr"])


class Optimizers:
    """AdamW for all parameters, or Muon for the hidden matrices and AdamW for the rest, used like one optimizer."""

    def __init__(
        self,
        model: nn.Module,
        *,
        kind: str,
        learning_rate: float,
        matrix_learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.98),
    ) -> None:
        hidden, wide, rest = split_parameters(model)
        if not hidden and not wide and not rest:
            raise ValueError("nothing to train: every parameter is frozen")
        self.optimizers: list[torch.optim.Optimizer] = []
        if kind == "muon" and hidden:
            muon = Muon(hidden, lr=matrix_learning_rate, weight_decay=weight_decay, stacked=stacked_matrices(model))
            self.optimizers.append(muon)
            hidden = []
        groups = [{"params": hidden + wide, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        if groups:
            self.optimizers.append(AdamW(groups, lr=learning_rate, betas=betas, fused=True))
        self.parameters = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]
        self.peaks = [[group["lr"] for group in o.param_groups] for o in self.optimizers]

    def set_factor(self, factor: float) -> None:
        """Scale every learning rate from its peak."""
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, saved in zip(self.optimizers, states, strict=True):
            load_whole_state(optimizer, saved)


def schedule(step: int, progress: float, warmup_steps: int, decay_from: float) -> float:
    """Factor of the learning rate: a linear warm-up, then 1, and after a share `decay_from` of the run linear to zero.

    `progress` is the share of the run that is over, in steps or in time, whichever limits it.
    """
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    fall = (1 - progress) / (1 - decay_from) if progress > decay_from else 1.0
    return warm * min(1.0, max(0.0, fall))
