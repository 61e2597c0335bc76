"""What the weights add up to: raw cross-attention, rollout, gradient-weighted relevancy, statistics of each head.

Rollout: Abnar and Zuidema 2020 (2005.00928). Relevancy: Chefer, Gur and Wolf 2021, "Generic Attention-model
Explainability" (2103.15679); their equation numbers stand below. Both are carried through the decoder into the towers
it reads, so every generated token gets a share for each image patch and each question token.

Shapes: H heads, T decoder tokens, K cross-attention keys, S source tokens of all towers, N tokens of one tower.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vqa_scratch.study.certificate import rebuilt_pattern
from vqa_scratch.study.subject import Source, Subject
from vqa_scratch.study.trace import Trace, trace


@dataclass(frozen=True)
class Flow:
    """For the decoder's token i, in row i: how much each source token and each decoder token matters."""

    sources: Tensor  # (T, S)
    decoder: Tensor  # (T, T)


def attention_names(subject: Subject) -> dict[str, list[str]]:
    """The attentions in the order they run: {"image": ["image.0.self", ...], ..., "decoder": [self, cross, ...]}."""
    towers = {s.tower: [f"{s.tower}.{i}.self" for i in range(subject.layers(s.tower))] for s in subject.sources}
    kinds = ("self", "cross")
    return towers | {"decoder": [f"decoder.{i}.{kind}" for i in range(subject.layers("decoder")) for kind in kinds]}


def every_attention(subject: Subject) -> list[str]:
    """All of them in one list."""
    return [name for names in attention_names(subject).values() for name in names]


def cross_maps(subject: Subject, t: Trace) -> Tensor:
    """(layers, H, T, S): cross-attention of each head, spread over the source tokens that its keys are made of."""
    layers = range(subject.layers("decoder"))
    return torch.stack([t.pattern(f"decoder.{i}.cross")[0].cpu() @ subject.mixing for i in layers])


def rollout(subject: Subject, t: Trace) -> Flow:
    """Attention rollout: heads averaged, half of each state is its residual. Rows of (sources, decoder) sum to 1.

    `t` must hold every attention, of a generation or of a teacher-forced pass.
    """
    order = attention_names(subject)
    towers = []
    for source in subject.sources:
        flow = torch.eye(len(source))
        for name in order[source.tower]:
            flow = (_mean_pattern(t, name) @ flow + flow) / 2
        towers.append(flow)
    keys = subject.mixing @ torch.block_diag(*towers)  # (K, S)
    tokens = _mean_pattern(t, "decoder.0.self").shape[0]
    sources, decoder = torch.zeros(tokens, keys.shape[1]), torch.eye(tokens)
    for name in order["decoder"]:
        pattern = _mean_pattern(t, name)
        if name.endswith(".self"):
            sources, decoder = (pattern @ sources + sources) / 2, (pattern @ decoder + decoder) / 2
        else:
            sources, decoder = (pattern @ keys + sources) / 2, decoder / 2
    return Flow(sources, decoder)


def _mean_pattern(t: Trace, name: str) -> Tensor:
    return t.pattern(name)[0].mean(0).cpu()


# ---------------------------------------------------------------------------------------------- relevancy


def weighted_patterns(subject: Subject, t: Trace, target: Tensor) -> dict[str, Tensor]:
    """Equation 5 for every attention: mean over heads of the positive part of P * dtarget/dP, (queries, keys).

    No pattern is ever stored with its gradient: P comes from q, k and the log-sum-exp, and since z = P V, the gradient
    is dtarget/dP = (dtarget/dz) V^T. `t` is a trace with grad=True over one pass; `target` is a scalar of that pass.
    """
    attentions = every_attention(subject)
    outputs = [t[f"{name}.z"] for name in attentions]
    gradients = torch.autograd.grad(target, outputs, retain_graph=True, allow_unused=True)
    result = {}
    with torch.no_grad():
        for name, output, gradient in zip(attentions, outputs, gradients, strict=True):
            q, k, v, mask = (t[f"{name}.{label}"] for label in ("q", "k", "v", "mask"))
            pattern = rebuilt_pattern(q, k, mask, t.modules[name].scale)[0]
            gradient = torch.zeros_like(output) if gradient is None else gradient
            d_pattern = (gradient.float() @ v.float().transpose(-1, -2))[0]
            result[name] = (pattern * d_pattern).clamp(min=0).mean(0).cpu()
    return result


def relevancy_from(subject: Subject, weighted: dict[str, Tensor]) -> Flow:
    """Chefer's rules over the weighted patterns of one target."""
    order = attention_names(subject)
    towers = []
    for source in subject.sources:
        relevancy = torch.eye(len(source))
        for name in order[source.tower]:
            relevancy = relevancy + weighted[name] @ relevancy  # equation 6
        towers.append(_normalised(relevancy))
    keys = subject.mixing @ torch.block_diag(*towers)  # (K, S)
    tokens = len(weighted["decoder.0.self"])
    sources, decoder = torch.zeros(tokens, keys.shape[1]), torch.eye(tokens)
    for name in order["decoder"]:
        if name.endswith(".self"):  # equations 6 and 7
            sources, decoder = sources + weighted[name] @ sources, decoder + weighted[name] @ decoder
        else:  # equation 10
            sources = sources + _normalised(decoder).T @ (weighted[name] @ keys)
    return Flow(sources, decoder)


