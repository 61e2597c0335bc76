"""How far two sets of gradients are apart, read from the files that two sides wrote."""

from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from vqa_scratch.errors import UserError


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the safetensors files below `folder`, one at a time, with the name of its file's folder."""
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in sorted(file.keys()):
                yield f"{path.relative_to(folder).parent}/{key}", file.get_tensor(key)


def gradient_difference(ours: Path, theirs: Path) -> tuple[float, float, str]:
    """(relative difference of all gradients together, of the worst tensor, its name).

    Differences are in the 2-norm. A tensor's is relative to its own norm, or to the typical (root mean square) one
    where that is greater than a thousand times its own: some gradients, as of a key's bias, are zero but for rounding.
    Raises UserError if the two do not hold the same tensors.
    """
    figures = {}
    for (name, a), (other, b) in zip(tensors(ours), tensors(theirs), strict=True):
        if name != other or a.shape != b.shape:
            raise UserError(f"the two sides differ in their tensors: {name} {list(a.shape)}, {other} {list(b.shape)}")
        figures[name] = ((a.double() - b.double()).norm().item(), b.double().norm().item())
    total = sum(size**2 for _, size in figures.values()) ** 0.5
    floor = total / len(figures) ** 0.5 / 1000
    worst = max(figures, key=lambda name: figures[name][0] / max(figures[name][1], floor))
    difference = sum(d**2 for d, _ in figures.values()) ** 0.5
    return difference / total, figures[worst][0] / max(figures[worst][1], floor), worst
