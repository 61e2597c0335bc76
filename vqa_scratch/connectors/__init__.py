"""Connectors: how the states of the encoders reach the decoder. One connector, one class, one file, one line here.

To add one: derive from `Connector`, and give it a name in the table. No system knows which connector it has.
"""

from typing import Any

from torch import nn

from vqa_scratch.connectors.base import Conditioning, Connector
from vqa_scratch.connectors.mean import MeanConnector
from vqa_scratch.connectors.prefix import PrefixConnector
from vqa_scratch.connectors.qformer import QFormerConnector
from vqa_scratch.connectors.tokens import TokensConnector

__all__ = ["CONNECTORS", "Conditioning", "Connector", "connect", "connector_sizes"]

CONNECTORS: dict[str, type[Connector]] = {
    "tokens": TokensConnector,
    "mean": MeanConnector,
    "prefix": PrefixConnector,
    "qformer": QFormerConnector,
}


def connect(sizes: dict[str, Any], image: nn.Module, text: nn.Module | None, decoder: nn.Module) -> Connector:
    """A connector of random weights between these models; `sizes` name its kind and what else it takes."""
    kind = CONNECTORS[sizes["kind"]]
    rest = {name: value for name, value in sizes.items() if name != "kind"}
    return kind(image, text if kind.reads_text else None, decoder, **rest)


def connector_sizes(connector: Connector) -> dict[str, Any]:
    """The inverse of `connect`: what config.json says of a connector."""
    (kind,) = (name for name, known in CONNECTORS.items() if type(connector) is known)
    return {"kind": kind, **connector.sizes}
