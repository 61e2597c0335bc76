"""What the models around a decoder share: it reads memories made of an image, and says a text.

Shapes: B texts, A decoder tokens, D width of the decoder, V vocabulary.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.kernels import linear_cross_entropy
from vqa_scratch.models.gpt2 import GPT2
from vqa_scratch.nn.memory import Memory

IGNORE = -100  # a label that asks for nothing


@dataclass
class ReaderOutput:
    """`loss` is the mean over the labelled tokens, in nats (None without labels); `logits` (B, A, V) on demand."""

    hidden: Tensor  # (B, A, D)
    head: Tensor  # (V, D)
    loss: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        return F.linear(self.hidden, self.head)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError that names the tensor if it holds NaN or infinity."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds NaN or infinite values")


def labelled_loss(hidden: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy over labelled tokens, and how many are right by argmax (both scalars).

    hidden (B, A, D), head (V, D), labels (B, A) with IGNORE where nothing is asked. Only labelled rows meet the head,
    and a chunk of them at a time, so the (B, A, V) logits are never formed.
    """
    return linear_cross_entropy(hidden.flatten(0, 1), head, labels.flatten())


def check_reads(decoder: GPT2) -> None:
    """Raise ValueError on a decoder that was built without cross-attention."""
    if not decoder.config.add_cross_attention:
        raise ValueError("the decoder needs cross-attention: build GPT2 with add_cross_attention=True")


class Reader(nn.Module, ABC):
    """A model whose `decoder` reads what its encoders make of an image."""

    decoder: GPT2
    # What `freeze` may be asked for: the names of the child modules that then stay as they are.
    frozen_parts: ClassVar[dict[str, tuple[str, ...]]] = {
        "nothing": (),
        "image_encoder": ("image",),
        "decoder": ("decoder",),
        "all": ("image", "decoder"),
    }

    @abstractmethod
    def memory(self, pixel_values: Tensor, **reading: Tensor) -> list[Memory]:
        """What cross-attention reads of I images (I, C, H, W); a model names what else it takes."""

    def output(self, hidden: Tensor, labels: Tensor | None) -> ReaderOutput:
        """The states under the head (B, A, D), with their loss where there are labels (B, A).

        Raises ValueError on labels that ask for nothing.
        """
        result = ReaderOutput(hidden, self.decoder.head)
        if labels is not None:
            asked = (labels != IGNORE).sum()
            if asked == 0:
                raise ValueError("labels ask for nothing: every one is -100")
            result.loss = labelled_loss(hidden, result.head, labels)[0] / asked
        return result

    def freeze(self, what: str) -> str:
        """Stop the gradients of a part; returns one line that says what still trains.

        `what` is a key of `frozen_parts`. The cross-attention of a frozen decoder stays trainable (with its norm): it
        is what is new. Projections and the modality embedding always train.
        """
        if what not in self.frozen_parts:
            raise ValueError(f"freeze must be one of {', '.join(self.frozen_parts)}, got {what!r}")
        for name, parameter in self.named_parameters():
            part = name.split(".")[0]
            is_cross = part == "decoder" and (".cross." in name or ".norm_cross." in name)
            parameter.requires_grad_(part not in self.frozen_parts[what] or is_cross)
        lines = []
        for name, part in self.named_children():
            total = sum(p.numel() for p in part.parameters())
            free = sum(p.numel() for p in part.parameters() if p.requires_grad)
            lines.append(f"{name} {free:,}" + (f" of {total:,}" if free < total else ""))
        return "trainable: " + ", ".join(lines)
