"""The policy of PPO: a sequence-to-sequence model with a value head, and the function that shapes its distribution.

Sampling, scoring and the reference all use `policy_logits`. If only the sampler barred a token, the log-probabilities
of the update would belong to another distribution than the samples, and both ratio and KL would be wrong.

Shapes: P prompts, K samples a prompt, B = P * K responses, R response tokens, N real tokens in all, D width,
V vocabulary, E entries of a memory.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from vqa_scratch.data.batches import Ragged
from vqa_scratch.generate import State, begin
from vqa_scratch.generate.processors import repeating
from vqa_scratch.generation_options import end_ids
from vqa_scratch.models.t5 import T5
from vqa_scratch.nn.connecting import Conditioning
from vqa_scratch.nn.memory import Memory
from vqa_scratch.rl.options import RLHFOptions
from vqa_scratch.rl.types import Prompt

M = TypeVar("M", bound=nn.Module)
BARRED = -1e9  # the logit of a token that cannot be sampled; finite, so that 0 * log 0 stays 0 in KL and entropy


class Part(NamedTuple):
    """A part of what cross-attention reads."""

    states: Tensor  # (E, N, D); E = P unless `entries` says who reads what
    mask: Tensor | None = None  # (E, N), True = may attend
    entries: Tensor | None = None  # (P,): the entry a prompt reads; None: its own

    def of(self, prompts: Sequence[int]) -> "Part":
        chosen, entries = prompts, None
        if self.entries is not None:
            chosen, entries = torch.unique(self.entries[prompts], return_inverse=True)
        return Part(self.states[chosen], None if self.mask is None else self.mask[chosen], entries)


@dataclass(frozen=True)
class Context:
    """What the decoder reads for P prompts: made once, shared by all responses to a prompt."""

    parts: tuple[Part, ...]
    samples: int = 1  # K: rows 0 ... K - 1 read prompt 0, and so on
    prompt_ids: Tensor | None = None  # (P, L) before the response, the start token last; None: the start token alone
    prompt_mask: Tensor | None = None  # (P, L), True = real token; padding on the left
    prefix: Tensor | None = None  # (P, Q, D) embeddings before the ids
    prefix_mask: Tensor | None = None  # (P, Q), as in `Conditioning`

    @property
    def prompts(self) -> int:
        if self.prompt_ids is not None:
            return len(self.prompt_ids)
        states, _, entries = self.parts[0]
        return len(states if entries is None else entries)

    @property
    def rows(self) -> int:
        """B, the responses."""
        return self.prompts * self.samples

    def shared_by(self, samples: int) -> "Context":
        """The same prompts, `samples` responses each."""
        return replace(self, samples=samples)

    def of(self, prompts: Sequence[int]) -> "Context":
        """Some of the prompts, padded to the longest of them, as if they had been encoded alone."""
        before = (self.prompt_ids, self.prompt_mask, self.prefix, self.prefix_mask)
        ids, mask, *prefix = (None if x is None else x[prompts] for x in before)
        if ids is not None and mask is not None:
            padding = int(mask.int().argmax(1).min())
            ids, mask = ids[:, padding:], mask[:, padding:]
        return Context(tuple(part.of(prompts) for part in self.parts), self.samples, ids, mask, *prefix)

    def prompt_of_row(self, device: torch.device) -> Tensor:
        """(B,): the prompt of each response."""
        return torch.arange(self.prompts, device=device).repeat_interleave(self.samples)

    def given(self) -> Conditioning:
        """What the decoder reads, a row a response; an entry is projected once, and a prefix read once."""
        memory = [
            Memory(states, mask, repeat=self.samples)
            if entries is None
            else Memory(states, mask, entries.repeat_interleave(self.samples))
            for states, mask, entries in self.parts
        ]
        index = None if self.prefix is None else self.prompt_of_row(self.prefix.device)
        return Conditioning(memory or None, self.prefix, index, self.prefix_mask)


class Backbone(nn.Module, ABC):
    """What PPO needs from a language model, such as `T5Policy` below."""

    width: int
    start_id: int  # first input of the decoder
    eos_id: int | tuple[int, ...]  # any of several ends a response
    pad_id: int

    @abstractmethod
    def encode(self, prompts: list[Prompt]) -> Context:
        """What the decoder reads, one entry a prompt."""

    @abstractmethod
    def begin(self, context: Context, steps: int) -> tuple[Tensor, State]:
        """Raw logits of the first response token (B, V), and the state that takes up to `steps` more tokens from there;
        its rows are the responses. Without gradients.
        """

    @abstractmethod
    def decode_hidden(self, ids: Tensor, context: Context) -> Tensor:
        """(B, R) -> (B, R, D): final states of all at once; ids begins with the start token."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V)."""

    @abstractmethod
    def encoder_parameters(self) -> list[nn.Parameter]:
        """All parameters that `encode` depends on."""


def padded(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device, side: str = "right"
) -> tuple[Tensor, Tensor]:
    """Rows of ids, padded on that side to the longest (N, L), and which of them are real (N, L)."""
    ids, real = Ragged(rows).padded(np.arange(len(rows)), pad_id, left=side == "left")
    return ids.to(device), real.to(device)


