"""The mean connector: the decoder reads one key, the average of the mean image token and the mean question token.

The system of Ozdemir's "Quick Start Guide to LLMs", chapter 7, with the padding left out of the mean. A softmax over
one key is constant, so the decoder cannot choose what to look at.

Shapes: I images, B rows, N image tokens, T question tokens, D width of the decoder.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from vqa_scratch.nn.connecting import Conditioning, Connector
from vqa_scratch.nn.decoding import Decoder
from vqa_scratch.nn.memory import Memory
from vqa_scratch.nn.states import ImageEncoder, States, TextEncoder

RECIPE_IMAGE = """\
# The mean of the image tokens is the one key of the decoder's cross-attention.
memory = linear("image_projection", image_states).mean(1)[:, None]
mask = torch.ones(memory.shape[:2])"""
RECIPE_BOTH = """\
# The mean of the image tokens and the mean of the question tokens are averaged into one key.
image_key = linear("image_projection", image_states).mean(1)
text_keys = linear("text_projection", text_states) * attention_mask[..., None]
memory = ((image_key + text_keys.sum(1) / attention_mask.sum(1, keepdim=True)) / 2)[:, None]
mask = torch.ones(memory.shape[:2])"""


def masked_average(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T, D) -> (B, D), the mean over the tokens that mask (B, T) keeps; zeros if it keeps none."""
    if mask is None:
        return x.mean(1)
    weight = mask.to(x.dtype)
    return torch.einsum("btd,bt->bd", x, weight) / weight.sum(1, keepdim=True).clamp(min=1)


class MeanConnector(Connector):
    """One key a row for the decoder's cross-attention."""

    def __init__(self, image: ImageEncoder, text: TextEncoder | None, decoder: Decoder) -> None:
        super().__init__()
        self.image_projection = nn.Linear(image.dim, decoder.config.dim)
        if text is not None:
            self.text_projection = nn.Linear(text.dim, decoder.config.dim)

    def kept(self, image: States) -> States:
        """Only the average, as one token."""
        return replace(image, tokens=image.tokens.mean(1, keepdim=True))

    def kept_tokens(self, prefix_tokens: int, grid: tuple[int, int]) -> int:
        return 1

    def mixing(self, image: int, text: int, grid: tuple[int, int]) -> Tensor:
        sides = [n for n in (image, text) if n]
        return torch.cat([torch.full((1, n), 1 / (len(sides) * n)) for n in sides], 1)

    def recipe(self, with_text: bool) -> str:
        return RECIPE_BOTH if with_text else RECIPE_IMAGE

    def forward(self, image: States, text: States | None, image_index: Tensor | None = None) -> Conditioning:
        # The projection of an average is the average of the projections.
        pooled = self.image_projection(image.tokens.mean(1))  # (I, D)
        if image_index is not None:
            pooled = pooled[image_index]  # (B, D)
        if text is not None:
            pooled = (pooled + masked_average(self.text_projection(text.tokens), text.mask)) / 2
        return Conditioning([Memory(pooled[:, None])])  # (B, 1, D)
