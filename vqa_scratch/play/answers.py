"""What the page asks of a model: an answer, its study, each head knocked out, and the numbers of one.

Each function is the work of a `Job`: a generator of JSON values. Nothing stays on the model: changes are made in the
traces of a request, and end with them.
"""

from collections.abc import Iterator
from typing import Any

from vqa_scratch.play.models import Played
from vqa_scratch.play.worker import Job
from vqa_scratch.storage import typed
from vqa_scratch.study.analysis import every_attention
from vqa_scratch.study.answer import answered, maps_of, without_each_head
from vqa_scratch.study.number import head_of
from vqa_scratch.study.packing import packed_flow
from vqa_scratch.study.record import take_apart
from vqa_scratch.study.report import page, study_data


def ask(played: Played, state: dict[str, Any], job: Job) -> Iterator[Any]:
    """Each token of the answer, then all of it; after edits the unchanged answer too."""
    opened = played.opened(state)
    found = answered(opened, lambda token: job.send({"token": token}))._asdict()
    if opened.subject.changes:
        found["plain"] = played.unchanged(state)._asdict()
    yield found | {"notes": opened.notes}


def study(played: Played, state: dict[str, Any], job: Job) -> Iterator[Any]:
    """The study of an answer; after edits also the maps of the unchanged model for the same words."""
    done, plain = take_apart(played.opened(state)), None
    if done.opened.subject.changes:
        plain = played.unchanged(state)._asdict()
        maps = maps_of(played.opened(state | {"edits": []}), [token.id for token in done.tokens])
        plain["flows"] = {name: packed_flow(flow) for name, flow in maps.items()}
    yield study_data(done, budget=0) | {"plain": plain}  # other heads are asked for one by one


def report(played: Played, state: dict[str, Any], job: Job) -> Iterator[Any]:
    """The static page of an answer."""
    yield page([take_apart(played.opened(state))])


def heads(played: Played, state: dict[str, Any], job: Job) -> Iterator[Any]:
    """The answer without each head of the writer, or with "all" of any encoder too, one after the other."""
    opened = played.opened(state)
    names = every_attention(opened.subject) if state.get("all") is True else opened.subject.attentions
    whole, sizes = answered(opened), {one["name"]: one["heads"] for one in played.about["attentions"]}
    total = sum(sizes[name] for name in dict.fromkeys(names))
    yield {"total": total, "plain": {"answer": whole.answer, "probability": whole.probability}}
    for knocked in without_each_head(opened, names, whole):
        yield knocked._asdict()


def number(played: Played, state: dict[str, Any], job: Job) -> Iterator[Any]:
    """The numbers of one head that reads the sources, from q and k to what it adds to the logit of each token."""
    name, head = typed("the request", state, {"name": str, "head": int})
    yield head_of(played.opened(state), name, head)
