"""The figures of one head that reads the sources, from q and k to what it adds to the logit of each answer token.

Shapes: A answer tokens, K keys, d head size, D width.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vqa_scratch.errors import UserError
from vqa_scratch.study.base import Subject
from vqa_scratch.study.lens import gate_of, is_linear, lens_taps, logit_direction
from vqa_scratch.study.names import attention_at, check_head
from vqa_scratch.study.opened import Opened
from vqa_scratch.study.packing import packed
from vqa_scratch.study.record import rows_of_mask
from vqa_scratch.study.trace import Trace

SHOWN = 8  # dimensions of the state that a page shows


@torch.no_grad()
def opened_head(
    subject: Subject, t: Trace, layer: int, head: int, rows: list[int], directions: Sequence[Tensor]
) -> dict[str, Any]:
    """The numbers of head `head` of the `layer`th attention that reads the sources, packed for the page.

    Of a generation whose A tokens were written at `rows`, with the `logit_direction` of each, or none without a linear
    head.

    q (A, d), k and v (K, d), z (A, d), dots and mask (A, K), lse (A,), as they ran. `out` has for each answer token the
    `dims` of the state to which the head adds most: the `values` added, what one unit there is `worth` to the token's
    logit, and the `total` over all dimensions; without directions only dims and values. `projection` (A, d) is the row
    of the output projection of the first of these dimensions.
    """
    name = subject.reading[layer]
    q, k, v, z = (t[f"{name}.{label}"][0].float().cpu() for label in ("q", "k", "v", "z"))
    mask = rows_of_mask(t, name)[0].float().cpu().expand(len(q), -1, -1)
    q, z, mask = (subject.rows(x)[head, rows] for x in (q, z, mask))
    k, v, lse = k[head], v[head], subject.rows(t.lse(name)[0].cpu()[..., None])[head, rows, 0]
    module = attention_at(t.modules, name)
    weight = module.out.weight.float().unflatten(1, (module.heads, module.head_dim))[:, head]  # (D, d)
    weight = (gate_of(subject, name) * weight.T).T.cpu()
    out = [_largest(z[i] @ weight.T, directions[i].cpu() if directions else None) for i in range(len(z))]
    return {
        "layer": layer,
        "head": head,
        "scale": module.scale,
        **{label: packed(x, "f32") for label, x in (("q", q), ("k", k), ("v", v), ("z", z), ("dots", q @ k.T))},
        "mask": packed(mask.masked_fill(mask == -math.inf, -1e30), "f32"),
        "lse": packed(lse, "f32"),
        "out": out,
        "projection": packed(weight[[of_token["dims"][0] for of_token in out]], "f32"),
    }


def head_of(opened: Opened, name: str, head: int) -> dict[str, Any]:
    """`opened_head` of a new answer. Raises UserError for an attention that reads no source, or a head it lacks."""
    subject, first, linear = opened.subject, len(opened.subject.prompt) - 1, is_linear(opened.subject)
    with subject.trace(name, *(lens_taps(subject) if linear else ())) as t:
        ids = subject.generate()
    if name not in subject.reading:
        raise UserError(f"{name} reads no source; {', '.join(subject.reading)} do")
    check_head(attention_at(t.modules, name), name, head)
    rows = [first + place for place in range(len(ids))]
    told = [logit_direction(subject, t, row, token) for row, token in zip(rows, ids, strict=True) if linear]
    return opened_head(subject, t, subject.reading.index(name), head, rows, told)


def _largest(added: Tensor, direction: Tensor | None) -> dict[str, Any]:
    """The dimensions that matter most of what was added (D,) to a state."""
    products = added if direction is None else added * direction
    dims = products.abs().topk(min(SHOWN, len(products))).indices
    result = {"dims": dims.tolist(), "values": added[dims].tolist()}
    return result if direction is None else result | {"worth": direction[dims].tolist(), "total": float(products.sum())}
