"""Encoder, connector, decoder: a model that reads an image, and maybe a question, and writes text.

With a text encoder the connector gets the states of the image and of the question. Without one the decoder writes a
caption after BOS, or an answer after the question and BOS. Training and generation use the same `hidden`; only labelled
tokens have a loss.

Shapes: I images, B rows (B >= I: several rows may share an image), T question tokens, A decoder tokens, Q prefix
tokens, D width of the decoder, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.kernels import linear_cross_entropy
from vqa_scratch.models.hf_config import ReleasedDecoder
from vqa_scratch.nn import taps
from vqa_scratch.nn.connecting import Connector
from vqa_scratch.nn.states import ImageEncoder, States, TextEncoder

IGNORE = -100  # the label of a token without a loss
# The arguments of `freeze`, and the parts that each one freezes.
FROZEN_PARTS = {
    "nothing": (),
    "encoders": ("image", "text"),
    "text_encoder": ("text",),
    "image_encoder": ("image",),
    "decoder": ("decoder",),
    "all": ("image", "text", "decoder"),
}
READS_IMAGES = {"cross", "norm_cross", "gated"}  # the modules of a decoder's blocks that do


@dataclass
class VQAOutput:
    """`loss` is the mean over the labelled tokens, in nats (None without labels); `logits` (B, A, V) on demand."""

    hidden: Tensor  # (B, A, D)
    head: Tensor  # (V, D)
    loss: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        return F.linear(self.hidden, self.head)


class VQAModel(nn.Module):
    """Image encoder, text encoder or None, connector, decoder; see `vqa_scratch/connectors`.

    Raises ValueError for a decoder that lacks the cross-attention its connector needs.
    """

    def __init__(
        self, image: ImageEncoder, text: TextEncoder | None, connector: Connector, decoder: ReleasedDecoder
    ) -> None:
        super().__init__()
        if connector.uses_memory and not decoder.reads_memory:
            raise ValueError("the decoder needs cross-attention: GPT2 with add_cross_attention=True, or gated layers")
        self.image, self.text, self.connector, self.decoder = image, text, connector, decoder
        for name, part in (("image", image), ("text", text), ("decoder", decoder)):
            if (blocks := getattr(part, "blocks", None)) is not None:
                taps.name_modules(blocks, name)

    def hidden(
        self,
        image: States,
        text: States | None,
        decoder_input_ids: Tensor,
        image_index: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, A, D): the decoder's states before the head; arguments as in `forward`."""
        given = self.connector(image, text, image_index)
        return self.decoder.hidden_after(given, self.decoder.embed(decoder_input_ids), decoder_attention_mask)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        decoder_input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        image_index: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> VQAOutput:
        """Answer B questions about I images, or describe them.

        pixel_values (I, C, H, W); input_ids, attention_mask (B, T) for the text encoder, True = a real token, None
        without one; decoder_input_ids (B, A) start with BOS (or with a prompt before it); labels (B, A) hold the next
        token, end token included, and -100 where there is no loss; image_index (B,) is the image of each row. Raises
        ValueError on NaN or infinite inputs, and on labels that are all -100.
        """
        if not torch.isfinite(pixel_values).all():
            raise ValueError("pixel_values holds NaN or infinite values")
        if self.text is not None and input_ids is None:
            raise ValueError("this model reads questions: give it input_ids")
        text = None if self.text is None or input_ids is None else self.text.states(input_ids, attention_mask)
        image = self.image.states(pixel_values)
        hidden = self.hidden(image, text, decoder_input_ids, image_index, decoder_attention_mask)
        output = VQAOutput(hidden, self.decoder.head)
        if labels is not None:
            asked = (labels != IGNORE).sum()
            if asked == 0:
                raise ValueError("labels ask for nothing: every one is -100")
            output.loss = labelled_loss(hidden, output.head, labels)[0] / asked
        return output

    def freeze(self, what: str) -> str:
        """Stop the gradients of some parts; returns one line that says what still trains.

        `what` is a key of `FROZEN_PARTS`. The connector, and what reads images in a frozen decoder (cross-attention
        with its norm, gated layers), stay trainable: their weights are new.
        """
        if what not in FROZEN_PARTS:
            raise ValueError(f"freeze must be one of {', '.join(FROZEN_PARTS)}, got {what!r}")
        for name, parameter in self.named_parameters():
            part = name.split(".")[0]
            is_new = part == "decoder" and not READS_IMAGES.isdisjoint(name.split("."))
            parameter.requires_grad_(part not in FROZEN_PARTS[what] or is_new)
        lines = []
        for name, child in self.named_children():
            total = sum(p.numel() for p in child.parameters())
            free = sum(p.numel() for p in child.parameters() if p.requires_grad)
            if total:
                lines.append(f"{name} {free:,}" + (f" of {total:,}" if free < total else ""))
        return "trainable: " + ", ".join(lines)


def labelled_loss(hidden: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy over labelled tokens, and how many are right by argmax (both scalars).

    hidden (B, A, D), head (V, D), labels (B, A) with IGNORE where there is no loss. Only labelled rows go through the
    head, a chunk at a time, so the (B, A, V) logits never exist.
    """
    return linear_cross_entropy(hidden.flatten(0, 1), head, labels.flatten())
