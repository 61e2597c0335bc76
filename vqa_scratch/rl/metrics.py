"""Computes the metrics of a run, under TRL's names where it has them, and figures of the responses alone.

Shapes: B responses, R response tokens, N real tokens.
"""

import math
import re
from collections import Counter

import torch
from torch import Tensor

from vqa_scratch.rl.functional import kl_estimates, masked_mean, masked_moments, masked_sum, mean_and_var
from vqa_scratch.rl.types import Samples, Trajectory
from vqa_scratch.training.ranks import ALONE, World


def distinct_2(ids: list[list[int]]) -> float:
    """Different bigrams as a share of all bigrams in all responses: falls towards 0 when they become alike."""
    pairs = [pair for row in ids for pair in zip(row, row[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def words(text: str) -> list[str]:
    """Lower-case words and numbers, punctuation left out."""
    return re.findall(r"\w+", text.lower())


def overlap(text: str, reference: str) -> float:
    """Unigram F1 between two texts (ROUGE-1; Lin 2004): twice the shared words over all words."""
    a, b = Counter(words(text)), Counter(words(reference))
    return 2 * (a & b).total() / max(1, a.total() + b.total())


def mean_overlap(samples: Samples) -> float:
    """Mean `overlap` of the responses with the reference responses of their prompts, over those that have one."""
    pairs = [(t, p.reference) for t, p in zip(samples.texts, samples.prompts, strict=True) if p.reference]
    return sum(overlap(*pair) for pair in pairs) / len(pairs)


def rollout_metrics(t: Trajectory, samples: Samples, raw: Tensor, parts: dict[str, Tensor]) -> dict[str, float]:
    """Figures of a batch before any update. KL and entropy are sums over a response, averaged over responses."""
    kl = kl_estimates(t.logprobs, t.ref_logprobs)
    penalty = t.rewards.sum(1) - t.scores
    lengths, queries = t.mask.sum(1).float(), torch.tensor([float(len(p.ids)) for p in samples.prompts])
    _, returns_var = mean_and_var(masked_moments(t.returns, t.mask))
    error = masked_mean((t.values - t.returns).square(), t.mask)
    log = {
        "objective/kl": masked_sum(kl.k1, t.mask, 1).mean(),
        "objective/kl_k3": masked_sum(kl.k3, t.mask, 1).mean(),
        "objective/kl_exact": masked_sum(t.exact_kl, t.mask, 1).mean(),
        "objective/entropy": -masked_sum(t.logprobs, t.mask, 1).mean(),
        "objective/rlhf_reward": t.rewards.sum(1).mean(),
        "objective/non_score_reward": penalty.mean(),
        "ppo/mean_non_score_reward": penalty.sum() / t.mask.sum(),
        "ppo/mean_scores": t.scores.mean(),
        "ppo/std_scores": t.scores.std(),
        "ppo/policy/advantages_mean": masked_mean(t.advantages, t.mask),
        "ppo/returns/mean": masked_mean(t.returns, t.mask),
        "ppo/returns/var": returns_var,
        "ppo/val/mean": masked_mean(t.values, t.mask),
        "ppo/val/var": mean_and_var(masked_moments(t.values, t.mask))[1],
        "ppo/val/var_explained": 1 - error / returns_var.clamp(min=1e-12),
        "tokens/queries_len_mean": queries.mean(),
        "tokens/queries_len_std": queries.std(),
        "tokens/responses_len_mean": lengths.mean(),
        "tokens/responses_len_std": lengths.std(),
        "env/reward_mean": raw.mean(),
        "env/reward_std": raw.std(),
        "finish": t.finished.float().mean(),
        "distinct_2": distinct_2(samples.ids),
    }
    log |= {f"env/{name}": value.mean() for name, value in parts.items()}
    return {name: _number(value) for name, value in log.items()}


def _number(value: float | Tensor) -> float:
    """A float, 0 for what a single response leaves undefined (the std of one number)."""
    value = float(value)
    return value if math.isfinite(value) else 0.0


class UpdateStats:
    """Collects the figures of all optimizer steps of one iteration. Tensors stay on their device until the summary."""

    def __init__(self) -> None:
        self.minibatches: list[dict[str, Tensor]] = []
        self.norms: list[Tensor] = []

    def begin_minibatch(self) -> None:
        self.now: dict[str, Tensor] = {}

    def add(
        self, logprobs: Tensor, values: Tensor, old_logprobs: Tensor, returns: Tensor, tokens: Tensor, **sums: Tensor
    ) -> None:
        """Figures of a part of the minibatch; all tensors (N,), `sums` already divided by the minibatch's tokens."""
        with torch.no_grad():
            d = old_logprobs - logprobs
            ratio = (-d).exp()
            sums |= {
                "k3": (torch.expm1(-d) + d).sum() / tokens,
                "approxkl": 0.5 * d.square().sum() / tokens,
                "policykl": d.sum() / tokens,
                "ratio": ratio.sum() / tokens,
                "ratio_square": ratio.square().sum() / tokens,
                "vpred": values.sum() / tokens,
                "value_error": (values - returns).square().sum() / tokens,
            }
            extremes = {"ratio_max": ratio.max(), "ratio_min": -ratio.min()}
        for name, value in sums.items():
            self.now[name] = self.now.get(name, 0.0) + value.detach()
        for name, value in extremes.items():
            self.now[name] = torch.maximum(self.now[name], value) if name in self.now else value

    def end_minibatch(self, world: World = ALONE) -> float:
        """Close the minibatch, on all ranks; its mean k3 a token against the policy that sampled."""
        if world.size > 1:
            of_ranks = world.gather({name: float(value) for name, value in self.now.items()})
            names = max(of_ranks, key=len)  # a rank that had no prompt in the minibatch has none
            columns = {name: [figures[name] for figures in of_ranks if figures] for name in names}
            self.now = {k: max(v) if k.startswith("ratio_m") else math.fsum(v) for k, v in columns.items()}
        self.minibatches.append(self.now)
        return float(self.now["k3"])

    def gradient_norm(self, norm: Tensor) -> None:
        self.norms.append(norm)

    def summary(self, stopped: bool) -> dict[str, float]:
        """Means over the minibatches seen, extremes of the ratio, and how far the first ratio was from 1."""
        mean = {
            name: float(torch.stack([torch.as_tensor(m[name], dtype=torch.float32) for m in self.minibatches]).mean())
            for name in self.minibatches[0]
        }
        first = self.minibatches[0]
        return {
            "ppo/loss/policy": mean["policy_loss"],
            "ppo/loss/value": mean["value_loss"],
            "ppo/loss/total": mean["total_loss"],
            "ppo/policy/entropy": mean["entropy"],
            "ppo/policy/approxkl": mean["approxkl"],
            "ppo/policy/policykl": mean["policykl"],
            "ppo/policy/k3": mean["k3"],
            "ppo/policy/clipfrac": mean["policy_clipped"],
            "ppo/policy/ratio": mean["ratio"],
            "ppo/policy/ess": mean["ratio"] ** 2 / mean["ratio_square"],
            "ppo/policy/ratio_max": max(float(m["ratio_max"]) for m in self.minibatches),
            "ppo/policy/ratio_min": min(-float(m["ratio_min"]) for m in self.minibatches),
            "ppo/policy/first_ratio_error": max(float(first["ratio_max"]) - 1, 1 + float(first["ratio_min"])),
            "ppo/val/vpred": mean["vpred"],
            "ppo/val/error": mean["value_error"],
            "ppo/val/clipfrac": mean["value_clipped"],
            "ppo/gradient_norm": float(torch.stack(self.norms).mean()) if self.norms else 0.0,
            "ppo/steps": float(len(self.norms)),
            "ppo/stopped_early": float(stopped),
        }
