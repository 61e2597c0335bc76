"""Writes descriptions of the drawn scenes, and reads from a description which objects it names.

Every description names every object of its scene by size, colour and shape. Five forms differ in the rest: the quarter
of the image that each object lies in, with or without a count; the order from left to right or from top to bottom; or
the relation of each object to the one named before. Where a form has no order of its own, objects come in reading
order. The texts depend on (seed, image id) alone, so a scene has the same references everywhere.

Descriptions stay true when the image is turned by up to 5 degrees: no centre is closer than 4 pixels to the middle
lines, and an object "left of" or "above" another is at least `MIN_OFFSET` pixels away from it.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vqa_scratch.data.scenes import CELL, COLORS, MIN_OFFSET, NUMBER_WORDS, PIXELS, SHAPES, SIZES, Object, Scene, phrase
from vqa_scratch.errors import UserError
from vqa_scratch.storage import read_object, typed

MOST_OBJECTS = len(NUMBER_WORDS) - 1  # of a scene

# -------------------------------------------------------------------------------------------------- scenes on disk


def scenes_file(folder: Path, split: str) -> Path:
    """Where the built-in data set keeps the objects of a split."""
    return folder / f"scenes_{split}.json"


About = dict[int | str, list[int]]  # {question_id: the objects it names, as places in its scene}


def read_drawn(path: Path) -> dict[int | str, tuple[Scene, About]]:
    """{image_id: (scene, what its questions name)} from a file of the built-in data set. Raises UserError for another
    file."""
    drawn: dict[int | str, tuple[Scene, About]] = {}
    for image_id, record in read_object(path).items():
        where = f"{path}: scene {image_id!r}"
        objects, about = typed(where, record, {"objects": list, "about": dict})
        scene = tuple(_object(f"{where}, object {place}", thing) for place, thing in enumerate(objects))
        numbers = [image_id, *about]
        if not all(map(str.isdecimal, numbers)) or not 0 < len(scene) <= MOST_OBJECTS:
            raise UserError(f"{where} has {len(scene)} objects, or an id that is no number: it is no drawn scene")
        if not all(isinstance(named, list) and all(n in range(len(scene)) for n in named) for named in about.values()):
            raise UserError(f"{where} has questions about objects that it does not have")
        drawn[int(image_id)] = scene, {int(question_id): named for question_id, named in about.items()}
    return drawn


def _object(where: str, thing: Any) -> Object:
    shape, color, size, center = typed(where, thing, {"shape": str, "color": str, "size": str, "center": list})
    known = shape in SHAPES and color in COLORS and size in SIZES
    if not known or len(center) != 2 or not all(isinstance(side, int) and 0 <= side < PIXELS for side in center):
        raise UserError(f"{where} is none that is drawn: a {size} {color} {shape} at {center}")
    return Object(shape, color, size, *center)


def read_scenes(path: Path) -> dict[int | str, Scene]:
    """{image_id: scene}, as `read_drawn`."""
    return {image_id: scene for image_id, (scene, _) in read_drawn(path).items()}


# -------------------------------------------------------------------------------------------------- writing


def reading_order(scene: Scene) -> list[Object]:
    """Row by row of the drawing grid, from left to right."""
    return sorted(scene, key=lambda thing: (thing.y // CELL, thing.x // CELL))


def listed(parts: Sequence[str]) -> str:
    """("a", "b", "c") -> "a, b and c"."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def in_places(scene: Scene) -> str:
    """Each object by the quarter of the image that it lies in."""
    return listed([f"a {phrase(thing.words)} at the {thing.place}" for thing in reading_order(scene)])


def _counted(scene: Scene) -> str:
    return f"{NUMBER_WORDS[str(len(scene))]} objects: {in_places(scene)}"


def _in_a_line(scene: Scene, axis: str, words: str) -> str | None:
    """The objects in their order along an axis; None where two are too close to tell."""
    line = sorted(scene, key=lambda thing: getattr(thing, axis))
    gaps = [getattr(b, axis) - getattr(a, axis) for a, b in zip(line, line[1:], strict=False)]
    return None if min(gaps) < MIN_OFFSET else f"{words}: {listed([f'a {phrase(thing.words)}' for thing in line])}"


def _related(scene: Scene) -> str:
    """Each object but the first by its direction from the one before, along the axis on which they differ most."""
    order = reading_order(scene)
    parts = [f"a {phrase(order[0].words)}"]
    for before, thing in zip(order, order[1:], strict=False):
        dx, dy = thing.x - before.x, thing.y - before.y
        if abs(dx) >= abs(dy):
            relation = "to the right of it" if dx > 0 else "to the left of it"
        else:
            relation = "below it" if dy > 0 else "above it"
        parts.append(f"{relation} a {phrase(thing.words)}")
    return ", ".join(parts)


FORMS: tuple[Callable[[Scene], str | None], ...] = (
    *(in_places, _counted, _related),
    partial(_in_a_line, axis="y", words="from top to bottom"),
    partial(_in_a_line, axis="x", words="from left to right"),
)


def describe(scene: Scene, rng: random.Random) -> list[str]:
    """The descriptions of a scene, one of each form that can tell its objects apart, in an order drawn from `rng`."""
    texts = [text for form in FORMS if (text := form(scene)) is not None]
    rng.shuffle(texts)
    return texts


def describe_all(scenes: dict[int | str, Scene], seed: int) -> dict[int | str, list[str]]:
    """{image_id: descriptions}, each a function of (seed, image id) alone."""
    return {image_id: describe(scene, random.Random(f"{seed}/{image_id}")) for image_id, scene in scenes.items()}


# -------------------------------------------------------------------------------------------------- reading

_OBJECT = rf"\b({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b"
_NAMED = re.compile(_OBJECT)
_PLACED = re.compile(_OBJECT + r" at the ((?:top|bottom) (?:left|right))\b")


def objects_named(text: str) -> Counter[tuple[str, ...]]:
    """(size, colour, shape) of every object that a description names, anywhere in it, with their counts."""
    return Counter(_NAMED.findall(text.lower()))


def objects_of(scene: Scene) -> Counter[tuple[str, ...]]:
    """(size, colour, shape) of every object of a scene, with their counts."""
    return Counter(thing.words for thing in scene)


def places_named(text: str) -> Counter[tuple[str, ...]]:
    """(size, colour, shape, place) of every object that a description puts into a quarter of the image."""
    return Counter(_PLACED.findall(text.lower()))


def places_of(scene: Scene) -> Counter[tuple[str, ...]]:
    """(size, colour, shape, place) of every object of a scene."""
    return Counter((*thing.words, thing.place) for thing in scene)
