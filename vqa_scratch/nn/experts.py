"""Mixture of experts: of many MLPs a router chooses a few for each token (Shazeer et al. 2017, arXiv 1701.06538).

Apart from each other: the router, the dispatch of tokens, and the experts, which are any modules. No token is dropped,
however many choose one expert (as in MegaBlocks, Gale et al. 2022, arXiv 2211.15841), and padding is not routed. Each
expert has its own weights and its own products: on a CPU a loop over them takes as long as torch's grouped product of
stacked weights, an optimizer sees matrices, and a decoding step reads those of the chosen experts only.

Losses that spread tokens over experts are functions of what routers decided. A system's loss, which returns a sum
over the labelled tokens of a part and their number, adds them so:

    with routings(model) as found:
        loss, tokens = ...  # as without experts
    loss = loss + tokens * (0.01 * balance_loss(found) + 0.001 * z_loss(found))

The step divides by the tokens of all parts and ranks, which makes it the mean over parts, weighted by their tokens.

Shapes: B rows, T tokens, N = B * T, D width, E experts, k of them a token, L layers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.nn import taps

softmax: Callable[[Tensor], Tensor] = partial(torch.softmax, dim=-1)


@dataclass(frozen=True)
class Choice:
    """From the logits of a router to k experts and their weights.

    Chosen are the largest scores, weighed is by the scores. Mixtral (arXiv 2401.04088): the softmax, renormalised.
    OLMoE (2409.02060), Qwen2-MoE, and with k = 1 Switch (2101.03961): not renormalised. DeepSeek-V3 (2412.19437,
    equations 12 to 16): `torch.sigmoid`, renormalised, in groups. Llama 4: `torch.sigmoid`, as it is.
    Raises UserError for numbers that cannot be.
    """

    experts: int
    per_token: int
    renormalise: bool = False  # weights of a token sum to `scale`
    score: Callable[[Tensor], Tensor] = softmax  # logits (..., E) -> scores (..., E)
    groups: int = 1  # of neighbouring experts; of these
    groups_kept: int = 1  # are open to a token: those whose two largest scores have the largest sum
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.experts:
            raise UserError(f"{self.per_token} experts a token of {self.experts}: must be from 1 to {self.experts}")
        size = self.experts // self.groups
        if self.groups > 1 and (self.experts % self.groups or size < 2 or self.per_token > self.groups_kept * size):
            raise UserError(
                f"{self.experts} experts in {self.groups} groups, {self.groups_kept} of them open: too few for "
                f"{self.per_token} experts a token, or not groups of at least 2"
            )

    def __call__(self, scores: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scores (..., E) -> the chosen experts and their weights, (..., k) both, the best first.

        A bias (E,) is added to the scores that choose, not to those that weigh.
        """
        ranked = scores.detach() if bias is None else scores.detach() + bias
        if self.groups > 1:
            grouped = ranked.unflatten(-1, (self.groups, -1))
            best = grouped.topk(2).values.sum(-1).topk(self.groups_kept).indices
            is_open = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
            ranked = grouped.masked_fill(~is_open[..., None], -torch.inf).flatten(-2)
        chosen = ranked.topk(self.per_token).indices
        weights = scores.gather(-1, chosen)
        if self.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * self.scale


class Routing(NamedTuple):
    """What a router decided about tokens (..., ): B x T of them, or rows of one."""

    logits: Tensor  # (..., E) in fp32
    scores: Tensor  # (..., E) in fp32
    chosen: Tensor  # (..., k), the numbers of the experts; E, which is none, for padding
    weights: Tensor  # (..., k) in fp32

    @property
    def real(self) -> Tensor:
        """(...,) bool: False for padding."""
        return self.chosen[..., 0] < self.logits.shape[-1]

    @property
    def load(self) -> Tensor:
        """(E,) how many tokens chose each expert."""
        experts = self.logits.shape[-1]
        return self.chosen.flatten().bincount(minlength=experts + 1)[:experts]


