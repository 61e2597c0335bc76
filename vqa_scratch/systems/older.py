"""Opens runs from before there were connectors: translates their weights, sizes and checkpoints.

In those runs the projections, the modality embedding and the table of places belonged to the model itself.
"""

from typing import Any

from torch import Tensor, nn

from vqa_scratch.storage import typed
from vqa_scratch.training.parameter_groups import split_parameters

MOVED = ("image_projection.", "text_projection.", "modality", "places")


def todays_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under today's names; those of today's runs are unchanged."""
    return {f"connector.{name}" if name.startswith(MOVED) else name: tensor for name, tensor in state.items()}


def todays_sizes(sizes: dict[str, Any]) -> dict[str, Any]:
    """The "model" of config.json; old runs have `fusion` and `stem` in it, old captioners `norm` and `grid`."""
    if "connector" in sizes:
        return sizes
    image, decoder = typed("the model", sizes, {"image": dict, "decoder": dict})
    if "fusion" not in sizes:
        norm, side = typed("the model", sizes, {"norm": str, "grid": int})
        image, text, connector = image | {"model_type": "resnet", "norm": norm}, None, {"kind": "tokens"}
    else:
        kind, stem, text = typed("the model", sizes, {"fusion": str, "stem": str, "text": dict | None})
        pixels, patch = typed("the image encoder", image, {"image_size": int, "patch_size": int})
        image, connector, side = image | {"stem": stem}, {"kind": kind}, pixels // max(patch, 1)
    grid = {"grid": [side, side]} if connector["kind"] == "tokens" else {}
    return {"image": image, "text": text, "connector": connector | grid, "decoder": decoder}


def todays_moments(states: list[dict[str, Any]], model: nn.Module, weights: dict[str, Tensor]) -> list[dict[str, Any]]:
    """The optimizer states of a checkpoint, which number the parameters, in today's order of the parameters.

    `weights` are those of the checkpoint, in the order of the model that wrote it.
    """
    if not any(name.startswith(MOVED) for name in weights):
        return states
    then = {name: place for place, name in enumerate(todays_names(weights))}
    names = {id(p): name for name, p in model.named_parameters()}
    result = []
    hidden, wide, rest = ([names[id(p)] for p in group] for group in split_parameters(model))
    of_optimizers = [[hidden], [wide, rest]] if len(states) == 2 else [[hidden, wide, rest]]
    for saved, own in zip(states, of_optimizers, strict=True):
        now = [name for group in own for name in group]
        before = [name for group in own for name in sorted(group, key=then.__getitem__)]
        result.append(saved | {"state": renumbered(saved["state"], before, now)})
    return result


def renumbered(state: dict[int, Any], before: list[str], now: list[str]) -> dict[int, Any]:
    """The moments of parameters that an optimizer numbered in the order `before`, numbered in the order `now`."""
    number = {name: place for place, name in enumerate(now)}
    return {number[before[i]]: moments for i, moments in state.items()}
