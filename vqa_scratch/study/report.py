"""Writes the report: one HTML file with everything in it, which opens from disk without a network.

The page is report.html of the folder page/, with study.css, the modules of page/ joined into one script, and the data
as JSON. Arrays are base64: weights as one byte each with a scale for every row, numbers that are shown in fp32. JSON
inside <script> is escaped so that no text can end it, and the page sets every text by `textContent`: a question is
never markup.

Shapes: L layers, H heads, A answer tokens, K keys.
"""

import json
import re
from dataclasses import asdict
from html import escape
from importlib.resources import files
from importlib.resources.abc import Traversable
from string import Template
from typing import Any

import torch

from vqa_scratch.data.image_files import data_url, is_small
from vqa_scratch.study.activation import activations, has_activations, image_lens
from vqa_scratch.study.analysis import attention_names, key_sources
from vqa_scratch.study.base import Source
from vqa_scratch.study.edits import twins
from vqa_scratch.study.lens import is_linear, logit_direction
from vqa_scratch.study.number import opened_head
from vqa_scratch.study.packing import packed, packed_flow
from vqa_scratch.study.record import Study

# Bytes of patterns and of opened heads in one study, before base64: the page stays at a few hundred kB.
OWN_BUDGET, OPENED_BUDGET = 110_000, 240_000
LARGEST_IMAGE = 448  # pixels a side
IMPORT = re.compile(r'^import .* from "\./(.*)";\n', re.M)  # a line of a module


def _attention(study: Study, names: list[str], kind: str) -> dict[str, Any]:
    """Patterns (L, H, rows, K) of one kind of attention; if they are large, the row asked first and the mean row alone.

    The attention that reads the sources, "cross", always has one row for each answer token.
    """
    subject, rows, patterns = study.opened.subject, None, list[torch.Tensor]()
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


def _opened_heads(study: Study, order: list[tuple[int, int]], budget: int) -> list[dict[str, Any]]:
    """The numbers behind the heads that read the sources, in this order, as many as fit the budget."""
    result: list[dict[str, Any]] = []
    spent, subject, t, rows = 0, study.opened.subject, study.trace, [token.row for token in study.tokens]
    directions = [logit_direction(subject, t, token.row, token.id) for token in study.tokens if is_linear(subject)]
    for layer, head in order:
        found = opened_head(subject, t, layer, head, rows, directions)
        spent += sum(3 * len(x["data"]) // 4 for x in found.values() if isinstance(x, dict))
        if result and spent > budget:
            break
        result.append(found)
    return result


def _words(study: Study) -> dict[str, Any] | None:
    """The words of the keys about the image, by layer; of many layers as many as fit the budget of patterns, evenly."""
    found = image_lens(study.opened.subject, study.trace, study.opened.label)
    if found is None:
        return None
    kept = min(len(found.layers), max(2, OWN_BUDGET // (24 * len(found.sources))))
    chosen = torch.linspace(0, len(found.layers) - 1, kept).round().long().tolist()
    best = [found.best[layer] for layer in chosen]  # [layer][key][3] of (label, probability)
    labels = list(dict.fromkeys(label for layer in best for key in layer for label, _ in key))
    number = {label: i for i, label in enumerate(labels)}
    ids = torch.tensor([[[number[label] for label, _ in key] for key in layer] for layer in best])
    scores = torch.tensor([[[p for _, p in key] for key in layer] for layer in best])
    about = {"kind": found.kind, "layers": [found.layers[layer] for layer in chosen], "sources": found.sources}
    return about | {"labels": labels, "ids": packed(ids, "f32"), "scores": packed(scores, "f32")}


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


def study_data(study: Study, budget: int = OPENED_BUDGET) -> dict[str, Any]:
    """One study as the page reads it, with as many opened heads as fit the bytes of the budget, at least one."""
    opened, subject = study.opened, study.opened.subject
    made, order = key_sources(subject, study.trace), _heads_in_order(study)
    whole = bool((subject.mixing.amax(1) == 1).all())  # every key is one source token, which gives it its name
    maps = dict(study.flows)
    if has_activations(subject):
        maps["activation"] = activations(subject, study.trace, [token.id for token in study.tokens]).flow
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
        "writer": subject.writer,
        "read": study.read,
        "prompt": len(opened.prompt),
        "twins": twins(opened),
        "edits": [change.about for change in subject.changes],
        "answer": {"text": study.answer, "probability": study.probability, "ends": subject.end_ids},
        "tokens": [asdict(token) for token in study.tokens],
        "flows": {name: packed_flow(flow) for name, flow in maps.items()},
        "attentions": _attentions(study),
        "best": order[0],
        "opened": _opened_heads(study, order, budget),
        "words": _words(study),
        "lens": study.lens,
        "attributions": [
            {"heads": {k: v.tolist() for k, v in a.heads.items()}, "mlps": a.mlps.tolist()}
            | {"embedding": a.embedding, "biases": a.biases}
            for a in study.attributions
        ],
        "experts": [{"name": name, "weights": packed(weights, "f32")} for name, weights in study.experts.items()],
        "heads": [[h.name, h.head, h.entropy, h.image, h.text, h.sink, h.distance] for h in study.heads],
        "certificate": asdict(study.certificate),
    } | opened.more([token.id for token in study.tokens])


def joined(folder: Traversable, entry: str) -> str:
    """The module `entry` and all that it reads as one script, since a page from disk may load no module.

    Each comes after those that it reads. They share one scope, so no two may have a name of their own in common.
    """
    done: dict[str, str] = {}

    def add(name: str) -> None:
        if name in done:
            return
        text = folder.joinpath(name).read_text(encoding="utf-8")
        done[name] = ""  # being read: a circle would not end
        for other in IMPORT.findall(text):
            add(other)
        del done[name]
        done[name] = re.sub(r"^export ", "", IMPORT.sub("", text), flags=re.M)

    add(entry)
    return '"use strict";\n{\n' + "\n".join(done.values()) + "}"


def page(studies: list[Study]) -> str:
    """The whole HTML page for one study, or for two side by side."""
    exact = json.dumps([study_data(study) for study in studies])
    # Eight significant digits are all that fp32 has.
    rounded = json.loads(exact, parse_float=lambda digits: float(f"{float(digits):.8g}"))
    data = json.dumps(rounded, separators=(",", ":"))
    for character in "<>&":  # so that no text can close the <script> or open another
        data = data.replace(character, f"\\u{ord(character):04x}")
    folder = files("vqa_scratch.study").joinpath("page")
    parts = {
        "TITLE": escape(f"Attention: {studies[0].opened.text[:80]}"),
        "STYLE": folder.joinpath("study.css").read_text(encoding="utf-8"),
        "SCRIPT": joined(folder, "report.js"),
        "ANSWER": escape(" / ".join(study.answer for study in studies)),
        "TEXT": escape(studies[0].opened.text),
        "DATA": data,
    }
    return Template(folder.joinpath("report.html").read_text(encoding="utf-8")).substitute(parts)