class Router(taps.Tapped):
    """One linear map, in fp32 under autocast too, and a `Choice`.

    With `biased` it has a buffer `bias` that `move_biases` balances loads with (Wang et al. 2024, arXiv 2408.15664).
    """

    bias: Tensor | None

    def __init__(self, dim: int, choice: Choice, *, biased: bool = False) -> None:
        super().__init__()
        self.choice, self.gate = choice, nn.Linear(dim, choice.experts, bias=False)
        self.register_buffer("bias", torch.zeros(choice.experts) if biased else None)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Routing:
        """States (..., D), real (...,) bool, False for padding. Raises UserError for logits that are no numbers."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.gate.weight.float())
        if not bool(logits.isfinite().all()):
            raise UserError(
                f"{self.tap_prefix or 'a router'}: its logits are NaN or infinite, so no expert can be chosen; "
                "the weights are damaged, or training has diverged (a lower learning rate would help)"
            )
        experts, name = self.choice.experts, self.tap_prefix
        scores = taps.tap(name, "probabilities", self.choice.score(logits))
        chosen, weights = self.choice(scores, self.bias)
        if real is not None:
            chosen = chosen.masked_fill(~real[..., None], experts)
        if taps.wanted(name, "weights"):  # of all experts, 0 for those not chosen
            spread = weights.new_zeros(*logits.shape[:-1], experts + 1).scatter(-1, chosen, weights)[..., :experts]
            weights = F.pad(taps.tap(name, "weights", spread), (0, 1)).gather(-1, chosen)
        return Routing(logits, scores, chosen, weights)


def dispatch(x: Tensor, routing: Routing, experts: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """Tokens (N, D) -> the weighted sums (N, D) of what their experts say; zeros for padding.

    Each expert runs once, on all tokens that chose it. The k addends of a token are summed in fp32, the best expert's
    first, whatever else is in the batch.
    """
    k = routing.chosen.shape[-1]
    loads = routing.load.tolist()
    places = routing.chosen.flatten().argsort(stable=True)[: sum(loads)]  # of the N * k choices, by expert
    pieces = x.index_select(0, places // k).split(loads)
    # With gradients all experts run, if only on no token: ranks wait for the gradient of each parameter.
    run = [expert(own) for expert, own in zip(experts, pieces, strict=True) if len(own) or torch.is_grad_enabled()]
    said = torch.cat(run) if run else x[:0]
    by_choice = said.new_zeros(len(x) * k, x.shape[1]).index_copy(0, places, said).unflatten(0, (-1, k))
    weights = routing.weights.view(-1, k, 1)
    total = by_choice[:, 0] * weights[:, 0]
    for choice in range(1, k):
        total = total + by_choice[:, choice] * weights[:, choice]
    return total.to(said.dtype)


class SharedExpert(nn.Module):
    """An expert for every token, times a sigmoid that the token sets (Qwen2-MoE, arXiv 2407.10671)."""

    def __init__(self, dim: int, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.share = mlp, nn.Linear(dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.share(x)) * self.mlp(x)


class MixtureOfExperts(taps.Tapped):
    """The weighted sum of the experts that the router chooses, plus `shared` if there is one: (B, T, D) -> (B, T, D).

    Raises ValueError unless there are as many experts as the router chooses among.
    """

    def __init__(self, router: Router, experts: Iterable[nn.Module], shared: nn.Module | None = None) -> None:
        super().__init__()
        # No ModuleList: those hold blocks, which are sharded and computed again one by one.
        self.experts = nn.ModuleDict({str(number): expert for number, expert in enumerate(experts)})
        self.router, self.shared = router, shared
        if len(self.experts) != router.choice.experts:
            raise ValueError(f"{len(self.experts)} experts, but the router chooses among {router.choice.experts}")

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """real (B, T) bool, False for padding."""
        routing = self.router(x, real)
        out = dispatch(x.flatten(0, 1), routing, [*self.experts.values()]).view(x.shape)
        return taps.tap(self.tap_prefix, "out", out if self.shared is None else out + self.shared(x))


# ------------------------------------------------------------------------------------------------- spreading tokens


@contextmanager
def routings(model: nn.Module) -> Iterator[list[Routing]]:
    """Inside this context the list receives what each router of `model` decides, in order. Leave it before the backward
    pass: blocks that gradient checkpointing computes again decide again."""
    found: list[Routing] = []
    routers = [module for module in model.modules() if isinstance(module, Router)]
    hooks = [router.register_forward_hook(lambda module, given, routing: found.append(routing)) for router in routers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def balance_loss(found: Sequence[Routing]) -> Tensor:
    """E * sum_i f_i P_i, the mean over layers (Fedus et al. 2021, arXiv 2101.03961, equation 4): f_i tokens that chose
    expert i, a token, P_i its mean probability. k if loads are equal, E if all tokens choose the same k alone.

    f has no gradient. Of one pass, its padding left out; 0 where there is no token.
    """
    losses = []
    for routing in found:
        scores = routing.scores[routing.real]  # (N, E)
        likely = (scores / scores.sum(-1, keepdim=True)).sum(0)
        losses.append(scores.shape[1] * (routing.load * likely).sum() / max(1, len(scores)) ** 2)
    return torch.stack(losses).mean()


def z_loss(found: Sequence[Routing]) -> Tensor:
    """The mean over layers and tokens of logsumexp(logits)^2, which keeps logits small (Zoph et al. 2022, arXiv
    2202.08906, equation 5)."""
    squares = [routing.logits[routing.real].logsumexp(-1).square() for routing in found]
    return torch.stack([square.sum() / max(1, len(square)) for square in squares]).mean()


def loads(found: Sequence[Routing]) -> Tensor:
    """(L, E): the tokens that chose each expert of each layer. Those of parts and of ranks add up."""
    return torch.stack([routing.load for routing in found])


@torch.no_grad()
def move_biases(model: nn.Module, loads: Tensor, rate: float = 0.001) -> None:
    """Balance without a loss (Wang et al. 2024, arXiv 2408.15664, algorithm 1): an expert with less than the mean load
    is chosen more easily from now on. Call it once a step, after the optimizer, with the loads (L, E) of all its parts
    and ranks, so that all ranks do the same.

    The mean of a router's biases stays 0: only their differences choose.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router, load in zip(routers, loads.float(), strict=True):
        if router.bias is None:
            raise ValueError("biases are those of a Router(..., biased=True)")
        router.bias += rate * (load.mean() - load).sign()
        router.bias -= router.bias.mean()
