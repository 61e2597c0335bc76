"""Rewards: a class logit of a text classifier, weighted sums of such parts, and their scale for PPO.

Shapes: B responses, T text tokens, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from vqa_scratch.data.news import beside
from vqa_scratch.data.text import Tokenizer
from vqa_scratch.errors import UserError
from vqa_scratch.models.classifier import TextClassifier, check_label
from vqa_scratch.rl.policy import freeze
from vqa_scratch.rl.types import Samples

AT_ONCE = 64  # texts in a batch of the classifier


def read(model: TextClassifier, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """The logits (B, C) of texts, cut to what the model can read; a text after a separator is the second of a pair."""
    ids, mask = tokenizer.encode_batch(texts, max_length=model.encoder.longest)
    ids = ids.masked_fill(~mask, model.config.pad_id)
    types = None
    if model.config.token_types > 1 and tokenizer.sep_id is not None:
        ends = (ids == tokenizer.sep_id).long()
        types = (ends.cumsum(1) > ends).long()  # the first separator belongs to the first text
    ids, mask, *more = (x.to(model.out.weight.device) for x in (ids, mask, types) if x is not None)
    return model(ids, mask, *more)


class Judge:
    """A frozen classifier that reads texts."""

    def __init__(self, model: TextClassifier, tokenizer: Tokenizer, precision: torch.dtype = torch.float32) -> None:
        self.model, self.tokenizer = freeze(model, precision), tokenizer
        tokenizer.check_fits(model.config.vocab_size, "the classifier")

    @torch.no_grad()
    def logits(self, texts: Sequence[str]) -> Tensor:
        """(B, C) fp32. Texts are read in batches of similar length."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        logits = torch.empty(len(order), len(self.model.labels))
        for start in range(0, len(order), AT_ONCE):
            rows = order[start : start + AT_ONCE]
            logits[rows] = read(self.model, self.tokenizer, [texts[i] for i in rows]).float().cpu()
        return logits


class ClassifierReward(Judge):
    """The logit that a classifier gives to one of its classes, named by label, for the text of each response."""

    def __init__(
        self, model: TextClassifier, tokenizer: Tokenizer, label: str, precision: torch.dtype = torch.float32
    ) -> None:
        super().__init__(model, tokenizer, precision)
        check_label(model.labels, label)
        self.index = model.labels.index(label)

    def __call__(self, samples: Samples) -> Tensor:
        """(B,) fp32."""
        return self.logits(samples.texts)[:, self.index]


class FaithfulReward(Judge):
    """The log-probability that a response keeps every fact of its prompt, by a judge that reads both.

    The judge has a logit for each fact. At 0 nothing is left to gain: a reward without a bound pays for pleasing the
    judge beyond what it can tell.
    """

    def __call__(self, samples: Samples) -> Tensor:
        """(B,) fp32, at most 0."""
        pairs = zip(samples.texts, samples.prompts, strict=True)
        return logsigmoid(self.logits([beside(text, prompt.text) for text, prompt in pairs])).sum(1)


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
