"""Evaluates a policy on held-out prompts: before, after, and the best possible reward at the same KL.

Shapes: P prompts, K samples a prompt, B = P * K responses, n reference samples a prompt.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vqa_scratch.rl.functional import best_of_n_kl, frontier_point
from vqa_scratch.rl.metrics import distinct_2
from vqa_scratch.rl.policy import ActorCritic, Backbone
from vqa_scratch.rl.ppo import PPO
from vqa_scratch.rl.rollout import score
from vqa_scratch.rl.types import Prompt, Samples

AT_ONCE = 32  # prompts whose responses are sampled together


@dataclass(frozen=True)
class Figures:
    """The results of a policy on some prompts."""

    rewards: Tensor  # (B,), raw
    parts: dict[str, Tensor]  # (B,) each, before weights
    samples: Samples
    kl: float  # mean exact KL of a response from the reference, nats
    own: dict[str, float]  # the task's own figures
    greedy: list[tuple[str, float]] = field(default_factory=list)  # the likeliest response to each prompt, its reward

    def summary(self, when: str) -> dict[str, float]:
        """The figures under the keys of summary.json."""
        result = {
            f"reward_{when}": float(self.rewards.mean()),
            f"reward_std_{when}": float(self.rewards.std()) if len(self.rewards) > 1 else 0.0,
            f"finish_{when}": sum(self.samples.finished) / len(self.samples.finished),
            f"distinct_2_{when}": distinct_2(self.samples.ids),
            f"length_{when}": sum(map(len, self.samples.ids)) / len(self.samples.ids),
        }
        result |= {f"{name}_{when}": value for name, value in self.own.items()}
        if self.greedy:
            result[f"greedy_reward_{when}"] = sum(reward for _, reward in self.greedy) / len(self.greedy)
        return result | {f"{name}_{when}": float(value.mean()) for name, value in self.parts.items()}


@torch.no_grad()
def measure(
    ppo: PPO,
    policy: Backbone,
    prompts: list[Prompt],
    samples: int,
    seed: int,
    own: Callable[[Backbone, Samples], dict[str, float]] = lambda policy, samples: {},
    greedy: Callable[[Backbone], list[tuple[str, float]]] = lambda policy: [],
) -> Figures:
    """Sample from `policy` and judge it; the same seed before and after, so that chance is shared.

    `own` are figures that the task adds, of the policy itself or of its samples, `greedy` its likeliest responses.
    """
    generator = torch.Generator(ppo.device).manual_seed(seed)
    with torch.device(ppo.device):  # not `to`, with which FSDP would cut the policy up again
        actor = ActorCritic(policy)  # its values are not looked at
    rewards, parts, kls, gathered = [], [], [], Samples([], [], [], [])
    for start in range(0, len(prompts), AT_ONCE):
        batch = prompts[start : start + AT_ONCE]
        (ids, mask, _), seen, context = ppo.respond(batch, samples, policy, generator)
        with ppo.autocast():
            total, by_part = ppo.reward(seen)
            fixed = ppo.reference.encode(batch).shared_by(samples)
            # One prompt at a time: full logits of both models are large.
            alone = (([i], context.of([i]), fixed.of([i])) for i in range(len(batch)))
            scored = score(actor, ppo.reference, alone, ids, mask, ppo.rules)
        rewards.append(total)
        parts.append(by_part)
        kls.append(scored.exact_kl.sum(1).cpu())
        for name in ("prompts", "ids", "texts", "finished"):
            getattr(gathered, name).extend(getattr(seen, name))
    with ppo.autocast():
        added, likeliest = own(policy, gathered), greedy(policy)
    return Figures(
        torch.cat(rewards),
        {name: torch.cat([p[name] for p in parts]) for name in parts[0]},
        gathered,
        float(torch.cat(kls).mean()),
        added,
        likeliest,
    )


@dataclass(frozen=True)
class Frontier:
    """The best possible reward at each KL, estimated by reweighting reference samples, and what best-of-n reaches."""

    kl: list[float]  # ascending, from 0
    reward: list[float]
    best_of_n: list[tuple[int, float, float]]  # n, KL bound, reward
    limit: float  # log n: no reweighting of n samples has more KL

    def at(self, kl: float) -> float:
        """The reward on the curve at `kl`, by linear interpolation; at most that of the largest KL it knows."""
        return float(np.interp(kl, self.kl, self.reward))

    def share(self, kl: float, before: float, after: float) -> float:
        """The gain of a policy as a share of the best possible gain at its KL (0 where nothing can be gained)."""
        possible = self.at(kl) - self.reward[0]
        return (after - before) / possible if possible > 1e-9 else 0.0


def best_of_n_reward(rewards: Tensor, n: int) -> float:
    """Expected reward of the best of n samples drawn from the m there are: (P, m) -> a mean over prompts, exact.

    The i-th smallest of m is the best of a random n of them with probability C(i - 1, n - 1) / C(m, n).
    """
    m = rewards.shape[1]
    weight = torch.tensor([math.comb(i, n - 1) / math.comb(m, n) for i in range(m)], dtype=torch.float64)
    return float((rewards.double().sort(1).values * weight).sum(1).mean())


def frontier_of(rewards: Tensor, points: int = 40) -> Frontier:
    """The curve from reference rewards (P, n), over prices of KL from far too high to nearly nothing."""
    spread = max(float(rewards.double().std(1).mean()), 1e-6)
    betas = torch.logspace(2.5, -2.5, points, dtype=torch.float64) * spread
    curve = [(0.0, float(rewards.double().mean()))] + [frontier_point(rewards, float(b)) for b in betas]
    n = rewards.shape[1]
    powers = [2**i for i in range(1, 12) if 2**i <= max(2, n // 2)]
    best = [(k, best_of_n_kl(k), best_of_n_reward(rewards, k)) for k in powers]
    kl, reward = zip(*sorted(curve), strict=True)
    return Frontier(list(kl), list(reward), best, math.log(n))


def reference_frontier(ppo: PPO, prompts: list[Prompt], samples: int, seed: int) -> Frontier:
    """Sample the reference `samples` times for each prompt and estimate the curve."""
    generator = torch.Generator(ppo.device).manual_seed(seed)
    rewards = []
    for start in range(0, len(prompts), 8):
        _, seen, _ = ppo.respond(prompts[start : start + 8], samples, ppo.reference, generator)
        with torch.no_grad(), ppo.autocast():
            rewards.append(ppo.reward(seen)[0].view(-1, samples))
    return frontier_of(torch.cat(rewards))
