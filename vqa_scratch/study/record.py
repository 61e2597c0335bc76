"""Analyses one answer: everything that the report, the files and the summary show, measured once.

Shapes: L layers, H heads, T rows of the answer, S source tokens, V vocabulary.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from vqa_scratch.errors import UserError
from vqa_scratch.nn.experts import Router
from vqa_scratch.study.analysis import Flow, HeadStatistics, every_attention, flows, head_statistics
from vqa_scratch.study.certificate import Certificate
from vqa_scratch.study.lens import Attribution, lens_taps, logit_attribution, logit_lens
from vqa_scratch.study.names import attention_at, tapped_modules
from vqa_scratch.study.opened import Opened
from vqa_scratch.study.trace import Trace, joined

TOP = 5  # tokens shown at each layer of the lens


@dataclass(frozen=True)
class AnswerToken:
    """One token of the answer. `row` is the row of a map that is about it."""

    id: int
    label: str
    probability: float  # or what else the subject's `measure` is
    row: int


@dataclass(frozen=True)
class Study:
    """The analysis of one answer of one run."""

    opened: Opened
    trace: Trace  # of the cached generation
    answer: str
    tokens: tuple[AnswerToken, ...]
    read: tuple[str, ...]  # labels of the T tokens that have a row: prompt and answer without its last
    flows: dict[str, Flow]  # cross, rollout, relevancy
    heads: list[HeadStatistics]
    lens: list[list[list[tuple[str, float]]]]  # [L + 1][answer token][TOP] of (label, probability)
    experts: dict[str, Tensor]  # by router, (T, E): the weight of each expert for each token read
    attributions: list[Attribution]  # one an answer token; empty if no linear head reads the states
    certificate: Certificate

    @property
    def probability(self) -> float:
        """Of the whole answer; of a pair the similarity of the whole text."""
        if self.opened.subject.measure != "probability":
            return self.tokens[0].probability
        return float(torch.tensor([token.probability for token in self.tokens]).log().sum().exp())


def take_apart(opened: Opened) -> Study:
    """Generate the answer, through the cache if there is one, and measure."""
    subject, label = opened.subject, opened.label
    routers = [name for name, module in tapped_modules(subject.model).items() if isinstance(module, Router)]
    chosen = [*(lens_taps(subject) if subject.has_lens else ()), *(f"{name}.weights" for name in routers)]
    with subject.trace(*every_attention(subject), *chosen) as t:
        ids = subject.generate()
    first = len(subject.prompt) - 1
    rows = [first + i for i in range(len(ids))]
    if subject.has_lens:
        lens = logit_lens(subject, t)  # (L + 1, T, V)
        probabilities = lens[-1, rows, ids].exp().tolist()
    else:
        with subject.trace(record=False), torch.no_grad():
            last = subject.logits(subject.prompt + ids[:-1])
        lens, probabilities = last[None][:0], last[rows, ids].tolist()
    tokens = tuple(
        AnswerToken(index, label(index), p, row) for index, p, row in zip(ids, probabilities, rows, strict=True)
    )
    if not all(map(math.isfinite, probabilities)):
        raise UserError(f"{opened.run} gives its answer a {subject.measure} that is no number: its weights are damaged")
    best = lens[:, rows].topk(min(TOP, lens.shape[-1]))
    return Study(
        opened=opened,
        trace=t,
        answer=opened.decode(ids),
        tokens=tokens,
        read=(*opened.prompt, *map(label, ids[:-1])),
        flows=flows(subject, t, ids),
        heads=head_statistics(subject, t),
        lens=[
            [[(label(i), p) for i, p in zip(ids, ps, strict=True)] for ids, ps in zip(layer_ids, layer_ps, strict=True)]
            for layer_ids, layer_ps in zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
        ],
        experts={name: subject.rows(t[f"{name}.weights"])[0].cpu() for name in routers},
        attributions=[
            logit_attribution(subject, t, token.row, token.id) for token in tokens if subject.head is not None
        ],
        certificate=t.certificate(),
    )


def summary(study: Study) -> dict[str, Any]:
    """What summary.json holds."""
    measure = study.opened.subject.measure
    tokens = [{measure if k == "probability" else k: v for k, v in asdict(token).items()} for token in study.tokens]
    rounded = [{k: round(v, 5) if isinstance(v, float) else v for k, v in asdict(head).items()} for head in study.heads]
    return {
        "run": study.opened.run,
        "text": study.opened.text,
        "answer": study.answer,
        measure: study.probability,
        "tokens": tokens,
        "certificate": asdict(study.certificate),
        "heads": rounded,
    }


def trace_file(study: Study) -> bytes:
    """The safetensors bytes of a trace: q, k, v, mask, z and lse of every attention, which determine its weights.

    For an attention "decoder.0.cross" with the scale in the metadata, the weights are
    exp(scale * q k^T + mask - lse[..., None]); for self-attention behind a cache k is that of the last step and row i
    of the mask is that of step i, so the same formula holds.
    """
    t, tensors, metadata = study.trace, {}, {"answer": study.answer}
    for name in t.attentions():
        metadata[f"{name}.scale"] = repr(float(attention_at(t.modules, name).scale))
        for label in ("q", "k", "v", "z"):
            tensors[f"{name}.{label}"] = _plain(t[f"{name}.{label}"])
        tensors[f"{name}.mask"] = _plain(rows_of_mask(t, name))
        tensors[f"{name}.lse"] = _plain(t.lse(name))
    for source, flow in study.flows.items():
        tensors[f"{source}.sources"], tensors[f"{source}.decoder"] = _plain(flow.sources), _plain(flow.decoder)
    return save(tensors, metadata)


def rows_of_mask(t: Trace, name: str) -> Tensor:
    """The additive mask of every step, (1, 1 or H, T, K): keys that a step had not reached yet are -inf."""
    return joined(t.calls(f"{name}.mask"), -math.inf)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().contiguous()
