"""Between a checkpoint and a model: config.json by tables of field names, weights by key maps.

A family is a config (`HFConfig`), a table of layouts with a line for each `model_type`, and a model (`Released`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, ClassVar, Self

from torch import Tensor

from vqa_scratch.errors import UserError
from vqa_scratch.nn.layers import ACTIVATIONS
from vqa_scratch.weights.convert import load_into, to_hf
from vqa_scratch.weights.files import read_checkpoint, write_checkpoint
from vqa_scratch.weights.maps import KeyMap


@dataclass(frozen=True, eq=False)
class Layout:
    """How the checkpoints of one `model_type` are laid out."""

    architecture: str  # the class in `transformers` that reads what we write
    fields: Mapping[str, str]  # our config field: the one in config.json
    key_map: KeyMap
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what the family means by leaving a field out
    fixed: Mapping[str, Any] = field(default_factory=dict)  # options of theirs, with the only value that we have


class HFConfig:
    """A config whose field `layout` is one of `LAYOUTS`; a base of frozen dataclasses."""

    LAYOUTS: ClassVar[Mapping[str, Layout]]
    layout: str

    @property
    def family(self) -> Layout:
        """How checkpoints of this config are laid out. Raises UserError for an unknown layout."""
        if self.layout not in self.LAYOUTS:
            raise UserError(f"layout must be one of {', '.join(self.LAYOUTS)}, got {self.layout!r}")
        return self.LAYOUTS[self.layout]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """From the content of a config.json. Raises UserError if it asks for something this model is not."""
        kind = config.get("model_type")
        if kind not in cls.LAYOUTS:
            raise UserError(f"config.json describes a model of type {kind!r}, expected {', '.join(cls.LAYOUTS)}")
        layout = cls.LAYOUTS[kind]
        for name, value in layout.fixed.items():
            if config.get(name) not in (None, value):
                raise UserError(f"config.json asks for {name} = {config[name]!r}; here it can only be {value!r}")
        return cls(layout=kind, **{**layout.defaults, **fields_from_hf(config, layout.fields, kind)})

    def to_hf(self) -> dict[str, Any]:
        """The inverse of `from_hf`."""
        fields = {theirs: getattr(self, ours) for ours, theirs in self.family.fields.items()}
        return {"architectures": [self.family.architecture], "model_type": self.layout, **fields}


class Released:
    """A model that is built from an `HFConfig` and reads and writes its checkpoints; a base beside `nn.Module`."""

    config_class: ClassVar[type[HFConfig]]
    config: HFConfig

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], tensors: dict[str, Tensor], source: str) -> Self:
        """From what `read_checkpoint` gives, in eval mode. Raises UserError, naming `source`, if it does not fit."""
        model = cls(cls.config_class.from_hf(config))
        load_into(model, tensors, model.config.family.key_map, source=source)
        return model.eval()

    @classmethod
    def from_pretrained(cls, source: str | PathLike[str]) -> Self:
        """From a checkpoint folder or Hub id, in eval mode. Raises UserError when something does not fit."""
        return cls.from_checkpoint(*read_checkpoint(source), str(source))

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """config.json and model.safetensors that `from_pretrained` and `transformers` read.

        Raises ValueError for a parameter that the layout has no place for, as a ViT's own `patch_embed`.
        """
        write_checkpoint(folder, self.config.to_hf(), to_hf(self, self.config.family.key_map))


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
