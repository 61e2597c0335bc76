"""A decoder that reads images: what BLIP-2, LLaVA, Fuyu and Idefics have in common, and the first three.

They differ in `encode_image`. In the prompts of LLaVA and Fuyu each embedding of an image has a place, a token
`image_token`, anywhere in the text; in those of BLIP-2 the image stands before the text. Those of Idefics are a memory.

Shapes: B rows, T tokens, E width of the language model, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from vqa_scratch.errors import UserError
from vqa_scratch.models.hf_config import Released, ReleasedDecoder
from vqa_scratch.nn.cache import DecoderCache
from vqa_scratch.weights.convert import load_into


class JoinedModel(Released[Any], ABC):
    """A language model, and what turns images into what it reads."""

    language: ReleasedDecoder[Any]

    @abstractmethod
    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Images, or patches in Fuyu -> (..., E) in the order of reading; in Idefics the states of a memory."""

    def to_precision(self, dtype: torch.dtype) -> Self:
        """Convert the weights to `dtype`."""
        return self.to(dtype)

    @classmethod
    def from_checkpoint(
        cls,
        config: Mapping[str, Any],
        tensors: dict[str, Tensor],
        source: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """As in `Released`, with the weights in `dtype` (see `to_precision`) on `device`.

        They take memory once, and only in that type: the files are mapped, and each tensor is converted as it is
        copied.
        """
        with torch.device("meta"):  # no memory, no random start
            model = cls(cls.config_class.from_hf(config)).to_precision(dtype)
        model.to_empty(device=device)
        load_into(model, tensors, model.key_map, source=source)
        return model.eval()


class ImageTextModel(JoinedModel):
    """One whose images stand in the sequence of the language model.

    To generate, give the language model those of the prompt:
    `generate(model.language, ids, mask, embeddings=model.embed(ids, pixel_values), options=...)`.
    """

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """(B, T) and the images of all rows -> (B, T, E); see `place`."""
        return self.place(input_ids, None if pixel_values is None else self.encode_image(pixel_values))

    def place(self, input_ids: Tensor, image: Tensor | None) -> Tensor:
        """(B, T) -> (B, T, E): the embeddings of words, and at each `image_token`, in the order of reading, the next of
        the image's, (..., E). Raises UserError unless there are as many of both."""
        embeddings, places = self.language.embed(input_ids), input_ids == self.config.image_token
        image = (embeddings[:0] if image is None else image).flatten(0, -2).to(embeddings.dtype)
        if (there := int(places.sum())) != len(image):
            place = f"tokens {self.config.image_token}, each the place of a part of an image"
            raise UserError(f"the prompts have {there} {place}, but the images given have {len(image)} parts")
        return embeddings.masked_scatter(places[..., None], image)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """(B, T) and the images of all rows -> logits (B, T, V).

        attention_mask (B, cached + T), True = a real token; rows may be padded on either side.
        """
        return self.read(self.embed(input_ids, pixel_values), attention_mask, cache=cache)

    def read(self, embeddings: Tensor, attention_mask: Tensor | None, *, cache: DecoderCache | None = None) -> Tensor:
        """(B, T, E) -> logits (B, T, V)."""
        return self.language.logits(self.language.hidden(embeddings, attention_mask, cache=cache))


def check_place(token: int, vocabulary: int) -> None:
    """Raises UserError unless the token of an image's places is one of the vocabulary."""
    if token >= vocabulary:
        raise UserError(f"the token of an image's places is {token}, but the vocabulary ends at {vocabulary - 1}")


def end_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """The end tokens that the file itself names, if any: they come before those of its text_config."""
    return {} if config.get("eos_token_id") is None else {"eos_token_id": config["eos_token_id"]}
