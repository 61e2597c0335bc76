"""Writes the report: one HTML file with everything in it, which opens from disk without a network.

The page is report.html with report.css, report.js and the data as JSON in it. Arrays are base64: weights as one byte
each with a scale for every row, numbers that are shown in half or single precision. JSON inside <script> is escaped so
that no text can end it, and the page sets every text by `textContent`, so a question is never markup.

Shapes: L layers, H heads, A answer tokens, K keys, d head size.
"""

import base64
import json
import math
from dataclasses import asdict
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqa_scratch.data.image_files import data_url, is_small
from vqa_scratch.study.analysis import attention_names, key_sources
from vqa_scratch.study.base import Source
from vqa_scratch.study.record import Study, rows_of_mask

# Bytes of patterns and of opened heads in one study, before base64: the page stays at a few hundred kB.
OWN_BUDGET, OPENED_BUDGET = 110_000, 170_000
LARGEST_IMAGE = 448  # pixels a side


def packed(tensor: Tensor, kind: str) -> dict[str, Any]:
    """A tensor for the page. "u8": shares of the last axis' maximum, a float scale a row; "f16", "f32": as they are."""
    array = tensor.detach().float().cpu().numpy()
    result: dict[str, Any] = {"kind": kind, "shape": list(array.shape)}
    if kind == "u8":
        scale = np.maximum(array.max(-1, keepdims=True), 1e-12) / 255
        result["scale"] = _base64(scale.astype("<f4").tobytes())
        array = np.rint(array / scale).astype(np.uint8)
    else:
        array = array.astype("<f2" if kind == "f16" else "<f4")
    return result | {"data": _base64(array.tobytes())}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _attention(study: Study, names: list[str], kind: str) -> dict[str, Any]:
    """Patterns (L, H, rows, K) of one kind of attention; if they are large, the row asked first and the mean row alone.

    The attention that reads the sources, "cross", always has one row for each answer token.
    """
    subject, rows, patterns = study.opened.subject, None, list[Tensor]()
    asked = next((source.asked for source in subject.sources if source.name == kind), 0)
    for name in names:
        pattern = study.trace.pattern(name)[0].cpu()
        if kind == "cross":
            pattern = subject.rows(pattern)[:, [token.row for token in study.tokens]]
        elif len(names) * pattern.numel() > OWN_BUDGET:
            pattern = torch.cat([pattern[:, [asked]], pattern.mean(1, keepdim=True)], 1)
            rows = [0, -1]  # -1: the mean over all
        patterns.append(pattern)
    return {"kind": kind, "names": names, "rows": rows, "pattern": packed(torch.stack(patterns), "u8")}


def _heads_in_order(study: Study) -> list[tuple[int, int]]:
    """(layer, head) of the attentions that read the sources, those first that add most to the answer's logits.

    Without a linear head to tell, those that read the image most.
    """
    names = study.opened.subject.reading
    kind = names[0].rpartition(".")[2]
    if study.attributions:
        read = [int(name.split(".")[1]) for name in names]  # the blocks whose layer reads sources
        effect = torch.stack([a.heads[kind][read] for a in study.attributions]).abs().amax(0)  # (L, H)
    else:
        effect = torch.tensor([[h.image for h in study.heads if h.name == name] for name in names])
    return [divmod(i, effect.shape[1]) for i in effect.flatten().argsort(descending=True, stable=True).tolist()]


def _opened_heads(study: Study, order: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """The numbers behind the heads that read the sources, in this order, as many as fit the budget."""
    result: list[dict[str, Any]] = []
    spent, subject, t = 0, study.opened.subject, study.trace
    for layer, head in order:
        name = subject.reading[layer]
        q, k, v, z = (t[f"{name}.{label}"][0].float().cpu() for label in ("q", "k", "v", "z"))
        mask = rows_of_mask(t, name)[0].float().cpu().expand(len(q), -1, -1)
        rows = [token.row for token in study.tokens]
        q, z, mask = (subject.rows(x)[head, rows] for x in (q, z, mask))  # (A, d), (A, d), (A, K)
        k, v, lse = k[head], v[head], subject.rows(t.lse(name)[0].cpu()[..., None])[head, rows, 0]
        spent += 2 * (q.numel() + k.numel() + v.numel() + z.numel()) + 8 * len(q) * len(k)
        if result and spent > OPENED_BUDGET:
            break
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
                "mask": packed(mask.masked_fill(mask == -math.inf, -1e30), "f32"),
                "lse": packed(lse, "f32"),
            }
        )
    return result


