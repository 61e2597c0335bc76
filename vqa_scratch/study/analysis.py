"""Maps and statistics from attention weights: the plain map, rollout, relevancy, and figures of each head.

Rollout: Abnar and Zuidema 2020 (2005.00928). Relevancy: Chefer, Gur and Wolf 2021, "Generic Attention-model
Explainability" (2103.15679); the equation numbers below are theirs. Both go through the encoders into the writer, so
every row of the answer gets a share for each image token and each word.

Shapes: H heads, X tokens of the writer's own sequence, T of them rows of the answer, K cross-attention keys or tokens
of a prefix, S source tokens, N tokens of one source.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqa_scratch.nn.states import Places
from vqa_scratch.study.base import Flow, Subject
from vqa_scratch.study.certificate import rebuilt_pattern
from vqa_scratch.study.names import attention_at
from vqa_scratch.study.trace import Trace

# (flow so far (N, S), weights (N, keys), flow of what cross-attention reads (keys, S) or None, own columns) -> flow
Step = Callable[[Tensor, Tensor, Tensor | None, slice], Tensor]


def attention_names(subject: Subject) -> dict[str, list[str]]:
    """The attentions in the order they run: {"image": ["image.0.self", ...], ..., "decoder": [self, cross, ...]}."""
    return {source.name: list(source.attentions) for source in subject.sources} | {subject.writer: subject.attentions}


def every_attention(subject: Subject) -> list[str]:
    """All attentions in one list."""
    return [name for names in attention_names(subject).values() for name in names]


def key_sources(subject: Subject, t: Trace) -> Tensor:
    """(K, S): `mixing`, with learned queries replaced by what their cross-attention reads of the image on average."""
    made = subject.mixing.clone()
    for source, where in subject.slices():
        if source.reads is not None:
            reads = [_mean_pattern(t, name) for name in source.attentions if name.endswith(".cross")]
            seen = subject.where(source.reads)
            read = torch.stack(reads).mean(0)[:, : seen.stop - seen.start]
            made[:, seen] += made[:, where] @ (read / read.sum(-1, keepdim=True))
            made[:, where] = 0
    return made


def _reading(subject: Subject, t: Trace) -> Tensor:
    """(layers, H, T, K + own): the weights of the attentions that read the sources."""
    return torch.stack([subject.readers(t.pattern(name)[0].cpu()) for name in subject.reading])


def cross_maps(subject: Subject, t: Trace) -> Tensor:
    """(layers, H, T, S): the weights with which the writer reads the sources, head by head."""
    made = key_sources(subject, t)
    return _reading(subject, t)[..., : len(made)] @ made


def plain_map(subject: Subject, t: Trace) -> Flow:
    """`cross_maps`, averaged over layers and heads; with a prefix also the weights on the writer's own tokens."""
    made, weights = key_sources(subject, t), _reading(subject, t).mean((0, 1))  # (K, S), (T, K + own)
    own = weights[:, len(made) :] if subject.prefix else torch.zeros(len(weights), len(weights))
    return Flow(weights[:, : len(made)] @ made, own)


def carry(subject: Subject, weights: dict[str, Tensor], step: Step, finish: Callable[[Tensor, Tensor], Tensor]) -> Flow:
    """Follow the weights (queries, keys) of every attention through the sources and then through the writer.

    `step` is the rule for one attention; `finish` turns the flow after a source's blocks and the flow before them, both
    (N, S), into what others read.
    """
    total = subject.mixing.shape[1]
    known = torch.zeros(total, total)  # in row s: what source token s is made of

    def through(flow: Tensor, names: Sequence[str], read: Tensor | None, own: slice) -> Tensor:
        for name in names:
            flow = step(flow, weights[name], read if name.endswith(".cross") else None, own)
        return flow

    for source, where in subject.slices():
        start = torch.eye(total)[where]
        read = None if source.reads is None else known[subject.where(source.reads)]
        known[where] = finish(through(start, source.attentions, read, where), start)
    given = subject.mixing @ known  # (K, S)
    own = len(weights[subject.reading[0]]) - subject.prefix
    before = torch.cat([given, torch.zeros(len(given), own)], 1)  # (K, S + own)
    start = torch.cat([before[: subject.prefix], torch.eye(total + own)[total:]])
    flow = subject.rows(through(start, subject.attentions, before, slice(total, None)))
    return Flow(flow[:, :total], flow[:, total:])


