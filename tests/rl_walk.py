"""A long response with rewards on the way: 48 steps left, on or right around a ring of 7 places that pay differently.

What is still to come depends on the place and on the steps left, and a linear value head sees both, so here a critic
pays. The policy is linear in the same states; its reward and KL are exact sums over the places at each step.
"""

import math

import torch
from rl_toy import EOS, PLAIN, Linear
from torch.nn.functional import pad

from vqa_scratch.rl.options import RLHFOptions
from vqa_scratch.rl.policy import ActorCritic, SamplingRules, freeze
from vqa_scratch.rl.ppo import PPO
from vqa_scratch.rl.rewards import RewardPart, RewardSum
from vqa_scratch.rl.types import Prompt

PLACES, STEPS = 7, 48
DOORS = torch.tensor([[(x + door) % PLACES for door in (-1, 0, 1)] for x in range(PLACES)])  # where each leads
NOISE = torch.Generator().manual_seed(1)
PAYS = torch.randn(PLACES, 1, generator=NOISE) + 0.3 * torch.randn(PLACES, 3, generator=NOISE)  # by place and door
# By step and place: the place, one-hot, and once more times the share of the steps that are left.
STATES = torch.stack([torch.cat([torch.eye(PLACES), (1 - t / STEPS) * torch.eye(PLACES)], 1) for t in range(STEPS)])


def places(ids):
    """(B, R) -> (B, R): the place before each step; all begin at 0."""
    at, seen = torch.zeros_like(ids[:, 0]), []
    for step in ids.clamp(max=2).unbind(1):
        seen.append(at)
        at = DOORS[at, step]
    return torch.stack(seen, 1)


class Walker(Linear):
    """Its state is the place, one-hot, and the end token is one that the rules bar."""

    width = 2 * PLACES

    def __init__(self):
        super().__init__(torch.zeros(self.width, 4))

    def decode_hidden(self, ids, context):
        return STATES[torch.arange(ids.shape[1]), places(pad(ids[:, 1:], (0, 1)))]


def walk_ppo(monkeypatch, seed=0, iterations=15, **options):
    """A run on the ring, ready to iterate; each token brings its reward at once, and the score at the end is 0."""
    options = RLHFOptions(
        **{
            "seed": seed,
            "iterations": iterations,
            "prompts": 4,
            "samples": 2,
            "max_new_tokens": STEPS,
            "min_new_tokens": STEPS,
            "learning_rate": 0.05,
            "value_lr_scale": 20.0,
            "value_clip": 100.0,
        }
        | PLAIN
        | options
    )
    paid = {}

    def reward(samples):
        ids = torch.tensor(samples.ids)
        paid["on the way"] = PAYS[places(ids), ids]
        return torch.zeros(len(samples.ids))

    from vqa_scratch.rl import functional

    at_the_end = functional.get_rewards
    monkeypatch.setattr(functional, "get_rewards", lambda *given: at_the_end(*given) + paid["on the way"])
    return PPO(
        options,
        ActorCritic(Walker()),
        freeze(Walker()),
        RewardSum([RewardPart("places", 1.0, reward)]),
        [Prompt("nothing")] * options.prompts,
        SamplingRules(EOS, STEPS, STEPS),
        decode=lambda ids: " ".join(map(str, ids)),
    )


def objective(table, beta):
    """Exact E[rewards] - beta * KL from the uniform reference: the places' probabilities step by step."""
    at, total = torch.eye(PLACES, dtype=torch.float64)[0], 0.0
    for states in STATES:
        logp = (states @ table.detach())[:, :3].double().log_softmax(-1)
        total += float(at @ (logp.exp() * (PAYS - beta * (logp + math.log(3)))).sum(-1))
        at = torch.zeros_like(at).index_add(0, DOORS.flatten(), (at[:, None] * logp.exp()).flatten())
    return total


def best_objective(beta):
    """The largest there is, over policies that may also count their steps: backwards, by soft maxima."""
    to_go = torch.zeros(PLACES, dtype=torch.float64)
    for _ in range(STEPS):
        to_go = beta * (((PAYS + to_go[DOORS]) / beta).logsumexp(-1) - math.log(3))
    return float(to_go[0])
