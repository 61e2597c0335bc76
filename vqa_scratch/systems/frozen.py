"""Frozen encoders: their states are computed once, cached in files, and read instead of running the encoder.

The states are those of the encoder in eval mode, in the precision of the run, in which the connector computes anyway.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vqa_scratch.data.feature_store import ImageFeatures, TextFeatures
from vqa_scratch.models.vqa import FROZEN_PARTS
from vqa_scratch.nn.states import States


def cache_features(system: Any) -> list[ImageFeatures | TextFeatures]:
    """Replace each frozen encoder of a `VQASystem` by a file of its states: batches then hold states.

    Nothing is computed yet: `ready` of the returned features writes the file, with the weights of that moment.
    """
    model, precision, folder = system.model, system.precision, system.options.cache
    frozen = FROZEN_PARTS[system.options.freeze]
    kept: list[ImageFeatures | TextFeatures] = []

    def at_rest(part: nn.Module, encode: Callable[..., States]) -> Callable[..., States]:
        """`encode` with the part in eval mode, on the device, in the precision of the run."""

        @torch.no_grad()
        def run(*inputs: Tensor) -> States:
            part.eval()
            with precision.autocast():
                return encode(*(x.to(precision.device) for x in inputs))

        return run

    if "image" in frozen:
        encode = at_rest(model.image, system.encode_image)
        height, width = system.processor.output_size
        places = model.image.places(height, width)
        sizes = model.connector.kept_tokens(model.image.prefix_tokens, places.grid), model.image.dim

        def image_states(images: Tensor) -> Tensor:
            return model.connector.kept(encode(images)).tokens

        for name, split in system.splits.items():
            pictures = ImageFeatures(split.images, model.image, image_states, folder, sizes, precision.dtype)
            system.splits[name] = replace(split, images=pictures)
            kept.append(pictures)
        system.encode_image = partial(States, places=places)
    if "text" in frozen and model.text is not None:
        encode_text = at_rest(model.text, system.encode_text)

        def text_states(ids: Tensor, mask: Tensor) -> Tensor:
            return encode_text(ids, mask).tokens.cpu()

        for split in system.splits.values():
            texts = TextFeatures(split.questions, model.text, text_states, folder, model.text.dim, precision.dtype)
            split.questions.cached = texts.batch
            kept.append(texts)
        system.encode_text = States
    return kept