def rollout(subject: Subject, t: Trace) -> Flow:
    """Attention rollout: heads averaged, half of each state is its residual. Rows of (sources, decoder) sum to 1.

    `t` must hold every attention, from a generation or a teacher-forced pass.
    """
    weights = {name: _mean_pattern(t, name) for name in every_attention(subject)}
    return carry(subject, weights, _rollout_step, lambda flow, start: flow)


def _rollout_step(flow: Tensor, weights: Tensor, read: Tensor | None, own: slice) -> Tensor:
    keys = flow if read is None else torch.cat([read, flow])[: weights.shape[-1]]
    return (weights @ keys + flow) / 2


def _mean_pattern(t: Trace, name: str) -> Tensor:
    return t.pattern(name)[0].mean(0).cpu()


# ---------------------------------------------------------------------------------------------- relevancy


def weighted_patterns(subject: Subject, t: Trace, target: Tensor) -> dict[str, Tensor]:
    """Equation 5 for every attention: mean over heads of the positive part of P * dtarget/dP, (queries, keys).

    No pattern is ever stored with its gradient: P comes from q, k and the log-sum-exp, and since z = P V, the gradient
    is dtarget/dP = (dtarget/dz) V^T. `t` is a trace with grad=True over one pass; `target` is a scalar of that pass.
    """
    attentions = every_attention(subject)
    outputs = [t.returned(name)[-1] for name in attentions]  # of one pass; a head that is silenced gets nothing
    gradients = torch.autograd.grad(target, outputs, retain_graph=True, allow_unused=True)
    result = {}
    with torch.no_grad():
        for name, output, gradient in zip(attentions, outputs, gradients, strict=True):
            q, k, v, mask = (t[f"{name}.{label}"] for label in ("q", "k", "v", "mask"))
            pattern = rebuilt_pattern(q, k, mask, attention_at(t.modules, name).scale)[0]
            gradient = torch.zeros_like(output) if gradient is None else gradient
            d_pattern = (gradient.float() @ v.float().transpose(-1, -2))[0]
            result[name] = (pattern * d_pattern).clamp(min=0).mean(0).cpu()
    return result


def _relevancy_step(flow: Tensor, weights: Tensor, read: Tensor | None, own: slice) -> Tensor:
    if read is None:  # equations 6 and 7; for a single stream there is no other
        return flow + weights @ flow
    given, rest = weights.tensor_split([len(read)], 1)  # the rest: learned queries may read themselves too
    added = _normalised(flow[:, own], torch.eye(len(flow))).T @ (given @ read)  # equation 10
    return flow + added + rest @ flow if rest.shape[1] else flow + added


def _normalised(relevancy: Tensor, start: Tensor) -> Tensor:
    """Equations 8 and 9: the part that attention added to `start`, rows scaled to sum 1, and `start` again."""
    added = relevancy - start
    return added / added.sum(-1, keepdim=True).clamp(min=1e-12) + start


@torch.enable_grad()
def relevancy(subject: Subject, answer: list[int]) -> Flow:
    """What made the logit of each generated token: rows as in `rollout`, each from its own backward pass.

    `answer` are the generated ids, or the first of them. Row i is about the token after the writer's token i. Rows
    that do not predict a token of the answer are 0.
    """
    ids = subject.prompt + answer
    first = len(subject.prompt) - 1
    with subject.trace(*every_attention(subject), grad=True) as t:
        logits = subject.logits(ids[:-1])
    found = []
    for row in range(first, len(ids) - 1):
        weighted = weighted_patterns(subject, t, logits[row, ids[row + 1]])
        of_token = carry(subject, weighted, _relevancy_step, _normalised)
        found.append(Flow(of_token.sources[row], of_token.decoder[row]))
    sources, own = torch.stack([f.sources for f in found]), torch.stack([f.decoder for f in found])
    return Flow(*(nn.functional.pad(x, (0, 0, first, 0)) for x in (sources, own)))


