"""Load models from released checkpoints and save them: tables of field names for config.json, key maps for weights.

A family is a config (`HFConfig`), a table of layouts with a line for each `model_type`, and a model (`Released`).
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from vqa_scratch.errors import UserError, naming
from vqa_scratch.nn import taps
from vqa_scratch.nn.decoding import Decoder
from vqa_scratch.nn.gated_cross import GatedCrossAttention
from vqa_scratch.nn.layers import ACTIVATIONS
from vqa_scratch.options import types_of
from vqa_scratch.storage import typed
from vqa_scratch.weights.convert import load_into, to_hf
from vqa_scratch.weights.files import read_checkpoint, write_checkpoint
from vqa_scratch.weights.maps import KeyMap

MOST_LAYERS, LARGEST = 1_000, 2**24  # of any layers or experts, size or id that a config.json may ask for


@dataclass(frozen=True, eq=False)
class Layout:
    """How the checkpoints of one `model_type` are laid out."""

    architecture: str  # the class in `transformers` that reads what we write; "" if there is none
    fields: Mapping[str, str]  # our config field: the one in config.json
    key_map: KeyMap = KeyMap(())  # empty where it depends on the sizes and the config makes it
    defaults: Mapping[str, Any] = field(default_factory=dict)  # our fields: values where config.json has none
    fixed: Mapping[str, Any] = field(default_factory=dict)  # fields in config.json: the only value we support
    lists: Mapping[str, str] = field(default_factory=dict)  # as `fields`, those that list sizes


L = TypeVar("L", bound=Layout)


class HFConfig(Generic[L]):
    """A config whose field `layout` is one of `LAYOUTS`; a base of frozen dataclasses."""

    LAYOUTS: ClassVar[Mapping[str, Any]]
    layout: str

    @property
    def family(self) -> L:
        """How checkpoints of this config are laid out. Raises UserError for an unknown layout."""
        if self.layout not in self.LAYOUTS:
            raise UserError(f"layout must be one of {', '.join(self.LAYOUTS)}, got {self.layout!r}")
        return self.LAYOUTS[self.layout]

    @property
    def key_map(self) -> KeyMap:
        """Where each parameter is in a checkpoint."""
        return self.family.key_map

    @classmethod
    def layout_in(cls, config: Mapping[str, Any]) -> str:
        """The layout that a config.json names. Raises UserError if it is none of `LAYOUTS`."""
        (kind,) = typed("config.json", config, {"model_type": str | None})
        if kind not in cls.LAYOUTS:
            raise UserError(f"config.json describes a model of type {kind!r}, expected {', '.join(cls.LAYOUTS)}")
        return kind

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """From the content of a config.json. Raises UserError if it asks for something this model does not support."""
        kind = cls.layout_in(config)
        layout = cls.LAYOUTS[kind]
        for name, value in layout.fixed.items():
            if config.get(name) not in (None, value):
                raise UserError(f"config.json asks for {name} = {config[name]!r}; here it can only be {value!r}")
        found = fields_from_hf(config, layout.fields, cls)
        found |= {ours: sizes_in(config, theirs, getattr(cls, ours)) for ours, theirs in layout.lists.items()}
        return cls(**{"layout": kind, **layout.defaults, **found, **cls.further_fields(config)})

    @classmethod
    def further_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our fields that are not copies of one in config.json."""
        return {}

    def to_hf(self) -> dict[str, Any]:
        """The inverse of `from_hf`."""
        layout = self.family
        fields = {theirs: getattr(self, ours) for ours, theirs in {**layout.fields, **layout.lists}.items()}
        return {"architectures": [layout.architecture], "model_type": self.layout, **fields}


class Config(Protocol):
    """What a released model asks of its config."""

    @property
    def key_map(self) -> KeyMap: ...

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self: ...

    def to_hf(self) -> dict[str, Any]: ...


C = TypeVar("C", bound=Config)


