"""An image captioner that answers questions too: a ResNet makes the memory that a GPT-2 reads by cross-attention.

Every place of the map of features is a key (7x7 = 49 of them at 224 pixels), projected to the decoder's width and told
its place again. The spatial map, rather than one pooled vector, is what attention can choose from: with a single key
the softmax is constant and queries and keys get no gradient (as in Xu et al. 2015, "Show, Attend and Tell", which
introduced attention over the places of a convolutional map for captions).

A caption is what the decoder says after BOS; an answer is what it says after the question and BOS. Training and
generation go through the same forward pass, and only the words asked for carry a loss.

Shapes: I images, B texts (B >= I: an image may have several), A decoder tokens, h x w places of the map, N = h*w, D the
decoder's width, V vocabulary.
"""

from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from vqa_scratch.models.gpt2 import GPT2, GPT2Config
from vqa_scratch.models.reader import Reader, ReaderOutput, check_finite, check_reads
from vqa_scratch.models.resnet import NORMS, ResNet, ResNetConfig
from vqa_scratch.models.vit import resize_grid
from vqa_scratch.nn import taps
from vqa_scratch.nn.cache import DecoderCache
from vqa_scratch.nn.memory import Memory


@dataclass(frozen=True)
class CaptionConfig:
    """The two towers' sizes, the image tower's norm (a key of NORMS), and the places a side that the table is for."""

    image: ResNetConfig
    decoder: GPT2Config
    norm: str = "frozen_batch"
    grid: int = 7

    def to_json(self) -> dict[str, Any]:
        return {"image": asdict(self.image), "decoder": self.decoder.to_hf(), "norm": self.norm, "grid": self.grid}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        image = {name: tuple(v) if isinstance(v, list) else v for name, v in values["image"].items()}
        return cls(ResNetConfig(**image), GPT2Config.from_hf(values["decoder"]), values["norm"], values["grid"])


class CaptionModel(Reader):
    """Image tower, decoder, and the projection that lets the decoder read the image."""

    def __init__(self, image: ResNet, decoder: GPT2, grid: int = 7) -> None:
        super().__init__()
        check_reads(decoder)
        self.image, self.decoder, self.grid = image, decoder, grid
        self.image_projection = nn.Linear(image.config.dim, decoder.config.dim)
        self.places = nn.Parameter(torch.zeros(1, grid**2, decoder.config.dim))
        taps.name_modules(decoder, "decoder")

    @classmethod
    def from_config(cls, config: CaptionConfig) -> Self:
        """Random weights."""
        return cls(ResNet(config.image, NORMS[config.norm]), GPT2(config.decoder), config.grid)

    @property
    def config(self) -> CaptionConfig:
        kinds = {type(norm(16)): name for name, norm in NORMS.items()}
        return CaptionConfig(self.image.config, self.decoder.config, kinds[type(self.image.norm1)], self.grid)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(I, C, H, W) -> (I, N, D), places in raster order. Raises ValueError on NaN or infinite pixels."""
        check_finite("pixel_values", pixel_values)
        states = self.image(pixel_values)  # (I, dim, h, w)
        places = resize_grid(self.places, self.grid, tuple(states.shape[2:]))
        return self.image_projection(states.flatten(2).transpose(1, 2)) + places

    def memory(self, pixel_values: Tensor, image_index: Tensor | None = None) -> list[Memory]:
        """What cross-attention reads: text b is about image `image_index[b]`, None means one text an image."""
        return [Memory(self.encode_image(pixel_values), index=image_index)]

    def hidden(
        self,
        pixel_values: Tensor,
        decoder_input_ids: Tensor,
        *,
        image_index: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """(B, A, D): the decoder's states under the head; arguments as in `forward`."""
        memory = self.memory(pixel_values, image_index)
        return self.decoder.hidden(
            self.decoder.embed(decoder_input_ids), decoder_attention_mask, memory=memory, cache=cache
        )

    def forward(
        self,
        pixel_values: Tensor,
        decoder_input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        image_index: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> ReaderOutput:
        """Describe I images, or answer questions about them, in B texts.

        pixel_values (I, C, H, W); decoder_input_ids (B, A): the question or nothing, BOS, the text; labels (B, A) hold
        the next token of the text, end token included, and -100 on the question and on padding; image_index (B,) says
        which image a text is about. Raises ValueError on NaN or infinite pixels, and on labels that ask for nothing.
        """
        hidden = self.hidden(
            pixel_values, decoder_input_ids, image_index=image_index, decoder_attention_mask=decoder_attention_mask
        )
        return self.output(hidden, labels)
