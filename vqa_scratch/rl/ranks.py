"""Rollouts of several ranks put together: every rank gets all rows, in the order of the prompts.

Shapes: b responses of one rank, B of all, R response tokens.
"""

import torch
from torch import Tensor

from vqa_scratch.engine.distributed import World
from vqa_scratch.rl.types import Prompt, Samples


def gather_rows(world: World, *tensors: Tensor) -> list[Tensor]:
    """Each tensor, (b,) or (b, R), with the rows of all ranks: (B,) or (B, the longest R), 0 where padded."""
    if world.size == 1:
        return list(tensors)
    columns = zip(*world.gather([tensor.cpu() for tensor in tensors]), strict=True)
    return [_joined(pieces).to(own.device) for pieces, own in zip(columns, tensors, strict=True)]


def _joined(pieces: tuple[Tensor, ...]) -> Tensor:
    if pieces[0].ndim == 1:
        return torch.cat(pieces)
    result = pieces[0].new_zeros(sum(map(len, pieces)), max(piece.shape[1] for piece in pieces))
    row = 0
    for piece in pieces:
        result[row : row + len(piece), : piece.shape[1]] = piece
        row += len(piece)
    return result


def gather_samples(world: World, samples: Samples, prompts: list[Prompt], each: int) -> Samples:
    """The responses of all ranks; `prompts` are those of the whole batch, answered `each` times."""
    if world.size == 1:
        return samples
    columns = zip(*world.gather((samples.ids, samples.texts, samples.finished)), strict=True)
    ids, texts, finished = ([x for piece in pieces for x in piece] for pieces in columns)
    return Samples([p for p in prompts for _ in range(each)], ids, texts, finished)
