"""What Mixtral, Qwen2-MoE and OLMoE have beside a Llama: experts in place of MLPs, and OLMoE's norms of q and k.

Mixtral (Jiang et al. 2024, arXiv 2401.04088), Qwen2-MoE (Yang et al. 2024, arXiv 2407.10671), OLMoE (Muennighoff et al.
2024, arXiv 2409.02060).

Shapes: H heads, T tokens, d head size, D width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.models.hf_config import fields_from_hf
from vqa_scratch.nn.experts import Choice, MixtureOfExperts, Router, SharedExpert
from vqa_scratch.nn.rms_norm import RMSNorm
from vqa_scratch.storage import typed
from vqa_scratch.weights import fields


@dataclass(frozen=True)
class Mixture:
    """The experts of a decoder. The defaults are those of Mixtral 8x7B."""

    experts: int = 8
    per_token: int = 2
    hidden: int = 14336  # inner width of each
    renormalise: bool = True  # the weights of a token sum to 1
    shared_hidden: int | None = None  # inner width of the expert that every token reads; None: there is none
    every: int = 1  # so many layers, the last of them, has experts ...
    dense_layers: tuple[int, ...] = ()  # ... but these, from 0, have an MLP
    biased: bool = False  # the router has a bias, with which `move_biases` balances loads

    def __post_init__(self) -> None:
        self.choice  # noqa: B018  raises if there are too few experts

    @property
    def choice(self) -> Choice:
        return Choice(self.experts, self.per_token, self.renormalise)

    def has(self, layer: int) -> bool:
        """Whether this layer has experts."""
        return (layer + 1) % self.every == 0 and layer not in self.dense_layers

    def make(self, dim: int, mlp: Callable[[int], nn.Module]) -> MixtureOfExperts:
        """New experts for a layer; `mlp` makes an MLP of an inner width."""
        router = Router(dim, self.choice, biased=self.biased)
        shared = None if self.shared_hidden is None else SharedExpert(dim, mlp(self.shared_hidden))
        return MixtureOfExperts(router, (mlp(self.hidden) for _ in range(self.experts)), shared)


# By model type: our fields and those in config.json, and what holds where it has none.
MIXTURES: dict[str, tuple[dict[str, str], Mixture]] = {
    "mixtral": (fields.MIXTRAL_EXPERTS, Mixture()),
    "qwen2_moe": (fields.QWEN2_MOE_EXPERTS, Mixture(60, 4, 1408, renormalise=False, shared_hidden=5632)),
    "olmoe": (fields.OLMOE_EXPERTS, Mixture(64, 8, 2048, renormalise=False)),
    "gpt2_experts": (fields.GPT2_EXPERTS, Mixture()),  # no released one
}


def mixture_from_hf(config: Mapping[str, Any]) -> Mixture | None:
    """The experts of a config.json; None for a model type without. Raises UserError as `fields_from_hf` does."""
    if config.get("model_type") not in MIXTURES:
        return None
    names, usual = MIXTURES[config["model_type"]]
    (dense,) = typed("config.json", config, {"mlp_only_layers": list | None})
    if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in dense or ()):
        raise UserError(f"config.json: mlp_only_layers must be a list of layers, from 0, not {dense!r}")
    return replace(usual, dense_layers=tuple(dense or ()), **fields_from_hf(config, names, Mixture))


def mixture_to_hf(mixture: Mixture | None, layout: str) -> dict[str, Any]:
    """The inverse of `mixture_from_hf`. Raises UserError for experts that a file of this layout cannot describe."""
    if mixture is None:
        return {}
    found = {theirs: getattr(mixture, ours) for ours, theirs in MIXTURES.get(layout, ({}, mixture))[0].items()}
    if layout == "qwen2_moe":
        found["mlp_only_layers"] = list(mixture.dense_layers)
    if mixture_from_hf({"model_type": layout, **found}) != mixture:
        raise UserError(f"a model of type {layout!r} has no such experts: {mixture}")
    return found


class Clipped(nn.Module):
    """Each number brought into -limit ... limit."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(-self.limit, self.limit)


class AcrossHeads(nn.Module):
    """RMSNorm of heads (..., H, T, d) as one vector of H * d numbers a token; `after` is done to what it gives."""

    def __init__(self, width: int, eps: float, after: nn.Module) -> None:
        super().__init__()
        self.norm, self.after = RMSNorm(width, eps), after

    def forward(self, x: Tensor) -> Tensor:
        whole = self.norm(x.transpose(-3, -2).flatten(-2))
        return self.after(whole).unflatten(-1, (x.shape[-3], -1)).transpose(-3, -2)
