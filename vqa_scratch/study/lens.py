"""Reads the writer's states layer by layer: the logit lens, and what each head and each key adds to a logit.

Logit lens: nostalgebraist 2020, "interpreting GPT: the logit lens". By head: the direct logit attribution of Elhage et
al. 2021, "A Mathematical Framework for Transformer Circuits": the last norm is frozen at the scale it had, which makes
the way from each addend of the residual stream to the logit linear, so the parts sum to the logit exactly.

Shapes: L layers, H heads, T rows of the answer, D width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqa_scratch.nn.rms_norm import RMSNorm
from vqa_scratch.study.base import Subject
from vqa_scratch.study.names import attention_at
from vqa_scratch.study.trace import Trace


def lens_taps(subject: Subject) -> list[str]:
    """The taps that both need: the states between the writer's blocks, and what its parts add to them."""
    heads = dict.fromkeys((*subject.self_attentions, *subject.reading))
    states = ("mlp.out", "resid_pre", "resid_post", *(["gated.out"] if subject.gated else []))
    return [*(f"{name}.z" for name in heads), *(f"{subject.writer}.*.{tap}" for tap in states)]


@torch.no_grad()
def logit_lens(subject: Subject, t: Trace) -> Tensor:
    """(L + 1, T, V): log-probabilities if the writer stopped before its first layer, after it, ..., after the last.

    `t` must hold `lens_taps`.
    """
    states = [t[f"{subject.writer}.0.resid_pre"]]
    states += [t[f"{subject.writer}.{i}.resid_post"] for i in range(subject.layers)]
    kind = next(subject.decoder.parameters()).dtype
    return subject.log_probabilities(subject.readout(torch.cat([subject.rows(x) for x in states]).to(kind)))


def centred(norm: nn.LayerNorm | RMSNorm, x: Tensor) -> Tensor:
    """What a norm does first to (..., D): a LayerNorm takes the mean away."""
    return x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x


def frozen_scale(norm: nn.LayerNorm | RMSNorm, x: Tensor) -> Tensor:
    """(..., D): what it multiplies by at `x`."""
    return norm.weight * (centred(norm, x).square().mean(-1, keepdim=True) + norm.eps).rsqrt()


def frozen_norm(norm: nn.LayerNorm | RMSNorm, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The linear map that a LayerNorm or RMSNorm is at `x` (..., D), its statistics held fixed; without its bias."""
    scale = frozen_scale(norm, x)
    return lambda part: centred(norm, part) * scale


@dataclass(frozen=True)
class Attribution:
    """What each part adds to one token's logit, relative to the mean logit; their sum is that logit."""

    heads: dict[str, Tensor]  # "self", "cross" where there is one: (L, H)
    mlps: Tensor  # (L,)
    embedding: float
    biases: float  # of all output projections and of the last norm


def is_linear(subject: Subject) -> bool:
    """Whether a logit is a sum over the parts of a state, once the last norm is held fixed."""
    return subject.head is not None and isinstance(subject.decoder.norm, nn.LayerNorm | RMSNorm)


@torch.no_grad()
def logit_direction(subject: Subject, t: Trace, row: int, token: int) -> Tensor:
    """(D,): a part of the state at row `row` of the answer, times this, is its part of `token`'s logit, above the mean
    logit. `t` must hold the last state. Raises ValueError unless the subject `is_linear`.
    """
    if not is_linear(subject):
        raise ValueError("the logits of this model are no sum over the parts of a state: it has no `head`")
    state = t[f"{subject.writer}.{subject.layers - 1}.resid_post"][0, subject.prefix + row].float()
    norm = subject.decoder.norm
    return centred(norm, frozen_scale(norm, state) * _head_above_mean(subject, token)).detach()  # type: ignore[arg-type]


def _head_above_mean(subject: Subject, token: int) -> Tensor:
    """(D,)."""
    assert subject.head is not None
    return (subject.head[token].float() - subject.head.float().mean(0)).detach()


@torch.no_grad()
def key_parts(subject: Subject, t: Trace, name: str, row: int, direction: Tensor) -> Tensor:
    """(H, K): what each key adds through each head of the attention `name` to the logit of a `logit_direction`; over
    the keys of a head they sum to its part, also if it was scaled. `t` must hold the attention.
    """
    module, row = attention_at(t.modules, name), subject.prefix + row
    out = module.out.weight.float().unflatten(1, (module.heads, module.head_dim))  # (D, H, d)
    read = torch.einsum("hkd,ehd,e->hk", t[f"{name}.v"][0].float(), out, direction)
    ran, left = (z[0, :, row].float() for z in (torch.cat(t.returned(name), 2), t[f"{name}.z"]))  # (H, d)
    scale = (left * ran).sum(-1) / ran.square().sum(-1).clamp(min=1e-30)
    return gate_of(subject, name) * scale[:, None] * t.pattern(name)[0, :, row] * read


def gate_of(subject: Subject, name: str) -> Tensor | float:
    """What the output of a gated layer's attention is multiplied by; 1 for any other."""
    layer = subject.gated_at.get(int(name.split(".")[1])) if name in subject.reading else None
    return 1.0 if layer is None else layer.cross_gate.tanh()


@torch.no_grad()
def logit_attribution(subject: Subject, t: Trace, row: int, token: int) -> Attribution:
    """The parts of `token`'s logit at row `row` of the answer. `t` must hold `lens_taps`, and the subject a `head`."""
    direction = logit_direction(subject, t, row, token)
    writer, norm, row = subject.writer, subject.decoder.norm, subject.prefix + row

    def logit(part: Tensor) -> Tensor:
        return part.float() @ direction

    heads: dict[str, list[Tensor]] = {}
    biases = torch.zeros((), device=direction.device)
    for name in dict.fromkeys((*subject.self_attentions, *subject.reading)):
        gate = gate_of(subject, name)
        heads.setdefault(name.rpartition(".")[2], []).append(logit(gate * t[f"{name}.head_out"][0, :, row]))  # (H,)
        bias = attention_at(t.modules, name).out.bias
        biases = biases if bias is None else biases + logit(gate * bias)
    if isinstance(norm, nn.LayerNorm) and norm.bias is not None:
        biases = biases + norm.bias.float() @ _head_above_mean(subject, token)
    mlps = torch.stack([logit(t[f"{writer}.{i}.mlp.out"][0, row]) for i in range(subject.layers)])
    embedding = logit(t[f"{writer}.0.resid_pre"][0, row])
    for i, layer in subject.gated_at.items():
        added = logit(layer.mlp_gate.tanh() * t[f"{writer}.{i}.gated.out"][0, row])
        mlps[i] += added
        if i == 0:  # it stands before what is taken for the embedding
            embedding = embedding - added - heads["cross"][0].sum()
    if subject.gated:  # blocks without such a layer have none of these heads
        found = torch.stack(heads["cross"])  # maybe not as many heads as in the blocks
        cross = found.new_zeros(subject.layers, found.shape[1])
        cross[list(subject.gated_at)] = found
        heads["cross"] = list(cross)
    return Attribution(
        heads={kind: torch.stack(values).cpu() for kind, values in heads.items()},
        mlps=mlps.cpu(),
        embedding=float(embedding),
        biases=float(biases),
    )