class Released(nn.Module, Generic[C]):
    """A model that loads and saves released checkpoints."""

    config_class: type[C]
    config: C

    @property
    def key_map(self) -> KeyMap:
        """Where each parameter is in a checkpoint."""
        return self.config.key_map

    def to_hf(self) -> dict[str, Any]:
        """The content of config.json."""
        return self.config.to_hf()

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], tensors: dict[str, Tensor], source: str) -> Self:
        """From what `read_checkpoint` gives, in eval mode. Raises UserError, naming `source`, if it does not fit."""
        model = cls(cls.config_class.from_hf(config))
        load_into(model, tensors, model.key_map, source=source)
        return model.eval()

    @classmethod
    def from_pretrained(cls, source: str | PathLike[str], **options: Any) -> Self:
        """From a checkpoint folder or Hub id, with the options of `from_checkpoint`."""
        with naming(source):
            return cls.from_checkpoint(*read_checkpoint(source), str(source), **options)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write config.json and model.safetensors, as `from_pretrained` and `transformers` read them.

        Raises ValueError for a parameter that the layout does not have, such as another `patch_embed` of a ViT.
        """
        write_checkpoint(folder, self.to_hf(), to_hf(self, self.key_map))


class ReleasedDecoder(Released[C], Decoder):
    """A decoder of released checkpoints, with what else systems and study ask of it."""

    blocks: nn.ModuleList
    norm: nn.Module  # after the last block

    reads_memory: bool = False  # whether it was built with cross-attention, or has gated layers

    @torch.no_grad()
    def open_gates(self, value: float) -> None:
        """Open the gates of the gated layers, if there are any: closed ones protect what a decoder has learned."""
        for layer in (getattr(block, "gated", None) for block in self.blocks):
            if layer is not None:
                layer.cross_gate.fill_(value)
                layer.mlp_gate.fill_(value)

    def take_gated(self) -> dict[int, GatedCrossAttention]:
        """Take the layers away again that `add_gated` put in, which gives the decoder that they were added to."""
        found = ((number, getattr(block, "gated", None)) for number, block in enumerate(self.blocks))
        layers = {number: layer for number, layer in found if layer is not None}
        for number in layers:
            setattr(self.blocks[number], "gated", None)  # noqa: B010 (the list says only that it has modules)
            self.reads_memory = False
        return layers

    def add_gated(self, layers: Mapping[int, GatedCrossAttention]) -> None:
        """Put each layer before the block with its number.

        They read what `hidden` gets as `memory`; without one the decoder is what it was before. Their parameters are
        `blocks.N.gated.*`: those of the decoder, but new, so `VQAModel.freeze` leaves them trainable. Raises ValueError
        for a decoder with cross-attention of its own, and for a number that is none of a block.
        """
        if layers and getattr(self.config, "add_cross_attention", False):
            raise ValueError("the blocks of this decoder have cross-attention; gated layers are for one without")
        for number, layer in layers.items():
            if not 0 <= number < len(self.blocks):
                raise ValueError(f"a gated layer before block {number}, but the blocks are 0 to {len(self.blocks) - 1}")
            self.blocks[number].gated = layer
            self.reads_memory = True
        taps.name_modules(self.blocks, "decoder")


def fields_of(config: Any, kind: type, part: str = "") -> dict[str, Any]:
    """The fields of a config that one of another kind has too, but for the layout; with a `part`, such as "encoder",
    also those that begin with its name, without it."""
    names = {item.name for item in dataclasses.fields(kind)} - {"layout"}
    own = {name.removeprefix(f"{part}_"): value for name, value in vars(config).items()}
    return {name: value for name, value in own.items() if name in names}


def fields_from_hf(hf: Mapping[str, Any], names: Mapping[str, str], config_class: type) -> dict[str, Any]:
    """Fields of `config_class` from a config.json: `names` maps ours to theirs; a field not in the file keeps our
    default.

    Raises UserError for a value that has not the type of our field or cannot be one, and for an activation we do not
    have.
    """
    kinds = types_of(config_class)
    defaults = {item.name: item.default for item in dataclasses.fields(config_class)}
    given = {ours: theirs for ours, theirs in names.items() if hf.get(theirs) is not None}
    fields = {
        ours: _checked(f"config.json: {theirs}", hf[theirs], ours, kinds[ours], defaults[ours])
        for ours, theirs in given.items()
    }
    if fields.get("activation", "gelu") not in ACTIVATIONS:
        raise UserError(f"config.json asks for activation {fields['activation']!r}; known: {', '.join(ACTIVATIONS)}")
    return fields


def _checked(where: str, value: Any, ours: str, kinds: tuple[Any, ...], default: Any) -> Any:
    """The value of our field `ours`, whose types are `kinds`; UserError unless it has one of them and a usual size."""
    if bool in kinds or str in kinds:
        (kind,) = {bool, str} & set(kinds)
        if not isinstance(value, kind):
            raise UserError(f"{where} must be {'true or false' if kind is bool else 'a text'}, not {value!r}")
        return value
    if float in kinds:
        most = 1 if "dropout" in ours else 10_000
        if not is_number(value) or not 0 <= value < most:
            raise UserError(f"{where} must be a number from 0 to below {most:,}, not {value!r}")
        return float(value)
    (counts,) = [typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is tuple] or [()]
    any_number = Ellipsis in counts  # of ids; else height and width
    several = isinstance(value, (list, tuple)) and (len(value) > 0 if any_number else len(value) == len(counts) > 0)
    numbers = value if several else [value]
    least = 0 if default == 0 or ours.endswith("_id") else 1
    most = MOST_LAYERS if ours.endswith(("layers", "experts")) else LARGEST
    if not all(is_number(one) and one == int(one) and least <= one <= most for one in numbers):
        or_list = ", or a list of such" if any_number else ""
        raise UserError(f"{where} must be a whole number from {least} to {most:,}{or_list}, not {value!r}")
    return tuple(map(int, numbers)) if len(numbers) > 1 else int(numbers[0])


def sizes_in(config: Mapping[str, Any], name: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The sizes that a config.json lists under `name`. Raises UserError for anything but a list of whole numbers."""
    value = config.get(name, default)
    good = isinstance(value, (list, tuple)) and all(is_number(n) and 1 <= n == int(n) <= LARGEST for n in value)
    if not good or not value:
        raise UserError(f"config.json: {name} must list whole numbers from 1 to {LARGEST:,}, not {value!r}")
    return tuple(map(int, value))


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def labels_from_hf(hf: Mapping[str, Any], classes: int, source: str) -> tuple[str, ...]:
    """The names of `classes` classes in the order of the logits; LABEL_0, LABEL_1, ... where the file has none.

    Raises UserError, naming `source`, if the file does not name every class of the head.
    """
    (named,) = typed(source, hf, {"id2label": dict | None})
    names = named or {str(i): f"LABEL_{i}" for i in range(classes)}
    try:
        return tuple(str(names[str(i)]) for i in range(classes))
    except KeyError as error:
        raise UserError(f"id2label in {source} names {len(names)} classes, the head has {classes}") from error


def labels_to_hf(labels: tuple[str, ...]) -> dict[str, Any]:
    """The fields of config.json that name the classes, the inverse of `labels_from_hf`."""
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def check_heads(dim: int, heads: int) -> None:
    """Raises UserError unless the width divides into the heads."""
    if heads < 1 or dim % heads:
        raise UserError(f"width {dim} does not divide into {heads} heads")
