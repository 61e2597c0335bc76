"""Connectors: how the states of the encoders reach the decoder. Each is one class, one file and one line here.

To add one: derive from `Connector` (`nn/connecting.py`) and name it in the table, for `--connector`
(tests/test_connectors.py does so). Systems do not depend on the connector. Its module is imported on use: the programs
read their options, and this table, without torch.
"""

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from vqa_scratch.errors import UserError
from vqa_scratch.storage import typed

if TYPE_CHECKING:
    from vqa_scratch.nn.connecting import Connector
    from vqa_scratch.nn.decoding import Decoder
    from vqa_scratch.nn.states import ImageEncoder, TextEncoder

__all__ = ["CONNECTORS", "connect", "connector_class", "connector_sizes"]

CONNECTORS = {  # by name: module and class
    "tokens": ("tokens", "TokensConnector"),
    "mean": ("mean", "MeanConnector"),
    "prefix": ("prefix", "PrefixConnector"),
    "patches": ("patches", "PatchesConnector"),
    "qformer": ("qformer", "QFormerConnector"),
    "resampler": ("resampler", "ResamplerConnector"),
}
OF_SPEECH = {"heard": ("heard", "HeardConnector")}  # which is no --connector: its questions are sounds


def connector_class(kind: str) -> "type[Connector]":
    """The class with this name in the table. Raises UserError for another name."""
    if kind not in CONNECTORS | OF_SPEECH:
        raise UserError(f"there is no connector {kind!r}; there are {', '.join(CONNECTORS)}")
    module, name = (CONNECTORS | OF_SPEECH)[kind]
    return getattr(importlib.import_module(f"vqa_scratch.connectors.{module}"), name)


def connect(
    sizes: dict[str, Any], image: "ImageEncoder", text: "TextEncoder | None", decoder: "Decoder"
) -> "Connector":
    """A connector with random weights between these models; `sizes` has its kind and its keywords.

    Raises UserError if they are those of no connector.
    """
    (name,) = typed("the connector", sizes, {"kind": str})
    kind, rest = connector_class(name), {name: value for name, value in sizes.items() if name != "kind"}
    signature = inspect.signature(kind)
    try:
        signature.bind(image, text, decoder, **rest)
    except TypeError as error:
        raise UserError(f"a connector {name} has other sizes than {', '.join(rest) or 'none'}: {error}") from None
    for size, value in rest.items():
        sides = value if isinstance(value, list | tuple) else [value]
        usual = all(type(side) is int and 0 < side < 10_000 for side in sides)
        if signature.parameters[size].annotation is bool:
            usual = type(value) is bool
        if len(sides) != (2 if size == "grid" else 1) or not usual:
            raise UserError(f"a connector {name} cannot have a {size} of {value!r}")
    return kind(image, text if kind.reads_text else None, decoder, **rest)


def connector_sizes(connector: "Connector") -> dict[str, Any]:
    """The inverse of `connect`: the connector's entry in config.json."""
    (kind,) = (name for name in CONNECTORS | OF_SPEECH if type(connector) is connector_class(name))
    return {"kind": kind, **connector.sizes}
