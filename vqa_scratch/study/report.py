"""The report: one HTML file that holds everything, opens from disk and asks no network.

The page is report.html with report.css, report.js and the data as JSON in it. Arrays travel as base64: weights as one
byte each with a scale for every row, what is shown in numbers as half or single precision. JSON inside <script> is
escaped so that no text can end it, and the page sets every text by `textContent`, so a question is never markup.

Shapes: L layers, H heads, T decoder tokens, A answer tokens, K keys, S source tokens, d head size.
"""

import base64
import io
import json
import math
import re
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqa_scratch.study.analysis import attention_names
from vqa_scratch.study.record import Study

# Bytes of patterns and of opened heads in one study, before base64: the page stays at a few hundred kB.
OWN_BUDGET, OPENED_BUDGET = 110_000, 170_000
LARGEST_IMAGE = 448  # pixels a side


def packed(tensor: Tensor, kind: str) -> dict[str, Any]:
    """A tensor for the page. "u8": shares of the last axis' maximum, a float scale a row; "f16", "f32": as they are."""
    array = tensor.detach().float().cpu().numpy()
    result: dict[str, Any] = {"kind": kind, "shape": list(array.shape)}
    if kind == "u8":
        scale = np.maximum(array.max(-1, keepdims=True), 1e-12) / 255
        result["scale"] = _base64(scale.astype("<f4"))
        array = np.rint(array / scale).astype(np.uint8)
    else:
        array = array.astype("<f2" if kind == "f16" else "<f4")
    return result | {"data": _base64(array)}


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def _image_url(image: Image.Image) -> str:
    """A data URL: PNG for small drawings, JPEG for photographs."""
    image = image.copy()
    image.thumbnail((LARGEST_IMAGE, LARGEST_IMAGE))
    small = max(image.size) <= 128
    buffer = io.BytesIO()
    image.save(buffer, **({"format": "PNG", "optimize": True} if small else {"format": "JPEG", "quality": 88}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _attention(study: Study, names: list[str], kind: str) -> dict[str, Any]:
    """Patterns (L, H, rows, K) of one kind of attention; of large ones only the first row and the mean row.

    Cross-attention has one row an answer token, in whatever size.
    """
    patterns = torch.stack([study.trace.pattern(name)[0].cpu() for name in names])
    rows: list[int] | None = None
    if kind == "cross":
        patterns = patterns[:, :, [token.row for token in study.tokens]]
    elif patterns.numel() > OWN_BUDGET:
        patterns = torch.cat([patterns[:, :, :1], patterns.mean(2, keepdim=True)], 2)
        rows = [0, -1]  # -1: the mean over all
    return {"kind": kind, "names": names, "rows": rows, "pattern": packed(patterns, "u8")}


def _opened_heads(study: Study, names: list[str]) -> list[dict[str, Any]]:
    """The numbers behind cross-attention heads, as many as the budget holds, those that give the answer most first."""
    effect = torch.stack([a.cross_heads for a in study.attributions]).abs().amax(0)  # (L, H)
    order = [divmod(i, effect.shape[1]) for i in effect.flatten().argsort(descending=True).tolist()]
    result, spent = [], 0
    for layer, head in order:
        name, t = names[layer], study.trace
        q, k, v, z, mask = (t[f"{name}.{label}"].float().cpu() for label in ("q", "k", "v", "z", "mask"))
        rows = [token.row for token in study.tokens]
        q, k, v, z = q[0, head, rows], k[0, head], v[0, head], z[0, head, rows]  # (A, d), (K, d), (K, d), (A, d)
        spent += 2 * (q.numel() + k.numel() + v.numel() + z.numel()) + 4 * len(q) * len(k)
        if result and spent > OPENED_BUDGET:
            break
        mask = mask.expand(1, effect.shape[1], 1, -1)[0, head, 0]
        blocked = mask == -math.inf
        result.append(
            {
                "layer": layer,
                "head": head,
                "scale": t.modules[name].scale,
                "q": packed(q, "f16"),
                "k": packed(k, "f16"),
                "v": packed(v, "f16"),
                "z": packed(z, "f32"),
                "dots": packed(q @ k.T, "f32"),
                "mask": packed(mask.masked_fill(blocked, -1e30), "f32"),
                "lse": packed(t.lse(name)[0, head, rows], "f32"),
            }
        )
    return result


def study_data(study: Study) -> dict[str, Any]:
    """One study as the page reads it."""
    opened, subject = study.opened, study.opened.subject
    names = attention_names(subject)
    decoder = {kind: [n for n in names["decoder"] if n.endswith(kind)] for kind in ("self", "cross")}
    attentions = {"cross": _attention(study, decoder["cross"], "cross")}
    for source in subject.sources:
        attentions[source.tower] = _attention(study, names[source.tower], source.tower)
    attentions["decoder"] = _attention(study, decoder["self"], "decoder")
    plain = torch.equal(subject.mixing, torch.eye(len(subject.mixing)))
    return {
        "run": opened.run,
        "text": opened.text,
        "image": None if opened.image is None else _image_url(opened.image),
        "pixelated": opened.image is not None and max(opened.image.size) <= 128,
        "sources": [{"tower": s.tower, "labels": s.labels, "sinks": s.sinks, "grid": s.grid} for s in subject.sources],
        "mixing": None if plain else packed(subject.mixing, "f32"),
        "read": study.read,
        "answer": {"text": study.answer, "probability": study.probability, "end": subject.end_id},
        "tokens": [
            {"id": token.id, "label": token.label, "probability": token.probability, "row": token.row}
            for token in study.tokens
        ],
        "flows": {
            name: {"sources": packed(flow.sources, "f32"), "decoder": packed(flow.decoder, "f32")}
            for name, flow in study.flows.items()
        },
        "attentions": attentions,
        "opened": _opened_heads(study, decoder["cross"]),
        "lens": study.lens,
        "attributions": [
            {
                "self": a.self_heads.tolist(),
                "cross": a.cross_heads.tolist(),
                "mlps": a.mlps.tolist(),
                "embedding": a.embedding,
                "biases": a.biases,
            }
            for a in study.attributions
        ],
        "heads": [[h.name, h.head, h.entropy, h.image, h.text, h.sink, h.distance] for h in study.heads],
        "certificate": study.certificate.as_dict(),
    }


def _rounded(value: Any) -> Any:
    """Floats at eight significant digits, all that fp32 has: what a page of a few hundred kB can afford."""
    if isinstance(value, float):
        return float(f"{value:.8g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def page(studies: list[Study]) -> str:
    """The whole HTML page for one study, or for two side by side."""
    data = json.dumps(_rounded([study_data(study) for study in studies]), separators=(",", ":"), ensure_ascii=True)
    for character in "<>&":  # so that no text can close the <script> or open another
        data = data.replace(character, f"\\u{ord(character):04x}")
    folder = files("vqa_scratch.study")
    parts = {
        "TITLE": escape(f"Attention: {studies[0].opened.text[:80]}"),
        "STYLE": folder.joinpath("report.css").read_text(encoding="utf-8"),
        "SCRIPT": folder.joinpath("report.js").read_text(encoding="utf-8"),
        "ANSWER": escape(" / ".join(study.answer for study in studies)),
        "TEXT": escape(studies[0].opened.text),
        "DATA": data,
    }
    template = folder.joinpath("report.html").read_text(encoding="utf-8")
    # One pass: what is put in is not looked at again, whatever braces a question may hold.
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda mark: parts[mark[1]], template)