def flows(subject: Subject, t: Trace, answer: list[int]) -> dict[str, Flow]:
    """The three kinds of map for every row of `prompt` + `answer`, and the subject's own; `t` is a trace of that
    answer, as for `rollout`."""
    three = {"cross": plain_map(subject, t), "rollout": rollout(subject, t), "relevancy": relevancy(subject, answer)}
    return three | subject.more_flows(t)


# ---------------------------------------------------------------------------------------------- heads


@dataclass(frozen=True)
class HeadStatistics:
    """One head, averaged over its queries. The three masses sum to 1."""

    name: str  # decoder.3.cross
    head: int
    entropy: float  # of a row of weights, as a share of a uniform row's: 0 one key, 1 all equal
    image: float  # weight on tokens of the image
    text: float  # weight on question, article or answer tokens
    sink: float  # weight on tokens without content: class token, separators, the writer's first
    distance: float | None  # mean distance to the keys of the same kind, in patches or tokens; None for cross-attention


def normalised_entropy(pattern: Tensor, visible: Tensor) -> Tensor:
    """(..., Tq, Tk) -> (..., Tq): entropy over log(keys that may be seen); 0 where fewer than two may."""
    return torch.special.entr(pattern).sum(-1) / visible.sum(-1).clamp(min=2).log()


def mean_distance(pattern: Tensor, image: Places | None) -> Tensor:
    """(H, N, N) -> (H,): expected distance of the keys read, over tokens that have a place: of an image the last ones.

    For an image this is the mean attention distance of Dosovitskiy et al. 2021, section 4.5, in patches.
    """
    grid = (pattern.shape[-1],) if image is None else image.grid
    places = torch.cartesian_prod(*map(torch.arange, grid)).float().view(-1, len(grid))
    inner = pattern[:, -len(places) :, -len(places) :]
    weight = inner.sum(-1)
    return ((inner * torch.cdist(places, places)).sum(-1) / weight.clamp(min=1e-12)).mean(-1)


def head_statistics(subject: Subject, t: Trace) -> list[HeadStatistics]:
    """Every head that `t` recorded, in the order of the model."""
    result = []
    for name in t.attentions():
        pattern = t.pattern(name)[0].cpu()  # (H, queries, keys)
        visible = (t[f"{name}.scores"][0] > -math.inf).cpu()
        entropy = normalised_entropy(pattern, visible).mean(-1)
        shares = subject.shares(name, pattern).mean(1)  # (H, S, or S + own)
        image, text, sink = (shares @ kind for kind in _kinds(subject, shares.shape[1]))
        distance = _distance(subject, name, pattern)
        for head in range(len(pattern)):
            spread, *read = (float(x[head]) for x in (entropy, image, text, sink))
            far = None if distance is None else float(distance[head])
            result.append(HeadStatistics(name, head, spread, read[0], read[1], read[2], far))
    return result


def _kinds(subject: Subject, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three masks over the source tokens and the writer's own: 1 for tokens of an image, of a text, for sinks."""
    image, sink = torch.zeros(tokens), torch.zeros(tokens)
    for source, where in subject.slices():
        sink[[where.start + i for i in source.sinks]] = 1
        image[where] = float(source.of_image)
    sink[subject.mixing.shape[1] :][: subject.own_sinks] = 1
    return image * (1 - sink), (1 - image) * (1 - sink), sink


def _distance(subject: Subject, name: str, pattern: Tensor) -> Tensor | None:
    """(H,): `mean_distance` among the tokens of one kind; None for cross-attention."""
    stream, _, kind = name.split(".")
    if kind == "cross":
        return None
    if stream != subject.writer:
        return mean_distance(pattern, next(source.places for source in subject.sources if source.name == stream))
    if subject.prefix < pattern.shape[-1]:
        own = slice(subject.prefix if any(source.of_image for source in subject.sources) else 0, None)
        return mean_distance(pattern[:, own, own], None)
    image, where = subject.image
    return mean_distance(pattern[:, where, where], image)
