"""Computes the metrics of a run, under TRL's names where it has them, and figures of the responses alone.

Shapes: B responses, R response tokens, N real tokens.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from vqa_scratch.data.news import broken_facts
from vqa_scratch.rl.functional import kl_estimates, masked_mean, masked_moments, masked_sum, mean_and_var
from vqa_scratch.rl.types import Samples, Trajectory
from vqa_scratch.training.ranks import ALONE, World


def distinct_2(ids: list[list[int]]) -> float:
    """Different bigrams as a share of all bigrams in all responses: falls towards 0 when they become alike."""
    pairs = [pair for row in ids for pair in zip(row, row[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def overlap(text: str, reference: str) -> float:
    """Unigram F1 between two texts (ROUGE-1; Lin 2004): twice the shared words over all words, in lower case."""
    a, b = (Counter(re.findall(r"\w+", one.lower())) for one in (text, reference))
    return 2 * (a & b).total() / max(1, a.total() + b.total())


def mean_overlap(samples: Samples) -> float:
    """Mean `overlap` of the responses with the reference responses of their prompts, over those that have one."""
    pairs = [(t, p.reference) for t, p in zip(samples.texts, samples.prompts, strict=True) if p.reference]
    return sum(overlap(*pair) for pair in pairs) / len(pairs)


def facts_kept(samples: Samples) -> dict[str, float]:
    """The share of responses that keep all facts of their prompts, `facts_kept`, and each alone, such as `who_kept`.

    Over the prompts whose facts are known; nothing if there are none.
    """
    known = [(t, p.facts) for t, p in zip(samples.texts, samples.prompts, strict=True) if p.facts]
    broken = [broken_facts(text, facts) for text, facts in known]
    kinds = [kind for _, facts in known[:1] for kind in facts]
    shares = {"facts_kept": [not lost for lost in broken]} if broken else {}
    shares |= {f"{kind}_kept": [kind not in lost for lost in broken] for kind in kinds}
    return {name: sum(kept) / len(kept) for name, kept in shares.items()}


def rollout_metrics(t: Trajectory, samples: Samples, raw: Tensor, parts: dict[str, Tensor]) -> dict[str, float]:
    """Figures of a batch before any update. KL and entropy are sums over a response, averaged over responses."""
    kl = kl_estimates(t.logprobs, t.ref_logprobs)
    penalty = t.rewards.sum(1) - t.scores
    lengths, queries = t.mask.sum(1).float(), torch.tensor([float(len(p.ids)) for p in samples.prompts])
    _, returns_var = mean_and_var(masked_moments(t.returns, t.mask))
    explained = [
        1 - masked_mean((known - t.returns).square(), t.mask) / returns_var.clamp(min=1e-12)
        for known in (t.baseline, t.values)
    ]
    log: dict[str, float | Tensor] = {
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
        "ppo/val/var_explained": explained[0],
        "ppo/val/critic_explained": explained[1],
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
    log |= {name: share for name, share in facts_kept(samples).items() if name == "facts_kept"}
    return {name: _number(value) for name, value in log.items()}


def _number(value: float | Tensor) -> float:
    """A float, 0 for what a single response leaves undefined (the std of one number)."""
    value = float(value)
    return value if math.isfinite(value) else 0.0


class UpdateStats:
    """Collects the figures of all optimizer steps of one iteration, under their names in the log.

    Tensors stay on their device until the summary.
    """

    def __init__(self) -> None:
        self.minibatches: list[Mapping[str, float | Tensor]] = []
        self.now: dict[str, Tensor] = {}  # of the minibatch that is under way
        self.norms: list[Tensor] = []  # of the gradient, of each step

    def add(
        self, logprobs: Tensor, values: Tensor, old_logprobs: Tensor, returns: Tensor, tokens: Tensor, **sums: Tensor
    ) -> None:
        """Figures of a part of the minibatch; all tensors (N,), `sums` already divided by the minibatch's tokens."""
        with torch.no_grad():
            kl = kl_estimates(old_logprobs, logprobs)
            ratio = (-kl.k1).exp()
            sums |= {
                "ppo/policy/k3": kl.k3.sum() / tokens,
                "ppo/policy/approxkl": kl.k2.sum() / tokens,
                "ppo/policy/policykl": kl.k1.sum() / tokens,
                "ppo/policy/ratio": ratio.sum() / tokens,
                "ratio_square": ratio.square().sum() / tokens,
                "ppo/val/vpred": values.sum() / tokens,
                "ppo/val/error": (values - returns).square().sum() / tokens,
            }
            extremes = {"ratio_max": ratio.max(), "minus_ratio_min": -ratio.min()}
        for name, value in sums.items():
            self.now[name] = self.now.get(name, 0.0) + value.detach()
        for name, value in extremes.items():
            self.now[name] = torch.maximum(self.now[name], value) if name in self.now else value

    def end_minibatch(self, world: World = ALONE) -> float:
        """Close the minibatch, on all ranks; its mean k3 a token against the policy that sampled."""
        now: Mapping[str, float | Tensor] = self.now
        self.now = {}
        if world.size > 1:
            of_ranks = world.gather({name: float(value) for name, value in now.items()})
            names = max(of_ranks, key=len)  # a rank that had no prompt in the minibatch has none
            columns = {name: [figures[name] for figures in of_ranks if figures] for name in names}
            now = {k: max(v) if k in ("ratio_max", "minus_ratio_min") else math.fsum(v) for k, v in columns.items()}
        self.minibatches.append(now)
        return float(now["ppo/policy/k3"])

    def summary(self, stopped: bool) -> dict[str, float]:
        """Means over the minibatches seen, extremes of the ratio, and how far the first ratio was from 1."""
        columns = {name: torch.tensor([float(m[name]) for m in self.minibatches]) for name in self.minibatches[0]}
        most, least = columns.pop("ratio_max"), -columns.pop("minus_ratio_min")
        mean = {name: float(column.mean()) for name, column in columns.items()}
        square = mean.pop("ratio_square")
        return mean | {
            "ppo/policy/ess": mean["ppo/policy/ratio"] ** 2 / square,
            "ppo/policy/ratio_max": float(most.max()),
            "ppo/policy/ratio_min": float(least.min()),
            "ppo/policy/first_ratio_error": max(float(most[0]) - 1, 1 - float(least[0])),
            "ppo/gradient_norm": float(torch.stack(self.norms).mean()) if self.norms else 0.0,
            "ppo/steps": float(len(self.norms)),
            "ppo/stopped_early": float(stopped),
        }
