"""Visual question answering: a ViT and a BERT-like encoder make the memory that a GPT-2 reads by cross-attention.

Both sides are projected to the decoder's width. With `tokens` fusion every patch token and every question token is a
key, marked by a modality embedding, and a patch also by its place. With `mean` fusion each side is averaged and the two
averages averaged again, which leaves one key, so its softmax is constant (the system of Ozdemir's "Quick Start Guide to
LLMs", chapter 7, with the padding left out of the mean).

Shapes: I images, B questions (B >= I: an image may serve several), T question tokens, A decoder tokens, N image tokens,
D width of the decoder, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from vqa_scratch.models.bert import Bert, BertConfig
from vqa_scratch.models.gpt2 import GPT2, GPT2Config
from vqa_scratch.models.reader import Reader, ReaderOutput, check_finite, check_reads
from vqa_scratch.models.stem import ConvStem
from vqa_scratch.models.vit import ViT, ViTConfig, resize_positions
from vqa_scratch.nn import taps
from vqa_scratch.nn.cache import DecoderCache
from vqa_scratch.nn.memory import Memory

FUSIONS = ("tokens", "mean")
FROZEN_PARTS = {
    "nothing": (),
    "encoders": ("image", "text"),
    "text_encoder": ("text",),
    "image_encoder": ("image",),
    "decoder": ("decoder",),
    "all": ("image", "text", "decoder"),
}


@dataclass(frozen=True)
class VQAConfig:
    """The three towers' sizes, the fusion, and how the image tower cuts pixels into tokens ("linear" or "conv")."""

    image: ViTConfig
    text: BertConfig
    decoder: GPT2Config
    fusion: str = "tokens"
    stem: str = "linear"

    def to_json(self) -> dict[str, Any]:
        return {
            "image": self.image.to_hf(),
            "text": self.text.to_hf(),
            "decoder": self.decoder.to_hf(),
            "fusion": self.fusion,
            "stem": self.stem,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        return cls(
            image=ViTConfig.from_hf(values["image"]),
            text=BertConfig.from_hf(values["text"]),
            decoder=GPT2Config.from_hf(values["decoder"]),
            fusion=values["fusion"],
            stem=values["stem"],
        )


def masked_average(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T, D) -> (B, D), the mean over the tokens that mask (B, T) keeps; zeros if it keeps none."""
    if mask is None:
        return x.mean(1)
    weight = mask.to(x.dtype)
    return torch.einsum("btd,bt->bd", x, weight) / weight.sum(1, keepdim=True).clamp(min=1)


class VQAModel(Reader):
    """Image tower, text tower, decoder, and the two projections that let the decoder read the other two."""

    frozen_parts = FROZEN_PARTS

    def __init__(self, image: ViT, text: Bert, decoder: GPT2, fusion: str = "tokens") -> None:
        super().__init__()
        if fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}, got {fusion!r}")
        check_reads(decoder)
        self.image, self.text, self.decoder, self.fusion = image, text, decoder, fusion
        width = decoder.config.dim
        self.image_projection = nn.Linear(image.config.dim, width)
        self.text_projection = nn.Linear(text.config.dim, width)
        if fusion == "tokens":
            self.modality = nn.Parameter(torch.randn(2, width) * decoder.config.init_std)  # image, text
            # Places are given to the keys anew, as in DETR (Carion et al. 2020): what leaves the image tower is about
            # content, and "left of" needs the place. Zero changes nothing, so pretrained towers start undisturbed.
            self.places = nn.Parameter(torch.zeros(1, 1 + image.config.grid**2, width))
        taps.name_modules(image, "image")
        taps.name_modules(text, "text")
        taps.name_modules(decoder, "decoder")

    @classmethod
    def from_config(cls, config: VQAConfig) -> Self:
        """Random weights."""
        image = config.image
        stem = ConvStem(image.channels, image.dim, image.patch_size) if config.stem == "conv" else None
        return cls(ViT(image, patch_embed=stem), Bert(config.text), GPT2(config.decoder), config.fusion)

    @property
    def config(self) -> VQAConfig:
        stem = "conv" if isinstance(self.image.patch_embed, ConvStem) else "linear"
        return VQAConfig(self.image.config, self.text.config, self.decoder.config, self.fusion, stem)

    def image_states(self, pixel_values: Tensor) -> Tensor:
        """(I, C, H, W) -> (I, N, image width): all of the image tower that is read; under `mean` the average, N = 1.

        Raises ValueError on NaN or infinite pixels.
        """
        check_finite("pixel_values", pixel_values)
        states = self.image(pixel_values)
        # The projection of an average is the average of the projections.
        return states.mean(1, keepdim=True) if self.fusion == "mean" else states

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(I, C, H, W) -> (I, N, D) in the decoder's width. Takes what `image_states` gives as well (usual size)."""
        known = pixel_values.ndim == 3
        projected = self.image_projection(pixel_values if known else self.image_states(pixel_values))
        if self.fusion == "mean":
            return projected
        grid = self.image.config.grid
        return projected + resize_positions(
            self.places, grid, (grid, grid) if known else self.image.patches_of(pixel_values)
        )

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, T) -> (B, T, D) in the decoder's width. Takes the text tower's states (B, T, text width) as well."""
        states = input_ids if input_ids.is_floating_point() else self.text(input_ids, attention_mask)
        return self.text_projection(states)

    def fuse(
        self, image: Tensor, text: Tensor, attention_mask: Tensor | None, image_index: Tensor | None = None
    ) -> list[Memory]:
        """What cross-attention reads. image (I, N, D), text (B, T, D), attention_mask (B, T).

        Question b is about image `image_index[b]`; None means one question an image. Under `tokens` fusion the keys of
        an image are shared by its questions, not copied.
        """
        if self.fusion == "mean":
            pooled = image.mean(1)  # (I, D)
            pooled = pooled if image_index is None else pooled[image_index]  # (B, D)
            return [Memory(((pooled + masked_average(text, attention_mask)) / 2)[:, None])]  # (B, 1, D)
        return [
            Memory(image + self.modality[0], index=image_index),
            Memory(text + self.modality[1], attention_mask),
        ]

    def memory(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None, image_index: Tensor | None = None
    ) -> list[Memory]:
        """Encode both sides and fuse them; arguments as in `forward`."""
        image = self.encode_image(pixel_values)
        return self.fuse(image, self.encode_text(input_ids, attention_mask), attention_mask, image_index)

    def hidden(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        decoder_input_ids: Tensor,
        *,
        image_index: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """(B, A, D): the decoder's states under the head; arguments as in `forward`."""
        memory = self.memory(pixel_values, input_ids, attention_mask, image_index)
        return self.decoder.hidden(
            self.decoder.embed(decoder_input_ids), decoder_attention_mask, memory=memory, cache=cache
        )

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        decoder_input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        image_index: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> ReaderOutput:
        """Answer B questions about I images.

        pixel_values (I, C, H, W); input_ids, attention_mask (B, T), True = a real token; decoder_input_ids (B, A)
        start with BOS (or with a prompt before it); labels (B, A) hold the next token, end token included, and -100
        where nothing is asked (padding is known by length, not by id); image_index (B,) says which image a question is
        about. Raises ValueError on NaN or infinite inputs, and on labels that ask for nothing.
        """
        hidden = self.hidden(
            pixel_values,
            input_ids,
            attention_mask,
            decoder_input_ids,
            image_index=image_index,
            decoder_attention_mask=decoder_attention_mask,
        )
        return self.output(hidden, labels)
