"""The mathematics of PPO for language models: pure functions on tensors and masks, without a model or state.

Follows Schulman et al. 2017 (PPO, arXiv 1707.06347), Schulman et al. 2016 (GAE, 1506.02438), Ziegler et al. 2019
(language models, 1909.08593), Schulman 2020 (KL estimators), Ahmadian et al. 2024 (RLOO, 2402.14740), Shao et al. 2024
(GRPO, 2402.03300) and Rafailov et al. 2023 (DPO, 2305.18290). `docs/ppo.md` numbers every choice.

Shapes: B responses, R response tokens, V vocabulary, N any number of token positions, G responses to one prompt.
Masks are True for the real tokens of a response, its end-of-sequence token included, and False for the padding after.
Rewards, log-probabilities and KL are in nats; nothing depends on the content of padding.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

# ------------------------------------------------------------------------------------------------ masked statistics


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `x` over the True places of `mask`; the False places have no effect, even if they hold NaN."""
    kept = x.masked_fill(~mask.bool(), 0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` over the True places of `mask`; 0 if there are none."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_moments(x: Tensor, mask: Tensor) -> Tensor:
    """`(count, sum, sum of squares)` in float64; the moments of parts add up to those of the whole."""
    kept = x.detach().double().masked_fill(~mask.bool(), 0)
    return torch.stack([mask.sum().double(), kept.sum(), kept.square().sum()])


def mean_and_var(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (Bessel-corrected where there are two values or more) from `masked_moments`."""
    count, total, squares = moments.unbind()
    mean = total / count.clamp(min=1)
    var = (squares / count.clamp(min=1) - mean.square()).clamp(min=0)
    return mean, var * count / (count - 1).clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """`(x - mean) / sqrt(var + eps)` over the True places, 0 elsewhere; `shift_mean=False` adds the mean again."""
    mean, var = mean_and_var(masked_moments(x, mask))
    mean, var = mean.to(x.dtype), var.to(x.dtype)
    white = (x - mean) * torch.rsqrt(var + eps)
    if not shift_mean:
        white = white + mean
    return white.masked_fill(~mask.bool(), 0)


# ---------------------------------------------------------------------------------------------------------------- KL


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(policy || reference) over the whole vocabulary: (..., V), (..., V) -> (...). Never negative.

    Summed over the tokens of sampled responses it is an unbiased estimate of the sequence KL, with far less noise
    than the log-ratios of the sampled tokens alone.
    """
    logp, logq = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1).clamp(min=0)


class KLEstimates(NamedTuple):
    """Estimates of KL(policy || reference) for tokens sampled from the policy, each (B, R) like its inputs."""

    k1: Tensor  # d: unbiased, may be negative; the one that goes into the reward
    k2: Tensor  # d^2 / 2: biased, but its gradient is that of the reverse KL; the one to use as a loss
    k3: Tensor  # exp(-d) - 1 + d: unbiased, never negative; the one for early stopping


def kl_estimates(logprobs: Tensor, ref_logprobs: Tensor) -> KLEstimates:
    """The three estimators of Schulman 2020 from `d = log p(token) - log q(token)`."""
    d = logprobs - ref_logprobs
    return KLEstimates(k1=d, k2=0.5 * d.square(), k3=torch.expm1(-d) + d)


class AdaptiveKL:
    """Proportional controller of the KL coefficient (Ziegler et al. 2019, section 2.2).

    `coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon`, where `n` is the number of responses seen since the
    last call. With `target=None` the coefficient is fixed.
    """

    def __init__(self, coef: float, target: float | None = None, horizon: float = 10_000.0):
        if coef < 0 or (target is not None and target <= 0) or horizon <= 0:
            raise ValueError(f"KL coefficient, target and horizon must be positive, not {coef}, {target} and {horizon}")
        self.coef, self.target, self.horizon = float(coef), target, float(horizon)

    def update(self, kl: float, n: int) -> float:
        """Take the mean sequence KL of `n` new responses and return the new coefficient."""
        if self.target is not None:
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            self.coef *= 1.0 + error * n / self.horizon
        return self.coef


# ------------------------------------------------------------------------------------------ rewards and advantages


def last_token(mask: Tensor) -> Tensor:
    """Index of the last real token of each response: (B, R) -> (B,). Every response must have one token or more."""
    if not bool(mask.bool().any(-1).all()):
        raise ValueError("a response without a single real token has no place for its reward")
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (mask.long() * positions).amax(-1)


def get_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Per-token rewards (B, R): `-kl_coef * k1` at every real token, plus `scores` (B,) at the last one."""
    rewards = (-kl_coef * (logprobs - ref_logprobs)).masked_fill(~mask.bool(), 0)
    return rewards.scatter_add(1, last_token(mask).unsqueeze(1), scores.to(rewards.dtype).unsqueeze(1))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: (B, R) x 3 -> advantages (B, R), returns (B, R), both 0 at padding.

    `delta_t = r_t + gamma * V_{t+1} - V_t` with V = 0 after the end, `A_t = delta_t + gamma * lam * A_{t+1}`,
    `returns = A + V`.
    """
    padding = ~mask.bool()
    rewards, values = rewards.masked_fill(padding, 0), values.masked_fill(padding, 0)
    advantages = torch.zeros_like(rewards)
    following_value = following_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        following_advantage = delta + gamma * lam * following_advantage
        advantages[:, t] = following_advantage
        following_value = values[:, t]
    advantages = advantages.masked_fill(padding, 0)
    return advantages, advantages + values


def fitted_baseline(known: Sequence[Tensor], returns: Tensor, mask: Tensor, prompts: int) -> Tensor:
    """What of a constant, the number of the token and all that is `known` fits the returns best: (B, R) each -> (B, R).

    Least squares over the tokens of all other prompts, for each prompt anew. So no response has a say in what is
    subtracted from it, and the policy gradient keeps its mean, whatever is known (Greensmith, Bartlett and Baxter 2004,
    JMLR 5, on baselines as control variates). What explains nothing gets a weight near 0. With the mean of a prompt's
    other responses known this shrinks it towards that of the batch, as Zeng et al. 2025 (2511.03710) do by James and
    Stein's rule.
    """
    columns = [torch.ones_like(returns), mask.cumsum(1), *known, returns]
    table = torch.stack(columns, -1).double().masked_fill(~mask.bool()[..., None], 0)
    x, y = table.view(prompts, -1, len(columns)).split([len(columns) - 1, 1], -1)  # (P, tokens of the prompt, ...)
    products, moments = x.mT @ x, x.mT @ y
    products, moments = products.sum(0) - products, moments.sum(0) - moments
    ridge = 1e-6 * products.diagonal(dim1=1, dim2=2) + 1e-12  # for what is 0 everywhere, or the same as the constant
    fitted = x @ torch.linalg.solve(products + ridge.diag_embed(), moments)
    return fitted.view_as(returns).to(returns.dtype)


def _grouped(returns: Tensor, group: int) -> Tensor:
    if group < 2 or returns.shape[0] % group:
        raise ValueError(f"{returns.shape[0]} responses do not form groups of {group}; groups of 2 or more are needed")
    return returns.view(-1, group)


def others_mean(returns: Tensor, group: int) -> Tensor:
    """Mean return of the other responses to the same prompt: (B,) -> (B,); neighbours form the groups."""
    r = _grouped(returns, group)
    return ((r.sum(1, keepdim=True) - r) / (group - 1)).flatten()


def rloo_advantages(returns: Tensor, group: int) -> Tensor:
    """Reward minus the mean of the other responses to the same prompt: (B,) -> (B,)."""
    return returns - others_mean(returns, group)


def grpo_advantages(returns: Tensor, group: int, eps: float = 1e-4) -> Tensor:
    """`(reward - group mean) / (group std + eps)`: (B,) -> (B,). A group whose rewards are all equal gives 0."""
    r = _grouped(returns, group)
    return ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + eps)).flatten()


def best_of_n_advantages(returns: Tensor, group: int) -> Tensor:
    """1 for the best response of each group, 0 for the others: the update imitates best-of-n sampling (RAFT)."""
    r = _grouped(returns, group)
    return torch.zeros_like(r).scatter_(1, r.argmax(1, keepdim=True), 1.0).flatten()


# ------------------------------------------------------------------------------------------------------------- losses


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 3.0,
    tokens: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate loss -> (loss (), share of tokens whose clip is active ()).

    `max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))`, and where A < 0 at most `-A * dual_clip` (Ye et al. 2020,
    1912.09729). The log-ratio is clamped to +-20. The sum over real tokens is divided by `tokens`, their number in the
    whole minibatch, so that parts of a minibatch add up to it exactly; default: the number in `mask`.
    """
    ratio = (logprobs - old_logprobs).clamp(-20.0, 20.0).exp()
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = torch.maximum(free, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    count = mask.sum() if tokens is None else tokens
    return masked_sum(loss, mask) / count, masked_sum((clipped > free).float(), mask).detach() / count


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float | Tensor = 0.2,
    tokens: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """`0.5 * max((V - R)^2, (clip(V, V_old +- clip) - R)^2)` -> (loss (), share of tokens whose clip is active ()).

    `clip` is in the units of the values; `tokens` as in `ppo_policy_loss`.
    """
    near = torch.clamp(values, old_values - clip, old_values + clip)
    free, clipped = (values - returns).square(), (near - returns).square()
    count = mask.sum() if tokens is None else tokens
    loss = 0.5 * masked_sum(torch.maximum(free, clipped), mask) / count
    return loss, masked_sum((clipped > free).float(), mask).detach() / count


# ------------------------------------------------------------------------------------------------- preferences (DPO)


def preferences(scores: Tensor) -> Tensor:
    """The chance that a response is preferred to the other of its pair, neighbours (B,) -> (B,): sigmoid of the
    difference of their scores (Bradley and Terry 1952)."""
    pairs = scores.view(-1, 2)
    return torch.sigmoid(pairs - pairs.flip(1)).flatten()


def dpo_loss(
    logratios: Tensor, preferred: Tensor, beta: float, pairs: Tensor | float | None = None
) -> tuple[Tensor, Tensor]:
    """Loss of direct preference optimisation (Rafailov et al. 2023, equation 7) -> (loss (), share of right orders ()).

    logratios (B,): log pi(response) - log reference(response), neighbours are a pair; preferred (B,): the chance that
    each is preferred, 0 or 1 where it is known. The cross-entropy of these chances against sigmoid(beta * difference of
    the log-ratios): if they are `preferences` of scores, its least value is at pi ~ reference * exp(score / beta),
    PPO's optimum at that price. The sum is divided by `pairs`, by default their number here.
    """
    ratios, chance = logratios.view(-1, 2), preferred.view(-1, 2)[:, 0]
    margin = beta * (ratios[:, 0] - ratios[:, 1])
    count = len(margin) if pairs is None else pairs
    losses = chance * softplus(-margin) + (1 - chance) * softplus(margin)
    return losses.sum() / count, (margin * (chance - 0.5) > 0).float().sum() / count


# ---------------------------------------------------------------------------------------- what could be reached at best


def best_of_n_kl(n: int) -> float:
    """Upper bound on the KL of best-of-n sampling against its own sampler: `log n - (n - 1) / n`."""
    return math.log(n) - (n - 1) / n


def frontier_point(rewards: Tensor, beta: float) -> tuple[float, float]:
    """The best trade of reward for KL at price `beta`, estimated from reference samples.

    `rewards` (P, n): n samples of the reference for each of P prompts. The optimal policy reweights them by
    `w = softmax(reward / beta)`; returns (mean KL = log n + sum w log w, mean of sum w * reward). With n samples the KL
    cannot pass log n, and both numbers are biased low near it.
    """
    rewards = rewards.double()
    log_w = (rewards / beta).log_softmax(-1)
    kl = math.log(rewards.shape[-1]) + (log_w.exp() * log_w).sum(-1)
    return float(kl.mean()), float((log_w.exp() * rewards).sum(-1).mean())
