"""Memories of several parts: the images of a text, of which each token reads one, and parts joined to one.

Shapes: B rows, I images a text, N memory tokens, T query tokens, D width, H heads, d head size.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vqa_scratch.nn.memory import KeyValue, Memory


def images_of_texts(states: Tensor, image_of_token: Tensor) -> Memory:
    """The images of B texts, (B, I, N, D), of which each token reads one: the `image_of_token[b, t]`-th of its row, or
    none (zeros) where that is -1.

    image_of_token (B, T) long. Where every token reads the one image of its row there is no mask. An image with several
    texts is no such memory: give it an `index`, and its keys are shared.
    """
    images, tokens = states.shape[1:3]
    if images == 1 and bool((image_of_token == 0).all()):
        return Memory(states[:, 0])
    image_of_state = torch.arange(images, device=states.device).repeat_interleave(tokens)  # (I * N,)
    return Memory(states.flatten(1, 2), seen=image_of_token[..., None] == image_of_state)


def last_images(ids: Tensor, image_token: int) -> Tensor:
    """(B, T) -> (B, T): the number of the last image up to and including each token, -1 before the first.

    What a text reads in Flamingo (Alayrac et al. 2022, 2204.14198, section 2.3).
    """
    return (ids == image_token).cumsum(1) - 1


def of_last_token(part: KeyValue) -> KeyValue:
    """The same for tokens that may all read what the last token of each row may: what a cache keeps."""
    if part.seen is None:
        return part
    last = part.seen[:, -1]
    return part._replace(mask=last if part.mask is None else last & part.mask.bool(), seen=None)


def for_next_tokens(memory: Sequence[Memory] | None) -> list[Memory] | None:
    """The same memories for a pass after this one, in a cache that has their keys."""
    return None if memory is None else [replace(part, seen=None) for part in memory]


def of_tokens(memory: Sequence[Memory], kept: Sequence[KeyValue]) -> list[KeyValue]:
    """Keys and values that a cache kept, with what the tokens of this pass may read of them."""
    both = zip(memory, kept, strict=True)
    return [part if own.seen is None else part._replace(mask=own.mask, seen=own.seen) for own, part in both]


def concatenate(parts: Sequence[KeyValue]) -> KeyValue:
    """All parts as one, with an entry for each row."""
    parts = [part.per_row() for part in parts]
    if len(parts) == 1:
        return parts[0]
    mask = _joined([part.mask for part in parts], parts)
    seen = _joined([part.seen for part in parts], parts)
    k, v = torch.cat([part.k for part in parts], 2), torch.cat([part.v for part in parts], 2)
    return KeyValue(k, v, mask, parts[0].sharing, seen)


def _joined(masks: Sequence[Tensor | None], parts: Sequence[KeyValue]) -> Tensor | None:
    """The masks (B, ..., N) of the parts as one; a part without one is seen whole."""
    like = next((mask for mask in masks if mask is not None), None)
    if like is None:
        return None
    whole = [like.new_ones(*like.shape[:-1], part.k.shape[2], dtype=torch.bool) for part in parts]
    return torch.cat([w if mask is None else mask.bool() for mask, w in zip(masks, whole, strict=True)], -1)
