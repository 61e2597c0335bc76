"""A contrastive step on two ranks against one process: losses and gradients, of the scale too."""

import pytest
import torch
from clip_helpers import captions, small
from ranks import run_ranks

from vqa_scratch.training.contrastive import gather_pairs, info_nce, sigmoid_loss, twins
from vqa_scratch.training.launch import start
from vqa_scratch.training.ranks import ALONE, World
from vqa_scratch.training.sharing import Replicas

PAIRS = 7
KEYS = torch.tensor([1, 2, 3, 1, 4, 1, 3])  # twins on one rank and across both
SHARES = {"equal and one more": (3, 7), "none on the second": (7, 7)}


def inputs():
    torch.manual_seed(1)
    return torch.randn(PAIRS, 3, 12, 12, dtype=torch.float64), captions((20, 13, 4, 2, 9, 20, 6))[0]


def model_of(kind):
    torch.manual_seed(0)
    return small(kind).double()


def losses_of(model, pixels, ids, keys, world, rows=slice(None)):
    """As a system will: a rank without pairs goes through the model, and leaves its rows out."""
    images, texts = model.embed_images(pixels)[rows], model.embed_texts(ids)[rows]
    options = {"left_out": twins(keys[rows], world=world), "world": world}
    if model.logit_bias is None:
        return info_nce(images, texts, model.logit_scale, **options)
    return sigmoid_loss(images, texts, model.logit_scale, model.logit_bias, **options)


def one_rank(kind: str, ends: tuple[int, int]) -> None:
    with start("cpu") as world:
        compare(kind, ends, world)  # a function: DDP must be gone before its group is


def compare(kind: str, ends: tuple[int, int], world: World) -> None:
    """The step of a rank under DDP, which averages: gradients and losses equal those of one process."""
    own = slice(0, ends[0]) if world.main else slice(ends[0], ends[1])
    model, (pixels, ids) = model_of(kind), inputs()
    some = own if own.start < PAIRS else slice(0, 2)
    rows = slice(None) if own.start < PAIRS else slice(0, 0)
    ranks = Replicas(model, world)
    losses, right = ranks.shared(losses_of)(model, pixels[some], ids[some], KEYS[some], world, rows)
    (losses.sum() * world.size / PAIRS).backward()

    alone, (pixels, ids) = model_of(kind), inputs()
    expected, first = losses_of(alone, pixels, ids, KEYS, ALONE)
    expected.mean().backward()
    torch.testing.assert_close(losses, expected[own], rtol=1e-12, atol=1e-12)
    assert torch.equal(right, first[own])
    for (name, mine), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        worst = (mine.grad - theirs.grad).abs().max().item()
        assert worst <= 1e-12 + 1e-9 * theirs.grad.abs().max().item(), f"{name}: {worst:.2g}"
    gathered, places = gather_pairs(world, KEYS[own])
    assert torch.equal(gathered[0], KEYS) and places.tolist() == list(range(PAIRS))[own]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("shares", SHARES)
def test_two_ranks_equal_one_process(kind, shares):
    """In fp64, where the order of sums leaves 1e-12: fp32 has the same formulas."""
    for ended in run_ranks(2, one_rank, kind, SHARES[shares]):
        assert ended.code == 0, ended.err