class T5Policy(Backbone):
    """A T5 as PPO's backbone. Prompts are padded on the right, as T5's relative positions require."""

    def __init__(self, model: T5) -> None:
        super().__init__()
        self.model = model
        config = model.config
        self.width, self.start_id, self.pad_id = config.dim, config.start_id, config.pad_id
        self.eos_id = end_ids(config.eos_id)[0]  # a response ends with one token, of several with the first

    def encode(self, prompts: list[Prompt]) -> Context:
        ids, real = padded([p.ids for p in prompts], self.pad_id, next(self.parameters()).device)
        mask = None if len({len(p.ids) for p in prompts}) == 1 else real  # prompts of one length need none
        return Context((Part(self.model.encode(ids, mask), mask),))

    def begin(self, context: Context, steps: int) -> tuple[Tensor, State]:
        start = torch.full((context.rows, 1), self.start_id, device=context.parts[0].states.device)
        return begin(self.model, start, None, context.given(), steps=steps)

    def decode_hidden(self, ids: Tensor, context: Context) -> Tensor:
        return self.model.hidden_after(context.given(), self.model.embed(ids))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)

    def encoder_parameters(self) -> list[nn.Parameter]:
        return [*self.model.encoder.parameters(), *self.model.embedding.parameters()]


@dataclass(frozen=True)
class SamplingRules:
    """What may be sampled. Part of the policy: the same rules hold wherever its probabilities are used."""

    eos_id: int | tuple[int, ...]  # any of several ends a response
    max_new_tokens: int
    min_new_tokens: int = 0  # the end token is barred before this many tokens
    temperature: float = 1.0
    barred: Tensor | None = None  # (V,) bool, True = never sampled: padding, ids beyond the tokenizer's
    no_repeat_ngram: int = 0  # bar tokens that would complete an n-gram the response already has; 0 allows all


def sampling_rules(
    options: RLHFOptions, eos_id: int | tuple[int, ...], table: Tensor, tokens: int, never: Sequence[int]
) -> SamplingRules:
    """The rules of a run, which bar the ids in `never` and rows of the `table` of embeddings that no token has."""
    barred = torch.arange(len(table), device=table.device) >= tokens
    barred[list(never)] = True
    lengths = (options.max_new_tokens, options.min_new_tokens)
    bars = barred if barred.any() else None  # a pass over all logits less
    return SamplingRules(eos_id, *lengths, options.temperature, bars, options.no_repeat_ngram_size)


def policy_logits(logits: Tensor, ids: Tensor, positions: Tensor, rules: SamplingRules) -> Tensor:
    """Raw logits (N, V) -> fp32 logits (N, V) of the distribution that is sampled from.

    Row n predicts token `positions[n]` of the response `ids[n]` (N, R); later entries of `ids` are ignored.
    """
    logits = logits.float()
    if rules.temperature != 1.0:
        logits = logits / rules.temperature
    if rules.barred is not None:
        logits = logits.masked_fill(rules.barred, BARRED)
    if rules.min_new_tokens > 0:
        early = positions < rules.min_new_tokens
        ends = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        ends[list(end_ids(rules.eos_id))] = True
        logits = logits.masked_fill(early[:, None] & ends, BARRED)
    if rules.no_repeat_ngram > 0:
        rows, places = repeating(ids, None, positions, rules.no_repeat_ngram).nonzero(as_tuple=True)
        logits = logits.index_put((rows, ids[rows, places]), logits.new_tensor(BARRED))
    return logits


def token_states(backbone: Backbone, context: Context, ids: Tensor, mask: Tensor) -> Tensor:
    """States before each real token of the responses (B, R): (N, D), row by row. Nothing is computed twice for pads."""
    start = torch.full_like(ids[:, :1], backbone.start_id)
    inputs = torch.cat([start, ids[:, :-1]], 1)  # (B, R): the decoder reads t_{i-1} to predict t_i
    return backbone.decode_hidden(inputs, context)[mask]


def token_logits(backbone: Backbone, states: Tensor, ids: Tensor, mask: Tensor, rules: SamplingRules) -> Tensor:
    """(N, D) -> logits (N, V) of the sampled distribution at each real token."""
    rows, positions = mask.nonzero(as_tuple=True)
    return policy_logits(backbone.logits(states), ids[rows], positions, rules)


class ActorCritic(nn.Module):
    """The policy with its value head: one number a state, read after the final norm, 0 everywhere at the start."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.value_head = nn.Linear(backbone.width, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.detach_value = False  # True keeps the value loss out of the policy's layers

    def forward(self, context: Context, ids: Tensor, mask: Tensor, rules: SamplingRules) -> tuple[Tensor, Tensor]:
        """Responses (B, R) -> logits (N, V) and values (N,) at their real tokens, row by row, both fp32."""
        states = token_states(self.backbone, context, ids, mask)
        seen = states.detach() if self.detach_value else states
        values = self.value_head(seen).squeeze(-1).float()
        return token_logits(self.backbone, states, ids, mask, rules), values


def freeze(module: M, precision: torch.dtype = torch.float32) -> M:
    """No gradients, no dropout. Below fp32 the linear layers are stored as autocast would cast them on every call."""
    module.requires_grad_(False).eval()
    if precision != torch.float32:
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.to(precision)
    return module
