"""Changes to a model as data: a JSON object says what is changed, and becomes a `Change` of a subject.

    {"kind": "head", "name": "decoder.3.cross", "head": 2, "scale": 0}          what a head reads, times a number
    {"kind": "layer", "name": "decoder.3.cross"}                                an attention, MLP or block adds nothing
    {"kind": "source", "source": "image", "token": 17}                          no attention may look at this token
    {"kind": "key", "key": 17}                                                  the writer may not read this key
    {"kind": "patch", "name": "decoder.3.cross.z", "head": null, "from": ...}   what it is for another input

A token that is hidden has the score -inf in every attention that could read it: inside its encoder, in learned queries,
and where the writer reads. What is left of the weights sums to 1 again. Its own state is still computed, but nobody
reads it. Where the question stands in the writer's prompt too, a word is hidden there with its copy.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vqa_scratch.errors import UserError
from vqa_scratch.storage import typed
from vqa_scratch.study import names
from vqa_scratch.study.analysis import every_attention
from vqa_scratch.study.base import Change, Subject
from vqa_scratch.study.opened import Opened
from vqa_scratch.study.subject import WritingSubject
from vqa_scratch.study.trace import Edit, Trace, of_head

MOST_TIMES = 100.0
# By label, the axis of the tokens: what a patch may replace. Keys, values and scores grow from step to step.
PATCHED = {"z": 2, "q": 2} | dict.fromkeys(("out", "pre", "post", "resid_pre", "resid_mid", "resid_post"), 1)
FIELDS: dict[str, dict[str, Any]] = {
    "head": {"name": str, "head": int, "scale": int | float | None},
    "layer": {"name": str},
    "source": {"source": str, "token": int},
    "key": {"key": int},
    "patch": {"name": str, "head": int | None, "from": dict},
}


def twins(opened: Opened) -> dict[str, list[int | None]]:
    """For each source of words, by its name: which token of the prompt is the same word as each of its tokens."""
    result: dict[str, list[int | None]] = {}
    for source in opened.subject.sources:
        if source.of_image or opened.subject.prefix:
            continue
        places: dict[str, list[int]] = {}
        for place, label in enumerate(opened.prompt):
            places.setdefault(label.strip(), []).append(place)
        words = [None if i in source.sinks else label.strip() for i, label in enumerate(source.labels)]
        result[source.name] = [places[word].pop(0) if word and places.get(word) else None for word in words]
    return result


def change_of(opened: Opened, edit: Any, other: Callable[[Any], Opened]) -> Change:
    """The change that an object describes; `other` opens the "from" of a patch. Raises UserError for one that cannot be
    made in this model."""
    (kind,) = typed("an edit", edit, {"kind": str})
    if kind not in FIELDS:
        raise UserError(f"there is no edit of kind {kind!r}; there are {', '.join(FIELDS)}")
    values, subject = typed(f"an edit of kind {kind!r}", edit, FIELDS[kind]), opened.subject
    make: Callable[[Trace], None]
    if kind == "head":
        factor = float(0 if values[2] is None else values[2])
        if not abs(factor) <= MOST_TIMES:
            raise UserError(f"what a head reads is multiplied by at most {MOST_TIMES}, not by {factor}")
        make = partial(Trace.scale, name=values[0], head=values[1], factor=factor)
    elif kind == "layer":
        make = partial(Trace.ablate, name=f"{values[0]}.*" if values[0].count(".") == 1 else values[0])
    elif kind == "source":
        columns, copies = [column_of(subject, *values)], twins(opened).get(values[0])
        if copies is not None and (copy := copies[values[1]]) is not None:
            columns.append(column_of(subject, subject.writer, copy))
        make = partial(hide, subject=subject, columns=columns)
    elif kind == "key":
        make = partial(hide_key, subject=subject, key=values[0])
    else:
        make = patch(opened, values[0], values[1], other(values[2]))
    make(subject.trace(record=False))  # names what is wrong at once
    return Change(edit, make)


def column_of(subject: Subject, source: str, token: int) -> int:
    """The column of `Subject.shares` of one token. Raises UserError if there is none, or if it cannot be hidden."""
    total = subject.mixing.shape[1]
    if source == subject.writer and all(source != one.name for one in subject.sources):
        if token < 0:
            raise UserError(f"the {source} has no token {token}")
        return total + token
    found = next(((one, where) for one, where in subject.slices() if one.name == source), None)
    if found is None:
        known = [*(one.name for one in subject.sources), subject.writer]
        raise UserError(f"there is no source {source!r} here; there are {', '.join(dict.fromkeys(known))}")
    if not 0 <= token < len(found[0]):
        raise UserError(f"{source} has tokens 0 to {len(found[0]) - 1}, not {token}")
    column = found[1].start + token
    if ((mixed := subject.mixing[:, column]) * (1 - mixed) > 0).any():
        raise UserError(f"token {token} of {source} is averaged with others before it is read: it is not hidden alone")
    return column


def hide(t: Trace, subject: Subject, columns: list[int]) -> None:
    """Hide tokens, as columns of `Subject.shares`, in every attention that could read them."""

    def keys_of(name: str) -> Callable[[int], Tensor]:
        def hidden(keys: int) -> Tensor:
            shares = subject.shares(name, torch.eye(keys))  # which tokens each key is made of
            return shares[:, [column for column in columns if column < shares.shape[1]]].gt(0).any(1)

        return hidden

    for name in every_attention(subject):
        t.hide(name, keys_of(name))


def hide_key(t: Trace, subject: Subject, key: int) -> None:
    """Hide a key from the writer alone. Raises UserError if it reads fewer."""
    if not 0 <= key < len(subject.mixing):
        raise UserError(f"the writer reads keys 0 to {len(subject.mixing) - 1}, not {key}")
    for name in subject.reading:
        t.hide(name, lambda keys: torch.arange(keys) == key)


def patch(opened: Opened, name: str, head: int | None, other: Opened) -> Callable[[Trace], None]:
    """Put in what a tap holds for another input: at each token what the other has at its token of that number.

    Both write; the other one does not stop at its end, so that it has as many tokens. Raises UserError for a tap that
    cannot be patched, and if the inputs have not as many tokens.
    """
    subject, source, (prefix, _, label) = opened.subject, other.subject, name.rpartition(".")
    if label not in PATCHED:
        raise UserError(f"{name} cannot be taken from another input: its last part must be {', '.join(PATCHED)}")
    lengths = [one.prefix + len(one.prompt) for one in (source, subject)]
    if name.startswith(f"{subject.writer}.") and lengths[0] != lengths[1]:
        raise UserError(f"{name} of another input: its question has {lengths[0]} tokens, this one {lengths[1]}")
    if isinstance(source, WritingSubject):
        source.decide_by(source.own_options | {"eos_id": None})
    with source.trace(name) as t:
        source.generate()
    if head is not None and PATCHED[label] != 2:
        raise UserError(f"{name} has no heads: leave the head out, or take z or q of an attention")
    if head is not None:
        names.check_head(names.attention_at(t.modules, prefix), prefix, head)
    whole = t[name]
    return lambda t: t.replace(name, _in_turn(name, whole, PATCHED[label], head))


def _in_turn(name: str, whole: Tensor, axis: int, head: int | None) -> Edit:
    """Each call gets its tokens of `whole`, which lie along `axis`; after the last of them it begins again."""
    done = 0

    def edit(tensor: Tensor, call: int) -> Tensor:
        nonlocal done
        start = done if call and done < whole.shape[axis] else 0
        done = start + tensor.shape[axis]
        new = whole[(slice(None),) * axis + (slice(start, done),)].to(tensor)
        if new.shape != tensor.shape:
            raise UserError(f"{name} of another input is {tuple(new.shape)}, and here it is {tuple(tensor.shape)}")
        return of_head(tensor, new, head)

    return edit
