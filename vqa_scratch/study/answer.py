"""An answer as it is written, each token with its rivals; and what becomes of it without each head.

Shapes: V vocabulary, labels or texts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqa_scratch.study.activation import activations, has_activations
from vqa_scratch.study.analysis import every_attention, flows
from vqa_scratch.study.base import Change, Flow
from vqa_scratch.study.lens import lens_taps
from vqa_scratch.study.names import attention_at, tapped_modules
from vqa_scratch.study.opened import Opened
from vqa_scratch.study.subject import WritingSubject
from vqa_scratch.study.trace import Trace

ALTERNATIVES = 5


class Answered(NamedTuple):
    """An answer; each token is {"id", "label", "probability", "alternatives": the likeliest, itself among them}. Of a
    pair the tokens are texts, and the numbers similarities, without alternatives."""

    ids: list[int]
    answer: str
    probability: float  # of the whole answer; the similarity of the whole text
    ended: bool  # by an end token, not by the limit
    tokens: list[dict[str, Any]]


def _token(opened: Opened, chosen: int, values: Tensor) -> dict[str, Any]:
    best = values.topk(min(ALTERNATIVES, len(values))).indices.tolist()
    ids = dict.fromkeys([*best, chosen])
    listed = {i: {"id": i, "label": opened.label(i), "probability": float(values[i])} for i in ids}
    rivals = list(listed.values()) if opened.subject.measure == "probability" else []
    return listed[chosen] | {"alternatives": rivals}


@torch.no_grad()
def answered(opened: Opened, told: Callable[[dict[str, Any]], None] = lambda token: None) -> Answered:
    """The answer, with the changes of the subject; `told` gets each token as soon as it is known."""
    subject, tokens = opened.subject, []

    def seen(token: int, values: Tensor) -> None:
        tokens.append(_token(opened, token, values))
        told(tokens[-1])

    # Without a trace a decoder has faster steps.
    with subject.trace(record=False) if subject.changes else nullcontext():
        if isinstance(subject, WritingSubject):  # what is chosen by has the temperature in it, and no barred token
            ids = subject.generate(seen=lambda token, scores: seen(token, scores.float().softmax(-1)))
        else:
            ids, values = subject.generate(), subject.logits(subject.prompt)[0].float()
            values = subject.log_probabilities(values).exp() if subject.measure == "probability" else values
            for token in ids:
                seen(token, values)
    likely = [token["probability"] for token in tokens]
    whole = prod(likely) if subject.measure == "probability" else likely[0]
    return Answered(ids, opened.decode(ids), whole, ids[-1] in subject.end_ids, tokens)


@torch.no_grad()
def probability(opened: Opened, ids: list[int]) -> float:
    """How likely these tokens are as the answer, in one pass, with the changes of the subject."""
    subject, first = opened.subject, len(opened.subject.prompt) - 1
    with subject.trace(record=False):
        logits = subject.logits(subject.prompt + ids[:-1])
    return float(subject.log_probabilities(logits)[range(first, first + len(ids)), ids].sum().exp())


def maps_of(opened: Opened, ids: list[int]) -> dict[str, Flow]:
    """The maps of every row, and activations, while the subject answers with these tokens whatever it would say."""
    subject = opened.subject
    if isinstance(subject, WritingSubject):
        subject.begin_with(ids)
    with subject.trace(*every_attention(subject), *(lens_taps(subject) if subject.has_lens else ())) as t:
        subject.generate()
    more = {"activation": activations(subject, t, ids).flow} if has_activations(subject) else {}
    return flows(subject, t, ids) | more


class Knocked(NamedTuple):
    """An answer without one head."""

    name: str  # decoder.3.cross
    head: int
    answer: str
    probability: float  # of the answer with this head
    changed: bool  # whether it is no more the answer


def without_each_head(opened: Opened, attentions: Sequence[str], whole: Answered) -> Iterator[Knocked]:
    """The answer without each head of these attentions, one after the other, beside the changes of the subject.

    `whole` is the answer with all of them. The subject is left as it was.
    """
    subject, modules = opened.subject, tapped_modules(opened.subject.model)
    changes = subject.changes
    for name in dict.fromkeys(attentions):
        for head in range(attention_at(modules, name).heads):
            subject.changes = (*changes, Change({}, partial(Trace.ablate, name=name, head=head)))
            try:
                now = answered(opened)
                same = now.ids == whole.ids
                value = now.probability if same else probability(opened, whole.ids)
            finally:
                subject.changes = changes
            yield Knocked(name, head, now.answer, value, not same)
