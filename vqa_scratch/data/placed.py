"""Scenes that somebody places by hand, object by object, drawn in the tones of the built-in data set without chance."""

import random
from typing import Any

from PIL import Image

from vqa_scratch.data.scenes import COLORS, HELD_OUT, PIXELS, SHAPES, SIZES, Object, Scene, render
from vqa_scratch.errors import UserError
from vqa_scratch.storage import typed

MOST = 12  # objects
FIELDS = {"shape": str, "color": str, "size": str, "x": int | float, "y": int | float}
# How each is drawn: a circle, or the corners of a polygon, in radii around the centre; "inset", pixels off each side.
OUTLINES: dict[str, dict[str, Any]] = {
    "circle": {"circle": 1},
    "square": {"points": [[-1, -1], [1, -1], [1, 1], [-1, 1]], "inset": 0.5},
    "triangle": {"points": [[-1, 1], [1, 1], [0, -1]]},
}


class Even(random.Random):
    """Not by chance, but always the middle."""

    def randint(self, a: int, b: int) -> int:
        return (a + b) // 2


def drawn(scene: Scene) -> Image.Image:
    """The scene in its plain colours."""
    return render(scene, Even())


def editor() -> dict[str, Any]:
    """What a page needs to draw a scene as `drawn` does."""
    background = drawn(()).tobytes()[:3].hex()
    colors = {name: "#" + bytes(color).hex() for name, color in COLORS.items()}
    about = {"width": PIXELS, "height": PIXELS, "background": f"#{background}", "most": MOST}
    return about | {"colors": colors, "sizes": SIZES, "shapes": OUTLINES, "held_out": sorted(map(list, HELD_OUT))}


def placed(objects: list[Any]) -> Scene:
    """The scene of a list of JSON objects. Raises UserError for one that cannot be drawn, and for too many."""
    if len(objects) > MOST:
        raise UserError(f"a scene has at most {MOST} objects, not {len(objects)}")
    scene = []
    for place, thing in enumerate(objects):
        where = f"object {place + 1}"
        shape, color, size, *centre = typed(where, thing, FIELDS)
        for value, known in ((shape, SHAPES), (color, COLORS), (size, SIZES)):
            if value not in known:
                raise UserError(f"{where}: {value!r} is none of {', '.join(known)}")
        if not all(0 <= side <= PIXELS for side in centre):
            raise UserError(f"{where} is at {centre}, outside the {PIXELS} x {PIXELS} pixels")
        scene.append(Object(shape, color, size, *map(round, centre)))
    return tuple(scene)
