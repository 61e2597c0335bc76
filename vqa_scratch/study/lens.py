"""Read the decoder's states before they are finished: logit lens by layer, and what each head adds to a logit.

Logit lens: nostalgebraist 2020, "interpreting GPT: the logit lens". By head: the direct logit attribution of Elhage et
al. 2021, "A Mathematical Framework for Transformer Circuits": the last norm is frozen at the scale it had, which makes
the way from each addend of the residual stream to the logit linear, so the parts sum to the logit exactly.

Shapes: L layers, H heads, T decoder tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqa_scratch.study.subject import Subject
from vqa_scratch.study.trace import Trace

LENS_TAPS = ("decoder.*.resid_pre", "decoder.*.resid_post")
ATTRIBUTION_TAPS = ("decoder.*.self.z", "decoder.*.cross.z", "decoder.*.mlp.out", *LENS_TAPS)


@torch.no_grad()
def logit_lens(subject: Subject, t: Trace) -> Tensor:
    """(L + 1, T, V): log-probabilities if the decoder stopped before its first layer, after it, ..., after the last.

    `t` must hold LENS_TAPS.
    """
    layers = range(subject.layers("decoder"))
    states = [t["decoder.0.resid_pre"], *(t[f"decoder.{i}.resid_post"] for i in layers)]
    normed = subject.decoder.norm(torch.cat(states).float())  # (L + 1, T, D)
    return (normed @ subject.head.float().T).log_softmax(-1)


def frozen_norm(norm: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The linear map that a LayerNorm or RMSNorm is at `x` (..., D), its statistics held fixed; without its bias."""
    centred = isinstance(norm, nn.LayerNorm)
    moment = x.var(-1, unbiased=False, keepdim=True) if centred else x.square().mean(-1, keepdim=True)
    scale = norm.weight * (moment + norm.eps).rsqrt()

    def apply(part: Tensor) -> Tensor:
        return (part - part.mean(-1, keepdim=True) if centred else part) * scale

    return apply


@dataclass(frozen=True)
class Attribution:
    """What each addend gives to one token's logit above the mean logit of the vocabulary; their sum is that logit."""

    self_heads: Tensor  # (L, H)
    cross_heads: Tensor  # (L, H)
    mlps: Tensor  # (L,)
    embedding: float
    biases: float  # of all output projections and of the last norm

    @property
    def total(self) -> float:
        return float(self.self_heads.sum() + self.cross_heads.sum() + self.mlps.sum() + self.embedding + self.biases)


@torch.no_grad()
def logit_attribution(subject: Subject, t: Trace, row: int, token: int) -> Attribution:
    """The parts of `token`'s logit at decoder token `row`. `t` must hold ATTRIBUTION_TAPS."""
    layers = subject.layers("decoder")
    norm = subject.decoder.norm
    linear = frozen_norm(norm, t[f"decoder.{layers - 1}.resid_post"][0, row].float())
    direction = subject.head.float()[token] - subject.head.float().mean(0)  # (D,)

    def logit(part: Tensor) -> Tensor:
        return linear(part.float()) @ direction

    heads = {"self": [], "cross": []}
    biases = torch.zeros((), device=direction.device)
    for layer in range(layers):
        for kind, found in heads.items():
            name = f"decoder.{layer}.{kind}"
            found.append(logit(t[f"{name}.head_out"][0, :, row]))  # (H,)
            bias = t.modules[name].out.bias
            biases = biases if bias is None else biases + logit(bias)
    if getattr(norm, "bias", None) is not None:
        biases = biases + norm.bias @ direction
    return Attribution(
        self_heads=torch.stack(heads["self"]).cpu(),
        cross_heads=torch.stack(heads["cross"]).cpu(),
        mlps=torch.stack([logit(t[f"decoder.{i}.mlp.out"][0, row]) for i in range(layers)]).cpu(),
        embedding=float(logit(t["decoder.0.resid_pre"][0, row])),
        biases=float(biases),
    )
