"""Scenes that differ from a drawn one in one respect, and scenes of a single object: what an image is told apart by.

Descriptions of such a pair have the same words. A model that reads them as a bag of words cannot choose the right one
(Yuksekgonul et al. 2023, "When and Why Vision-Language Models Behave like Bags-of-Words", 2210.01936; Thrush et al.
2022, "Winoground", 2204.03162).
"""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations, product

from PIL import Image

from vqa_scratch.data.descriptions import places_of
from vqa_scratch.data.scenes import CELL, COLORS, GRID, HELD_OUT, PIXELS, SHAPES, SIZES, Object, Scene, render


def swapped(scene: Scene, name: str) -> Scene | None:
    """The scene with the "color" or "shape" of two objects exchanged: the first two for which it makes a difference.

    None if there are none. No pair of colour and shape arises that training never shows.
    """
    for i, j in combinations(range(len(scene)), 2):
        things = list(scene)
        for one, other in ((i, j), (j, i)):
            things[one] = replace(scene[one], **{name: getattr(scene[other], name)})
        unseen = {(thing.color, thing.shape) for thing in things} & HELD_OUT
        if not unseen and places_of(tuple(things)) != places_of(scene):
            return tuple(things)
    return None


def sides_swapped(scene: Scene) -> Scene | None:
    """The scene in a mirror; None if its description stays the same."""
    mirrored = tuple(replace(thing, x=PIXELS - thing.x) for thing in scene)
    return None if places_of(mirrored) == places_of(scene) else mirrored


CONTRASTS: dict[str, Callable[[Scene], Scene | None]] = {
    "colors": partial(swapped, name="color"),
    "shapes": partial(swapped, name="shape"),
    "sides": sides_swapped,
}
CLASSES = tuple(product(SIZES, COLORS, SHAPES))  # (size, color, shape) of an object


def single_objects(each: int, seed: int = 0) -> list[tuple[Image.Image, int]]:
    """`each` images of every class: one object alone, anywhere, with the place of its class in `CLASSES`."""
    drawn = []
    for number, (size, color, shape) in enumerate(CLASSES):
        for k in range(each):
            rng = random.Random(f"{seed}/{number}/{k}")
            column, row = rng.randrange(GRID), rng.randrange(GRID)
            x, y = (cell * CELL + rng.randint(SIZES[size], CELL - SIZES[size]) for cell in (column, row))
            drawn.append((render((Object(shape, color, size, x, y),), rng), number))
    return drawn
