"""Arrays for a page: base64 in JSON."""

import base64
from typing import Any

import numpy as np
from torch import Tensor

from vqa_scratch.study.base import Flow


def packed(tensor: Tensor, kind: str) -> dict[str, Any]:
    """A tensor for the page. "u8": shares of the last axis' maximum, a float scale a row; "f32": as it is."""
    array = tensor.detach().float().cpu().numpy()
    result: dict[str, Any] = {"kind": kind, "shape": list(array.shape)}
    if kind == "u8":
        scale = np.maximum(array.max(-1, keepdims=True), 1e-12) / 255
        result["scale"] = _base64(scale.astype("<f4").tobytes())
        array = np.rint(array / scale).astype(np.uint8)
    else:
        array = array.astype("<f4")
    return result | {"data": _base64(array.tobytes())}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def packed_flow(flow: Flow) -> dict[str, Any]:
    """A map for the page."""
    return {"sources": packed(flow.sources, "f32"), "decoder": packed(flow.decoder, "f32")}
