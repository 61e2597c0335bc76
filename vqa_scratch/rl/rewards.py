"""Rewards: a class logit of a text classifier, weighted sums of such parts, and their scale for PPO.

Shapes: B responses, T text tokens, C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vqa_scratch.data.text import Tokenizer
from vqa_scratch.errors import UserError
from vqa_scratch.models.classifier import TextClassifier
from vqa_scratch.rl.policy import freeze
from vqa_scratch.rl.types import Samples

AT_ONCE = 64  # texts in a batch of the classifier


class ClassifierReward:
    """The logit that a classifier gives to one of its classes, named by label, for the text of each response."""

    def __init__(
        self, model: TextClassifier, tokenizer: Tokenizer, label: str, precision: torch.dtype = torch.float32
    ) -> None:
        self.model, self.tokenizer = freeze(model, precision), tokenizer
        self.index = model.label_index(label)
        tokenizer.check_fits(model.config.vocab_size, "the classifier")
        self.longest = model.encoder.longest

    @torch.no_grad()
    def __call__(self, samples: Samples) -> Tensor:
        """(B,) fp32. Texts are scored in batches of similar length."""
        device = self.model.out.weight.device
        order = sorted(range(len(samples.texts)), key=lambda i: len(samples.texts[i]))
        rewards = torch.empty(len(order))
        for start in range(0, len(order), AT_ONCE):
            rows = order[start : start + AT_ONCE]
            ids, mask = self.tokenizer.encode_batch([samples.texts[i] for i in rows], max_length=self.longest)
            ids = ids.masked_fill(~mask, self.model.config.pad_id)
            logits = self.model(ids.to(device), mask.to(device))
            rewards[rows] = logits[:, self.index].float().cpu()
        return rewards


def length_penalty(samples: Samples) -> Tensor:
    """Minus the number of tokens of each response; give it a small weight."""
    return -torch.tensor([float(len(ids)) for ids in samples.ids])


@dataclass(frozen=True)
class RewardPart:
    name: str
    weight: float
    function: Callable[[Samples], Tensor]  # one number a response


class RewardSum:
    """`sum of weight * part`. Raises UserError when a part gives anything but one finite number a response."""

    def __init__(self, parts: list[RewardPart], length_weight: float = 0.0) -> None:
        """With a `length_weight`, every token of a response costs that much."""
        if not parts:
            raise ValueError("a reward needs one part or more")
        self.parts = [*parts, RewardPart("shortness", length_weight, length_penalty)] if length_weight else parts

    def __call__(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        """The total (B,) and each part (B,) before its weight."""
        total, values = torch.zeros(len(samples.ids)), {}
        for part in self.parts:
            try:
                value = torch.as_tensor(part.function(samples), dtype=torch.float32)
            except (TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"reward {part.name!r} must be numbers, one a response: {error}") from error
            if value.shape != total.shape:
                raise UserError(f"reward {part.name!r} has shape {tuple(value.shape)}, expected {tuple(total.shape)}")
            bad = (~value.isfinite()).nonzero().flatten().tolist()
            if bad:
                raise UserError(
                    f"reward {part.name!r} is {value[bad[0]].item()} for {len(bad)} of {len(value)} responses, "
                    f"the first of them {samples.texts[bad[0]]!r}"
                )
            values[part.name] = value
            total = total + part.weight * value
        return total, values


class RewardScale:
    """`clip((reward - mean) / std, +-clip)` with mean and std fixed once, from responses of the reference.

    Fixed, because a running scale would change what the KL coefficient means during the run.
    """

    def __init__(self, clip: float | None = None) -> None:
        self.mean, self.std, self.clip = 0.0, 1.0, clip

    def fit(self, rewards: Tensor) -> None:
        """Take mean and standard deviation from `rewards` (n,). Rewards that are all equal keep their scale."""
        self.mean = float(rewards.mean())
        self.std = float(rewards.std()) if len(rewards) > 1 and float(rewards.std()) > 1e-6 else 1.0

    def __call__(self, rewards: Tensor) -> Tensor:
        scaled = (rewards - self.mean) / self.std
        return scaled if self.clip is None else scaled.clamp(-self.clip, self.clip)
