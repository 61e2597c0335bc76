"""A language model small enough to enumerate: 4 tokens of which 3 is the end, at most 3 of them, 13 prefixes.

Its logits are a table with a row for each prefix, so the best trade of reward for KL is known exactly. It goes through
the shipped sampler, scorer, reward, advantages and update; nothing of PPO is written here a second time.
"""

import itertools
import math

import numpy as np
import torch
from torch import nn

from vqa_scratch.rl.options import RLHFOptions
from vqa_scratch.rl.policy import ActorCritic, Context, Part, SamplingRules, freeze
from vqa_scratch.rl.ppo import PPO
from vqa_scratch.rl.rewards import RewardPart, RewardSum
from vqa_scratch.rl.types import Prompt

EOS, LONGEST = 3, 3
PREFIXES = [p for n in range(LONGEST) for p in itertools.product(range(3), repeat=n)]
SEQUENCES = sorted(
    s
    for n in range(1, LONGEST + 1)
    for s in itertools.product(range(4), repeat=n)
    if EOS not in s[:-1] and (s[-1] == EOS or n == LONGEST)
)


# Nothing that keeps a policy from an optimum that is known.
PLAIN = {"warmup_steps": 0, "max_grad_norm": math.inf, "early_stop_kl": 0.0}
PLAIN |= {"scale_reward": False, "score_clip": 0.0, "missing_eos_penalty": 0.0}


class PrefixState:
    """A state of decoding: the tokens so far are all that a table needs to know."""

    def __init__(self, table, rows):
        self.table, self.ids = table, torch.zeros(rows, 0, dtype=torch.long)

    def step(self, tokens):
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        return self.table.logits(self.table.decode_hidden(self.ids, None)[:, -1])

    def keep(self, rows):
        self.ids = self.ids[rows]


class Linear(nn.Module):
    """A backbone that is one matrix; subclasses say what its states are, in `decode_hidden`.

    Padding and start are id 0, which is a real token too.
    """

    start_id, eos_id, pad_id = 0, EOS, 0

    def __init__(self, logits):
        super().__init__()
        self.table = nn.Parameter(logits.clone())

    def encode(self, prompts):
        return Context((Part(torch.zeros(len(prompts), 1, 1)),))

    def begin(self, context, steps):
        state = PrefixState(self, context.rows)
        return state.step(torch.full((context.rows,), self.start_id)), state

    def logits(self, hidden):
        return hidden @ self.table

    def encoder_parameters(self):
        return []


class Table(Linear):
    """Its state is the prefix itself, one-hot."""

    width = len(PREFIXES)

    def decode_hidden(self, ids, context):
        a, b = ids[:, 1:2].clamp(max=2), ids[:, 2:3].clamp(max=2)  # prefixes are numbered (), a, ab
        states = torch.cat([torch.zeros_like(ids[:, :1]), 1 + a, 4 + 3 * a + b], 1)[:, : ids.shape[1]]
        return nn.functional.one_hot(states, self.width).float()


def tables():
    """The reference (13, 4) and the reward of each of the sequences, fixed once."""
    rng = np.random.default_rng(0)
    reference = torch.tensor(0.7 * rng.normal(size=(len(PREFIXES), 4)), dtype=torch.float32)
    return reference, dict(zip(SEQUENCES, (1.5 * rng.normal(size=len(SEQUENCES))).tolist(), strict=True))


def logprob_of_sequences(logits):
    """log p of every possible response under a table: by enumeration, in float64."""
    logp = logits.detach().double().log_softmax(-1)
    return torch.stack([sum(logp[PREFIXES.index(s[:t]), s[t]] for t in range(len(s))) for s in SEQUENCES])


def objective(logits, reference, rewards, beta):
    """Exact E[reward] - beta * KL, and the KL."""
    logp, logq = logprob_of_sequences(logits), logprob_of_sequences(reference)
    r = torch.tensor([rewards[s] for s in SEQUENCES], dtype=torch.float64)
    kl = float((logp.exp() * (logp - logq)).sum())
    return float((logp.exp() * r).sum()) - beta * kl, kl


def optimum(reference, rewards, beta):
    """beta * log E_ref[exp(reward / beta)]: the largest objective there is."""
    r = torch.tensor([rewards[s] for s in SEQUENCES], dtype=torch.float64)
    return beta * float(torch.logsumexp(logprob_of_sequences(reference) + r / beta, 0))


def toy_ppo(seed=0, iterations=300, kl_coef=0.5, **options):
    """A PPO run on the toy, ready to iterate."""
    reference, rewards = tables()
    options = RLHFOptions(
        **{
            "seed": seed,
            "iterations": iterations,
            "prompts": 128,
            "samples": 1,
            "max_new_tokens": LONGEST,
            "kl_coef": kl_coef,
            "learning_rate": 0.03,
            "value_lr_scale": 3.0,
            "critic_warmup": 0,
            "micro_prompts": 128,
        }
        | PLAIN
        | options
    )

    def reward(samples):
        ends = [(*ids, EOS) if done else tuple(ids) for ids, done in zip(samples.ids, samples.finished, strict=True)]
        return torch.tensor([rewards[end] for end in ends])

    rules = SamplingRules(EOS, LONGEST, options.min_new_tokens, options.temperature)
    return PPO(
        options,
        ActorCritic(Table(reference)),
        freeze(Table(reference)),
        RewardSum([RewardPart("table", 1.0, reward)]),
        [Prompt("nothing")] * options.prompts,
        rules,
        decode=lambda ids: " ".join(map(str, ids)),
    )


def share_of_gain(ppo, beta=0.5):
    """How much of the possible rise of the objective the policy has reached; and its exact KL."""
    reference, rewards = tables()
    start, best = objective(reference, reference, rewards, beta)[0], optimum(reference, rewards, beta)
    reached, kl = objective(ppo.actor.backbone.table, reference, rewards, beta)
    return (reached - start) / (best - start), kl
