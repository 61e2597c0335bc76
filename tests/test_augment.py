"""Augmentation: what it does to pixels, by hand, and that it leaves every text true."""

import math

import pytest
import torch

from vqa_scratch.data.augment import Augment, depends_on_side, rotate
from vqa_scratch.data.scenes import CELL, GRID, MIN_OFFSET, PIXELS, SIZES
from vqa_scratch.systems.presets import AUGMENTED

PRESET = Augment(*AUGMENTED.values())


def images(number: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (number, 16, 16, 3), dtype=torch.uint8)


def chance(number: int) -> torch.Tensor:
    return torch.rand(number, 4)


def test_nothing_asked_for_changes_nothing():
    x = images()
    assert torch.equal(Augment()(x, torch.ones(3, dtype=torch.bool), chance(3)), x)


def test_mirroring_is_left_to_right_and_only_where_allowed():
    x = images(4)
    may = torch.tensor([True, False, True, False])
    y = Augment(flip=1, degrees=0, brightness=0, contrast=0)(x, may, chance(4))
    assert torch.equal(y[may], x[may].flip(2)) and torch.equal(y[~may], x[~may])
    assert not torch.equal(x, x.flip(2))


def test_texts_with_a_side_never_meet_a_mirror():
    """Over many draws: an image whose text says left or right is as it was."""
    x, may = images(2), torch.tensor([True, False])
    seen = [Augment(0.5, 0, 0, 0)(x, may, chance(2)) for _ in range(50)]
    assert all(torch.equal(y[1], x[1]) for y in seen)
    assert 10 < sum(torch.equal(y[0], x[0].flip(1)) for y in seen) < 40


@pytest.mark.parametrize(
    ("text", "depends"),
    [
        ("a small red circle at the top left", True),
        ("the right-most one", True),
        ("to the Right of it", True),
        ("桌子左边有一只猫", True),
        ("from top to bottom: a large red square", False),
        ("bright leftovers, all right?", True),
        ("bright leftovers", False),
        ("桌子上有一只猫", False),
    ],
)
def test_side_words(text, depends):
    assert depends_on_side(text) == depends


def test_a_turn_by_90_degrees_is_a_transposition():
    x = torch.rand(1, 3, 8, 8)
    y = rotate(x, torch.tensor([90.0]))
    # Counterclockwise, as numpy turns an array; 1e-4: interpolation between pixels that coincide to rounding.
    torch.testing.assert_close(y, torch.rot90(x, 1, (2, 3)), atol=1e-4, rtol=0)


def test_an_image_that_is_not_square_is_not_sheared():
    """A bright point goes where a turn of the plane puts it, on 40 x 20 pixels."""
    x = torch.zeros(1, 1, 20, 40)
    x[0, 0, 9:11, 29:31] = 1  # centre at 10 to the right of the middle
    y = rotate(x, torch.tensor([30.0]))[0, 0]
    mass = y / y.sum()
    rows, columns = torch.meshgrid(torch.arange(20) + 0.5 - 10, torch.arange(40) + 0.5 - 20, indexing="ij")
    right, up = (mass * columns).sum().item(), -(mass * rows).sum().item()
    # Interpolation spreads the point over neighbours but keeps its centre to a tenth of a pixel.
    assert (right, up) == (pytest.approx(10 * math.cos(math.pi / 6), abs=0.1), pytest.approx(5, abs=0.1))


def test_brightness_and_contrast_by_hand():
    x = images(200)
    never = torch.zeros(200, dtype=torch.bool)
    y = Augment(0, 0, brightness=0.2, contrast=0)(torch.full_like(x, 100), never, chance(200))
    levels = y[:, 0, 0, 0].float()
    assert levels.min() >= 80 and levels.max() <= 120 and levels.std() > 5
    z = Augment(0, 0, 0, contrast=0.2)(x, never, chance(200))
    means = x.float().mean((1, 2, 3)), z.float().mean((1, 2, 3))
    torch.testing.assert_close(*means, atol=2, rtol=0)  # rounding and clipping; contrast turns about the mean
    assert (z.float().std((1, 2, 3)) / x.float().std((1, 2, 3))).std() > 0.03


def test_colors_stay_what_they_are_called():
    """The largest changes together: the nearest drawing colour of a pixel is still its own."""
    from vqa_scratch.data.scenes import COLORS

    palette = torch.tensor(list(COLORS.values()))
    x = palette[:, None, None].expand(6, 8, 8, 3).to(torch.uint8).contiguous()
    may = torch.ones(6, dtype=torch.bool)
    for _ in range(50):
        y = PRESET(x, may, chance(6)).float().mean((1, 2))
        assert torch.cdist(y, palette.float()).argmin(1).tolist() == list(range(6))


def test_a_turn_keeps_places_and_relations_of_the_drawn_scenes():
    """The bound behind the captions' 5 degrees, from the drawing grid: see `data/descriptions.py`."""
    turn = math.radians(PRESET.degrees)
    near, far = min(SIZES.values()), PIXELS / 2 - min(SIZES.values())  # of a centre, from the middle lines
    assert near * math.cos(turn) - far * math.sin(turn) > 0, "a quarter of the image"
    widest = (GRID - 1) * CELL + CELL - 2 * min(SIZES.values())  # between two centres along one axis
    assert MIN_OFFSET * math.cos(turn) - widest * math.sin(turn) > 0, "left of, above"


def test_an_image_does_not_depend_on_its_neighbours():
    """The same numbers give the same image, in a batch or alone; others give another."""
    x, may, numbers = images(), torch.ones(3, dtype=torch.bool), chance(3)
    whole = PRESET(x, may, numbers)
    assert torch.equal(whole[1:2], PRESET(x[1:2], may[1:2], numbers[1:2]))
    assert not torch.equal(whole, PRESET(x, may, chance(3)))