def _normalised(relevancy: Tensor) -> Tensor:
    """Equations 8 and 9: the part that attention added, rows scaled to sum 1, and the identity again."""
    eye = torch.eye(len(relevancy))
    added = relevancy - eye
    return added / added.sum(-1, keepdim=True).clamp(min=1e-12) + eye


@torch.enable_grad()
def relevancy(subject: Subject, answer: list[int], rows: list[int] | None = None) -> Flow:
    """For each generated token, what made its logit: rows as in `rollout`, each from a backward pass of its own.

    `answer` are the generated ids. Row i is about the token that follows decoder token i; rows that predict nothing of
    the answer (the prompt's, but for its last) are 0, as are those left out by `rows`, a choice among the answer's.
    """
    ids = subject.prompt + answer
    first = len(subject.prompt) - 1
    tokens = len(ids) - 1
    flow = Flow(torch.zeros(tokens, subject.mixing.shape[1]), torch.zeros(tokens, tokens))
    with trace(subject.model, *every_attention(subject), grad=True) as t:
        logits = subject.logits(ids[:-1])
    for i in range(len(answer)) if rows is None else rows:
        row = first + i
        of_token = relevancy_from(subject, weighted_patterns(subject, t, logits[row, ids[row + 1]]))
        flow.sources[row], flow.decoder[row] = of_token.sources[row], of_token.decoder[row]
    return flow


# ---------------------------------------------------------------------------------------------- heads


@dataclass(frozen=True)
class HeadStatistics:
    """One head, averaged over its queries. The three masses sum to 1."""

    name: str  # decoder.3.cross
    head: int
    entropy: float  # of a row of weights, as a share of that of a uniform row: 0 one key, 1 all alike
    image: float  # weight on image patches
    text: float  # weight on question, article or answer tokens
    sink: float  # weight on tokens without content: class token, separators, the decoder's first
    distance: float | None  # mean distance to the keys, in patches or tokens; None for cross-attention


def normalised_entropy(pattern: Tensor, visible: Tensor) -> Tensor:
    """(..., Tq, Tk) -> (..., Tq): entropy over log(keys that may be seen); 0 where fewer than two may."""
    entropy = -(pattern * pattern.clamp(min=1e-30).log()).sum(-1)
    keys = visible.sum(-1)
    return torch.where(keys > 1, entropy / keys.clamp(min=2).log(), torch.zeros_like(entropy))


def _positions(source: Source | None, tokens: int) -> Tensor:
    """(tokens, 1 or 2): where each token stands, in tokens or in patches; NaN for one that stands nowhere."""
    if source is None or source.grid is None:
        return torch.arange(tokens, dtype=torch.float32)[:, None]
    rows, columns = source.grid
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    return torch.cat([places.new_full((tokens - len(places), 2), math.nan), places])


def mean_distance(pattern: Tensor, source: Source | None) -> Tensor:
    """(H, N, N) -> (H,): expected distance of the keys read, over tokens that have a place.

    For an image this is the mean attention distance of Dosovitskiy et al. 2021, section 4.5, in patches.
    """
    places = _positions(source, pattern.shape[-1])
    keep = places.isfinite().all(-1)
    distance = torch.cdist(places[keep], places[keep])
    inner = pattern[:, keep][:, :, keep]
    weight = inner.sum(-1)
    return ((inner * distance).sum(-1) / weight.clamp(min=1e-12)).mean(-1)


def head_statistics(subject: Subject, t: Trace) -> list[HeadStatistics]:
    """Every head that `t` recorded, in the order of the model."""
    by_tower = {source.tower: source for source in subject.sources}
    result = []
    for name in t.attentions():
        tower, _, kind = name.split(".")
        pattern = t.pattern(name)[0].cpu()  # (H, T, K)
        visible = (t[f"{name}.scores"][0] > -math.inf).cpu()
        entropy = normalised_entropy(pattern, visible).mean(-1)
        distance = None
        if kind == "cross":
            shares = (pattern @ subject.mixing).mean(1)  # (H, S)
            image, text, sink = _masses(shares, subject.slices())
        else:
            source = by_tower.get(tower)
            distance = mean_distance(pattern, source)
            source = source or Source(tower, ("",) * pattern.shape[-1], sinks=(0,))
            image, text, sink = _masses(pattern.mean(1), [(source, slice(0, len(source)))])
        for head in range(len(pattern)):
            values = (float(x[head]) for x in (entropy, image, text, sink))
            result.append(HeadStatistics(name, head, *values, None if distance is None else float(distance[head])))
    return result


def _masses(shares: Tensor, slices: list[tuple[Source, slice]]) -> tuple[Tensor, Tensor, Tensor]:
    """(H, S) -> image, text and sink mass, each (H,)."""
    image, text, sink = (shares.new_zeros(len(shares)) for _ in range(3))
    for source, where in slices:
        part = shares[:, where]
        of_sinks = part[:, list(source.sinks)].sum(-1)
        sink = sink + of_sinks
        if source.grid is not None:
            image = image + part.sum(-1) - of_sinks
        else:
            text = text + part.sum(-1) - of_sinks
    return image, text, sink
