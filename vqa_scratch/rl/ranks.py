"""Joins the rollouts of all ranks, in the order of the prompts on every rank, and adds up their gradients.

Shapes: b responses of one rank, B of all, R response tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vqa_scratch.rl.types import Prompt, Samples
from vqa_scratch.training.ranks import Alone, World
from vqa_scratch.training.sharing import make_alike


def gather_rows(world: World, *tensors: Tensor) -> list[Tensor]:
    """Each tensor, (b,) or (b, R), with the rows of all ranks: (B,) or (B, the longest R), 0 where padded."""
    if world.size == 1:
        return list(tensors)
    columns = zip(*world.gather([tensor.cpu() for tensor in tensors]), strict=True)
    return [_joined(pieces).to(own.device) for pieces, own in zip(columns, tensors, strict=True)]


def _joined(pieces: tuple[Tensor, ...]) -> Tensor:
    if pieces[0].ndim == 1:
        return torch.cat(pieces)
    return pad_sequence([row for piece in pieces for row in piece], batch_first=True)


def gather_samples(world: World, samples: Samples, prompts: list[Prompt], each: int) -> Samples:
    """The responses of all ranks; `prompts` are those of the whole batch, answered `each` times."""
    if world.size == 1:
        return samples
    columns = zip(*world.gather((samples.ids, samples.texts, samples.finished)), strict=True)
    ids, texts, finished = ([x for piece in pieces for x in piece] for pieces in columns)
    return Samples([p for p in prompts for _ in range(each)], ids, texts, finished)


BUCKET = 8_000_000  # numbers sent at once


class Copies(Alone):
    """The weights of rank 0 on every rank, without a wrapper: ranks may make different numbers of passes."""

    def __init__(self, model: nn.Module, world: World) -> None:
        super().__init__(world)
        make_alike(model, world)

    def collect(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the ranks; a missing one counts as zero, unless all ranks lack it."""
        having = self.world.totals([float(p.grad is not None) for p in parameters])
        bucket: list[Tensor] = []  # gradients
        used = [p for p, count in zip(parameters, having, strict=True) if count]
        for p in used:
            own = p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            bucket.append(own)
            if sum(grad.numel() for grad in bucket) >= BUCKET or p is used[-1]:
                flat = self.world.sum_(torch.cat([grad.flatten() for grad in bucket]))
                for grad, piece in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
                    grad.copy_(piece.view_as(grad))
                bucket = []