def _attentions(study: Study) -> dict[str, Any]:
    """The attentions on the page: "cross", which reads the sources; those inside a source; the writer's own."""
    subject, names = study.opened.subject, attention_names(study.opened.subject)
    result = {"cross": _attention(study, subject.reading, "cross")}
    for source in subject.sources:
        if source.attentions and source.reads is None:
            result[source.name] = _attention(study, names[source.name], source.name)
    own = subject.self_attentions
    if own and not subject.prefix:
        result["decoder"] = _attention(study, own, "decoder")
    elif _way(study) == "stream":  # of sources of several kinds, or the tower of an image
        kind = "image" if subject.writer == "image" else "stream"
        result[kind] = _attention(study, own, kind)
    return result


def _way(study: Study) -> str:
    """How the writer reads the sources: "cross", "prefix", or "stream" where they are all of its sequence."""
    if not study.opened.subject.prefix:
        return "cross"
    return "prefix" if study.flows["cross"].decoder.numel() else "stream"


def _source(source: Source) -> dict[str, Any]:
    places = {} if source.places is None else source.places._asdict()
    about = {"sinks": source.sinks, "image": source.of_image, "asked": source.asked}
    return {"name": source.name, "labels": source.labels, **about, **places}


def study_data(study: Study) -> dict[str, Any]:
    """One study as the page reads it."""
    opened, subject = study.opened, study.opened.subject
    made, order = key_sources(subject, study.trace), _heads_in_order(study)
    whole = bool((subject.mixing.amax(1) == 1).all())  # every key is one source token, which gives it its name
    return {
        "run": opened.run,
        "text": opened.text,
        "image": None if opened.image is None else data_url(opened.image, LARGEST_IMAGE),
        "size": None if opened.image is None else opened.image.size,  # (width, height) in the pixels of places
        "pixelated": opened.image is not None and is_small(opened.image),
        "sources": [_source(source) for source in subject.sources],
        "way": _way(study),
        "measure": subject.measure,
        "keys": subject.mixing.argmax(1).tolist() if whole else None,
        "mixing": None if whole and torch.equal(made, subject.mixing) else packed(made, "f32"),
        "read": study.read,
        "answer": {"text": study.answer, "probability": study.probability, "ends": subject.end_ids},
        "tokens": [asdict(token) for token in study.tokens],
        "flows": {
            name: {"sources": packed(flow.sources, "f32"), "decoder": packed(flow.decoder, "f32")}
            for name, flow in study.flows.items()
        },
        "attentions": _attentions(study),
        "best": order[0],
        "opened": _opened_heads(study, order),
        "lens": study.lens,
        "attributions": [
            {"heads": {k: v.tolist() for k, v in a.heads.items()}, "mlps": a.mlps.tolist()}
            | {"embedding": a.embedding, "biases": a.biases}
            for a in study.attributions
        ],
        "experts": [{"name": name, "weights": packed(weights, "f16")} for name, weights in study.experts.items()],
        "heads": [[h.name, h.head, h.entropy, h.image, h.text, h.sink, h.distance] for h in study.heads],
        "certificate": asdict(study.certificate),
    } | opened.more([token.id for token in study.tokens])


def page(studies: list[Study]) -> str:
    """The whole HTML page for one study, or for two side by side."""
    exact = json.dumps([study_data(study) for study in studies])
    # Eight significant digits are all that fp32 has.
    rounded = json.loads(exact, parse_float=lambda digits: float(f"{float(digits):.8g}"))
    data = json.dumps(rounded, separators=(",", ":"))
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
    return Template(folder.joinpath("report.html").read_text(encoding="utf-8")).substitute(parts)
