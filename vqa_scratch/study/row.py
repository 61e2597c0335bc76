"""One row of one head: every number from its query and keys to what it adds to the logit of a token.

Shapes: K keys, d head size.
"""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from vqa_scratch.errors import UserError
from vqa_scratch.study.analysis import every_attention
from vqa_scratch.study.base import Subject
from vqa_scratch.study.lens import is_linear, key_parts, lens_taps, logit_direction
from vqa_scratch.study.names import check_head
from vqa_scratch.study.opened import Opened
from vqa_scratch.study.record import rows_of_mask
from vqa_scratch.study.subject import WritingSubject
from vqa_scratch.study.trace import Trace


def head_row(opened: Opened, name: str, head: int, row: int) -> dict[str, Any]:
    """The numbers of a row of an attention while the subject answers, as JSON; None stands for -inf.

    Row i of a decoder is about the token after its token i, and of any other attention it is token i. "logit" is what
    the head adds to the logit of the token that was chosen there, above the mean logit, key by key ("keys"), which sum
    to "total", of "all"; None where no linear head reads the state, or no token of the answer was chosen. Raises
    UserError for an attention, a head or a row that is not there.
    """
    subject, names = opened.subject, every_attention(opened.subject)
    if name not in names:
        raise UserError(f"no attention is named {name!r}; there are {', '.join(dict.fromkeys(names))}")
    writes = isinstance(subject, WritingSubject) and name.startswith(f"{subject.writer}.")
    taps = lens_taps(subject) if writes and is_linear(subject) else []
    with subject.trace(name, *taps) as t:
        ids = subject.generate()
    module, before = t.modules[name], subject.prefix if writes else 0
    check_head(module, name, head)  # type: ignore[arg-type]  # the name is an attention's
    q, k, v, z = (t[f"{name}.{part}"][0, head].float().cpu() for part in "qkvz")
    if not 0 <= row < len(q) - before:
        raise UserError(f"{name} has rows 0 to {len(q) - before - 1}, not {row}")
    mask = rows_of_mask(t, name)[0, :, before + row].float().cpu()  # (1 or H, K)
    mask, products = mask[head % len(mask)], k @ q[before + row]
    place = row - len(subject.prompt) + 1
    logit = None
    if taps and 0 <= place < len(ids):
        logit = {"label": opened.label(ids[place])} | _logit(subject, t, name, head, row, ids[place])
    return {
        "name": name,
        "head": head,
        "row": row,
        "labels": key_labels(opened, name, len(k), ids),
        "scale": module.scale,
        "q": q[before + row].tolist(),
        "k": k.tolist(),
        "products": products.tolist(),
        "mask": _or_none(mask),
        "scores": _or_none(module.scale * products + mask),
        "weights": t.pattern(name)[0, head, before + row].tolist(),
        "v": v.tolist(),
        "z": z[before + row].tolist(),
        "logit": logit,
        "certificate": asdict(t.certificate(name)),
    }


def _or_none(numbers: Tensor) -> list[float | None]:
    return [None if number == -torch.inf else number for number in numbers.tolist()]


@torch.no_grad()
def _logit(subject: Subject, t: Trace, name: str, head: int, row: int, token: int) -> dict[str, Any]:
    keys = key_parts(subject, t, name, row, logit_direction(subject, t, row, token))[head].tolist()
    state = t[f"{subject.writer}.{subject.layers - 1}.resid_post"][:, [subject.prefix + row]]
    logits = subject.readout(state.to(next(subject.decoder.parameters()).dtype))[0, 0].float()
    return {"token": token, "keys": keys, "total": sum(keys), "all": float(logits[token] - logits.mean())}


def key_labels(opened: Opened, name: str, keys: int, answer: list[int]) -> list[str]:
    """What each key of an attention is: a token of a source or of the writer, or a number if it is made of several."""
    known = [label for source in opened.subject.sources for label in source.labels]
    known += [*opened.prompt, *map(opened.label, answer)]
    shares = opened.subject.shares(name, torch.eye(keys)).tolist()
    return [known[row.index(1.0)] if 1.0 in row else f"key {key}" for key, row in enumerate(shares)]
