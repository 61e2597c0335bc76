"""Translate between our config fields and those of a checkpoint's config.json, by a table of names."""

from collections.abc import Mapping
from typing import Any

from vqa_scratch.errors import UserError
from vqa_scratch.nn.layers import ACTIVATIONS


def fields_from_hf(hf: Mapping[str, Any], names: Mapping[str, str], model_type: str) -> dict[str, Any]:
    """Our fields out of a config.json: `names` maps ours to theirs; what the file omits keeps our default.

    Raises UserError if the file describes another kind of model or an activation we do not have.
    """
    found = hf.get("model_type")
    if found != model_type:
        raise UserError(f"config.json describes a model of type {found!r}, expected {model_type!r}")
    fields = {ours: hf[theirs] for ours, theirs in names.items() if hf.get(theirs) is not None}
    if fields.get("activation", "gelu") not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(f"config.json asks for activation {fields['activation']!r}; known: {known}")
    return fields


def labels_from_hf(hf: Mapping[str, Any], classes: int, source: str) -> tuple[str, ...]:
    """The names of `classes` classes in the order of the logits; LABEL_0, LABEL_1, ... where the file has none.

    Raises UserError, naming `source`, if the file names other classes than the head has.
    """
    names = hf.get("id2label") or {str(i): f"LABEL_{i}" for i in range(classes)}
    try:
        return tuple(str(names[str(i)]) for i in range(classes))
    except KeyError as error:
        raise UserError(f"id2label in {source} names {len(names)} classes, the head has {classes}") from error


def labels_to_hf(labels: tuple[str, ...]) -> dict[str, Any]:
    """The inverse of `labels_from_hf`: what a config.json says of the classes."""
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def check_heads(dim: int, heads: int) -> None:
    """Raises UserError unless the width divides into the heads."""
    if heads < 1 or dim % heads:
        raise UserError(f"width {dim} does not divide into {heads} heads")
