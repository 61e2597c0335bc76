"""The losses of CLIP and SigLIP: each image against the texts of the whole batch, on one rank or several.

InfoNCE: van den Oord et al. 2018 (1807.03748), in both directions as in Radford et al. 2021 (2103.00020, figure 3).
Sigmoid: Zhai et al. 2023 (2303.15343, section 3.2). Both give a loss for each pair of this rank, so that, as everywhere
here, a step divides their sum by the number of pairs on all ranks. Unlike others they do not add up over parts of a
batch: the texts of a part are the only wrong ones that its images see. Beside the loss they say which pairs are right:
whose image is closest to its own text.

Over several ranks a rank takes the rows of its own pairs, against the columns of all. The gather carries gradients:
what another rank's loss asks of my embeddings comes back to me. Summed over the ranks, the gradients are those of one
process with the whole batch, of the scale too.

Shapes: b pairs of this rank, B of all, P width of the embeddings.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqa_scratch.models.clip import logits_of
from vqa_scratch.training.ranks import ALONE, World

LARGEST_SCALE = 100.0  # of exp(scale), as in CLIP


class _Gather(torch.autograd.Function):
    """This rank's rows among those of all ranks; backward, the sum over ranks of what they ask of these rows."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, world: World, place: slice, total: int) -> Tensor:
        ctx.world, ctx.place = world, place
        rows = own.new_zeros(total, *own.shape[1:])
        rows[place] = own
        return world.sum_(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.world.sum_(gradient.clone())[ctx.place], None, None, None


def gather_pairs(world: World, *tensors: Tensor) -> tuple[list[Tensor], Tensor]:
    """Each tensor (b, ...) with the rows of all ranks in their order, (B, ...), and the places (b,) of this rank's.

    Ranks may have different numbers of rows, and none. Gradients go back to the rank that the rows came from.
    """
    count = len(tensors[0])
    counts = [int(n) for n in world.totals([count if rank == world.rank else 0 for rank in range(world.size)])]
    first = sum(counts[: world.rank])
    places = torch.arange(first, first + count, device=tensors[0].device)
    if world.size == 1:
        return list(tensors), places
    place = slice(first, first + count)
    return [_Gather.apply(tensor, world, place, sum(counts)) for tensor in tensors], places


def twins(*keys: Tensor, world: World = ALONE) -> Tensor:
    """(b, B) bool: which other pairs have the same text as each of this rank's, or the same image.

    Each of `keys` (b,) has a number for each text, or for each image. An image of the one fits the text of the other
    just as well, so it is no wrong pair: the losses leave it out.
    """
    everyone, places = gather_pairs(world, *keys)
    same = torch.stack([own[:, None] == others for own, others in zip(keys, everyone, strict=True)]).any(0)
    return same & ~_own(places, same.shape[1])


def _own(places: Tensor, total: int) -> Tensor:
    """(b, B) bool: which pair of all is each of this rank's."""
    return places[:, None] == torch.arange(total, device=places.device)


def _first(logits: Tensor) -> Tensor:
    """(b,): the place of the highest logit of each row; a rank without pairs has none."""
    return logits.detach().argmax(1) if len(logits) else logits.new_zeros(0, dtype=torch.long)


def info_nce(
    images: Tensor, texts: Tensor, scale: Tensor, *, left_out: Tensor | None = None, world: World = ALONE
) -> tuple[Tensor, Tensor]:
    """(b,): the loss of each pair in nats, the mean of choosing its text among all and its image among all; and (b,)
    bool, which are right.

    images, texts (b, P) of length 1; scale, the logarithm of the factor of their similarity; left_out (b, B) bool:
    other pairs that do not count as wrong, see `twins`. At equal similarities it is ln B. In fp32 at least.
    """
    (all_images, all_texts), places = gather_pairs(world, images, texts)
    both = [logits_of(images, all_texts, scale), logits_of(texts, all_images, scale)]
    if left_out is not None:
        both = [logits.masked_fill(left_out, -math.inf) for logits in both]
    losses = [F.cross_entropy(logits, places, reduction="none") for logits in both]
    return (losses[0] + losses[1]) / 2, _first(both[0]) == places


def sigmoid_loss(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, *, left_out: Tensor | None = None, world: World = ALONE
) -> tuple[Tensor, Tensor]:
    """(b,): the loss of each image in nats, summed over all texts: is this one its own, yes or no? And (b,) bool, which
    are right.

    Arguments as in `info_nce`; bias is added to the logits. Their mean is the published loss: divided by B, not B^2.
    """
    (all_texts,), places = gather_pairs(world, texts)
    logits = logits_of(images, all_texts, scale, bias)
    if left_out is not None:
        logits = logits.masked_fill(left_out, -math.inf)  # a certain no: its loss and its gradient are zero
    losses = -F.logsigmoid(torch.where(_own(places, len(all_texts)), logits, -logits))
    return losses.sum(1), _first(logits) == places


@torch.no_grad()
def clamp_scale_(scale: Tensor) -> None:
    """Keep exp(scale) at 100 or less, in place; to be called after each step of the optimizer.

    Not in the forward pass: there a clamp has no gradient beyond its bound, and the scale could never come back.
    """
    scale.clamp_(max=math.log(LARGEST_SCALE))
