"""Rollouts: samples responses, then scores them under the policy that sampled them and under the reference.

Shapes: P prompts, K samples a prompt, B = P * K responses, R response tokens, V vocabulary.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from vqa_scratch.errors import UserError
from vqa_scratch.generate import decode
from vqa_scratch.generate.choose import pick
from vqa_scratch.generation_options import end_ids
from vqa_scratch.kernels import chosen_logprobs
from vqa_scratch.rl.functional import exact_kl
from vqa_scratch.rl.policy import (
    ActorCritic,
    Backbone,
    Context,
    SamplingRules,
    padded,
    policy_logits,
    token_logits,
    token_states,
)
from vqa_scratch.rl.types import Prompt, width


class Responses(NamedTuple):
    """Sampled responses."""

    ids: Tensor  # (B, R), padding after the end
    mask: Tensor  # (B, R), True for t1 ... the end token
    finished: Tensor  # (B,)

    def lists(self) -> list[list[int]]:
        """The ids of each response as a list, without the end token."""
        lengths = self.mask.sum(1) - self.finished.long()
        return [row[:n] for row, n in zip(self.ids.tolist(), lengths.tolist(), strict=True)]


def chances(rows: int, rules: SamplingRules, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """(B, R): a uniform number in [0, 1) for every token that may be sampled.

    Drawn before sampling, so that a row depends on its own numbers alone: not on its rank, the other rows, or when they
    end.
    """
    return torch.rand(rows, rules.max_new_tokens, generator=generator, device=device)


@torch.no_grad()
def sample(backbone: Backbone, context: Context, rules: SamplingRules, chance: Tensor) -> Responses:
    """`context.samples` responses to each prompt, token by token as `generate` does; rows that have ended are dropped.

    `chance` (B, R) are the random numbers, from `chances`.
    """
    ids = torch.full((context.rows, rules.max_new_tokens), backbone.pad_id, device=chance.device)

    def choose(scores: Tensor, live: Tensor, made: int) -> tuple[Tensor, None]:
        logits = policy_logits(scores, ids[live], torch.full_like(live, made), rules)
        ids[live, made] = token = pick(logits, chance[live, made])
        return token, None

    scores, state = backbone.begin(context, rules.max_new_tokens - 1)
    most, fill = rules.max_new_tokens, backbone.pad_id
    made = decode(scores, state, choose, max_new_tokens=most, eos_id=rules.eos_id, fill=fill)
    mask = torch.arange(made.ids.shape[1], device=chance.device) < made.lengths[:, None]
    return _finished(made.ids, mask, rules)


def given(prompts: list[Prompt], backbone: Backbone, rules: SamplingRules) -> Responses:
    """The pairs of responses that the prompts bring."""
    rows = [ids for prompt in prompts for ids in prompt.pair or ()]
    return _finished(*padded(rows, backbone.pad_id, next(backbone.parameters()).device), rules)


def _finished(ids: Tensor, mask: Tensor, rules: SamplingRules) -> Responses:
    last = ids.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)
    return Responses(ids, mask, torch.isin(last, last.new_tensor(end_ids(rules.eos_id))))


class Scored(NamedTuple):
    """What two models say about responses, each (B, R) in fp32 with 0 at padding; fields as in `Trajectory`."""

    logprobs: Tensor
    ref_logprobs: Tensor
    exact_kl: Tensor
    entropy: Tensor
    values: Tensor


@torch.no_grad()
def score(
    actor: ActorCritic,
    reference: Backbone,
    parts: Iterable[tuple[list[int], Context, Context]],
    ids: Tensor,
    mask: Tensor,
    rules: SamplingRules,
) -> Scored:
    """Run both decoders over finished responses, as the update will: same code, same rules, no cache.

    `parts`: some prompts, numbered as in `ids`, with what the policy and what the reference read for them.
    """
    scored = Scored(*(torch.zeros_like(mask, dtype=torch.float32) for _ in Scored._fields))
    for some, context, ref_context in parts:
        k = context.samples
        rows = torch.tensor([i * k + j for i in some for j in range(k)], device=ids.device)
        longest = width(mask[rows])
        part_ids, part_mask = ids[rows, :longest], mask[rows, :longest]
        logits, values = actor(context, part_ids, part_mask, rules)
        states = token_states(reference, ref_context, part_ids, part_mask)
        ref_logits = token_logits(reference, states, part_ids, part_mask, rules)
        tokens = part_ids[part_mask]
        logprobs, entropy = chosen_logprobs(logits, tokens)
        ref_logprobs, _ = chosen_logprobs(ref_logits, tokens)
        flat = (logprobs, ref_logprobs, exact_kl(logits, ref_logits), entropy, values)
        for whole, x in zip(scored, flat, strict=True):
            whole[rows, :longest] = torch.zeros_like(part_mask, dtype=torch.float32).masked_scatter(part_mask, x)
    return scored


@lru_cache(maxsize=1)
def shuffled(count: int, seed: int) -> list[int]:
    """The numbers below `count` in random order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


class PromptStream:
    """Batches of prompts, shuffled anew in every epoch. Its whole state is the number of prompts drawn."""

    def __init__(self, prompts: list[Prompt], batch: int, seed: int) -> None:
        if len(prompts) < batch:
            raise UserError(f"{len(prompts)} prompts do not fill one batch of {batch}: lower --prompts")
        self.prompts, self.batch, self.seed, self.drawn = prompts, batch, seed, 0

    def next(self) -> list[Prompt]:
        """The next batch; it may span the end of one shuffle and the start of another."""
        chosen = []
        for number in range(self.drawn, self.drawn + self.batch):
            epoch, place = divmod(number, len(self.prompts))
            chosen.append(self.prompts[shuffled(len(self.prompts), self.seed * 1_000_003 + epoch)[place]])
        self.drawn += self.batch
        return chosen
