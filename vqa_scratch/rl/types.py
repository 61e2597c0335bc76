"""The data that the parts of `rlhf.py` exchange: prompts, samples, and the trajectory of a batch.

Shapes: P prompts, K samples a prompt, B = P * K responses (row b answers prompt b // K), R response tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One thing to respond to."""

    text: str  # as samples.html shows it
    ids: tuple[int, ...] = ()  # token ids given to the encoder, or read by a decoder before the response
    reference: str = ""  # a reference response, shown in samples.html; may be empty
    payload: Any = None  # whatever else policy or reward need (an image path, annotators' answers, the row of a file)
    pair: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # two given responses in ids, the preferred one first
    facts: Mapping[str, str] = field(default_factory=dict, hash=False)  # what a response should keep, where it is known


@dataclass(frozen=True)
class Samples:
    """Finished responses as the reward functions see them, one entry a response."""

    prompts: list[Prompt]
    ids: list[list[int]]  # the sampled ids, the end token not included
    texts: list[str]  # the same, decoded
    finished: list[bool]  # whether the response ended by itself


def width(mask: Tensor) -> int:
    """Columns of a mask (B, R) up to the last that holds a real token."""
    return int(mask.any(0).nonzero().max()) + 1


@dataclass(frozen=True)
class Trajectory:
    """One batch of rollouts. Every (B, R) tensor holds 0 where `mask` is False.

    field         shape   dtype   meaning
    ------------  ------  ------  ---------------------------------------------------------------------------------
    ids           (B, R)  int64   sampled tokens t1..tn, the end token included; padding after it
    mask          (B, R)  bool    True for t1..tn. Built from lengths, never from ids: padding may equal a real id
    finished      (B,)    bool    True when the last real token is the end token, False when the length limit cut it
    logprobs      (B, R)  fp32    log pi_old(t_i | prompt, t_<i) of the policy that sampled, under its sampling rules
    ref_logprobs  (B, R)  fp32    the same under the frozen reference, same rules
    exact_kl      (B, R)  fp32    KL(pi_old(. | t_<i) || reference(. | t_<i)) over the whole vocabulary, nats
    entropy       (B, R)  fp32    entropy of pi_old(. | t_<i), nats
    values        (B, R)  fp32    value head on the state before t_i
    scores        (B,)    fp32    reward of the response on the scale PPO sees (normalised, clipped, penalties taken)
    rewards       (B, R)  fp32    -kl_coef * (logprobs - ref_logprobs), plus `scores` at the last real token
    baseline      (B, R)  fp32    what advantages subtract: values, their best fit, or the mean of other responses
    advantages    (B, R)  fp32    what multiplies the ratio in the loss; whitened for PPO. DPO: chance to be preferred
    returns       (B, R)  fp32    target of the value head: raw advantages + baseline
    """

    ids: Tensor
    mask: Tensor
    finished: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    exact_kl: Tensor
    entropy: Tensor
    values: Tensor
    scores: Tensor
    rewards: Tensor
    baseline: Tensor
    advantages: Tensor
    returns: Tensor

    def rows(self, index: Tensor) -> "Trajectory":
        """The chosen responses, cut to the longest of them."""
        longest = width(self.mask[index])
        chosen = {}
        for item in fields(self):
            value = getattr(self, item.name)[index]
            chosen[item.name] = value[:, :longest] if value.ndim == 2 else value
        return Trajectory(**chosen)

    def __post_init__(self):
        size = self.ids.shape
        for item in fields(self):
            shape = getattr(self, item.name).shape
            expected = size if len(shape) == 2 else size[:1]
            assert shape == expected, f"{item.name} has shape {tuple(shape)}, expected {tuple(expected)}"
        assert self.mask.dtype == torch.bool, "the response mask must be boolean"
