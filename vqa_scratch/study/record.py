"""Everything there is to know about one answer, measured once: what the report, the files and the summary show.

Shapes: L layers, H heads, T decoder tokens, S source tokens, V vocabulary.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.study.analysis import (
    Flow,
    HeadStatistics,
    cross_maps,
    every_attention,
    head_statistics,
    relevancy,
    rollout,
)
from vqa_scratch.study.certificate import Certificate
from vqa_scratch.study.inputs import Opened, token_label
from vqa_scratch.study.lens import ATTRIBUTION_TAPS, Attribution, logit_attribution, logit_lens
from vqa_scratch.study.trace import Trace, trace

TOP = 5  # tokens shown at each layer of the lens


@dataclass(frozen=True)
class AnswerToken:
    """One generated token. `row` is the decoder token that wrote it."""

    id: int
    label: str
    probability: float
    row: int


@dataclass(frozen=True)
class Study:
    """One answer of one run, taken apart."""

    opened: Opened
    trace: Trace  # of the cached generation
    answer: str
    tokens: tuple[AnswerToken, ...]
    read: tuple[str, ...]  # labels of the T tokens that the decoder read: prompt, then answer but for its last
    flows: dict[str, Flow]  # cross, rollout, relevancy
    heads: list[HeadStatistics]
    lens: list[list[list[tuple[str, float]]]]  # [L + 1][answer token][TOP] of (label, probability)
    attributions: list[Attribution]  # one an answer token
    certificate: Certificate

    @property
    def probability(self) -> float:
        """Of the whole answer."""
        return float(torch.tensor([token.probability for token in self.tokens]).log().sum().exp())


def take_apart(opened: Opened) -> Study:
    """Answer, through the cache, and measure. Raises UserError on a model without cross-attention maps."""
    subject, tokenizer = opened.subject, opened.tokenizer
    with trace(subject.model, *every_attention(subject), *ATTRIBUTION_TAPS) as t:
        ids = subject.generate()
    first = len(subject.prompt) - 1
    rows = [first + i for i in range(len(ids))]
    lens = logit_lens(subject, t)  # (L + 1, T, V)
    probabilities = lens[-1, rows, ids].exp().tolist()
    tokens = tuple(
        AnswerToken(index, token_label(tokenizer, index), p, row)
        for index, p, row in zip(ids, probabilities, rows, strict=True)
    )
    best = lens[:, rows].topk(TOP)
    return Study(
        opened=opened,
        trace=t,
        answer=tokenizer.decode(ids).strip(),
        tokens=tokens,
        read=tuple(token_label(tokenizer, index) for index in (subject.prompt + ids)[:-1]),
        flows={
            "cross": Flow(cross_maps(subject, t).mean((0, 1)), t.pattern("decoder.0.self")[0].mean(0).cpu()),
            "rollout": rollout(subject, t),
            "relevancy": relevancy(subject, ids),
        },
        heads=head_statistics(subject, t),
        lens=[
            [
                [(token_label(tokenizer, i), p) for i, p in zip(ids, ps, strict=True)]
                for ids, ps in zip(layer_ids, layer_ps, strict=True)
            ]
            for layer_ids, layer_ps in zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
        ],
        attributions=[logit_attribution(subject, t, token.row, token.id) for token in tokens],
        certificate=t.certificate(),
    )


def summary(study: Study) -> dict[str, Any]:
    """What summary.json holds."""
    rounded = [{k: round(v, 5) if isinstance(v, float) else v for k, v in asdict(head).items()} for head in study.heads]
    return {
        "run": study.opened.run,
        "text": study.opened.text,
        "answer": study.answer,
        "probability": study.probability,
        "tokens": [asdict(token) for token in study.tokens],
        "certificate": study.certificate.as_dict(),
        "heads": rounded,
    }


def trace_file(study: Study) -> bytes:
    """The safetensors bytes of a trace: q, k, v, mask, z and lse of every attention, from which weights follow.

    For an attention "decoder.0.cross" with the scale in the metadata, the weights are
    exp(scale * q k^T + mask - lse[..., None]); for self-attention behind a cache k is that of the last step and row i
    of the mask is that of step i, so the same formula holds.
    """
    t, tensors, metadata = study.trace, {}, {"answer": study.answer}
    for name in t.attentions():
        module: MultiHeadAttention = t.modules[name]
        metadata[f"{name}.scale"] = repr(float(module.scale))
        for label in ("q", "k", "v", "z"):
            tensors[f"{name}.{label}"] = _plain(t[f"{name}.{label}"])
        tensors[f"{name}.mask"] = _plain(_rows_of_mask(t, name))
        tensors[f"{name}.lse"] = _plain(t.lse(name))
    for source, flow in study.flows.items():
        tensors[f"{source}.sources"], tensors[f"{source}.decoder"] = _plain(flow.sources), _plain(flow.decoder)
    return save(tensors, metadata)


def _rows_of_mask(t: Trace, name: str) -> Tensor:
    """The additive mask of every step, (1, 1 or H, T, K): keys that a step had not reached yet are -inf."""
    masks = t.calls(f"{name}.mask")
    width = masks[-1].shape[-1]
    padded = [torch.nn.functional.pad(m, (0, width - m.shape[-1]), value=-torch.inf) for m in masks]
    return torch.cat(padded, 2)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().contiguous()
