"""Opens a checkpoint.pt of OpenFlamingo (Awadalla et al. 2023, arXiv 2308.01390): what it adds to two frozen models.

The file has no config.json, and neither the image encoder nor the decoder: it has a resampler, gated layers before
some of the decoder's blocks, and the decoder's word embeddings, which have rows for <image> and <|endofchunk|>.

Shapes: N image tokens, C their width, V vocabulary.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from vqa_scratch.errors import UserError, naming
from vqa_scratch.models.hf_config import ReleasedDecoder
from vqa_scratch.models.resampler import Resampler, ResamplerConfig
from vqa_scratch.nn.gated_cross import flamingo_layer
from vqa_scratch.weights.convert import find, load_into, unwrapped
from vqa_scratch.weights.files import read_pickle
from vqa_scratch.weights.maps_joined import OPEN_FLAMINGO

GATED = "lang_encoder.gated_cross_attn_layers"


def load_open_flamingo(path: str | PathLike[str], decoder: ReleasedDecoder) -> Resampler:
    """Give the decoder the gated layers and the words of the file, and return the resampler; both in eval mode.

    The decoder then reads `images_of_texts(states, last_images(ids, image_token))` of states (B, I, 64, C) that the
    resampler makes of the patches of a CLIP's image tower, its tokens (N, C) without the class token. Raises UserError,
    one line, on a file of another kind or for another decoder.
    """
    tensors = {unwrapped(key): tensor for key, tensor in read_pickle(Path(path)).items()}
    with naming(path):
        words = find(tensors, _key_of_words(decoder))
        trained = _trained(tensors)
        latents, gates = trained.get("perceiver.latents"), _numbers(trained, rf"{GATED}\.(\d+)\.attn_gate")
        if latents is None or latents.ndim != 2 or not gates:
            raise UserError("no checkpoint.pt of an OpenFlamingo: it has no resampler, or no gated layers")
        if gates[-1] >= len(decoder.blocks):
            raise UserError(f"it has a gated layer before block {gates[-1]}, the decoder {len(decoder.blocks)} blocks")
        sizes = ResamplerConfig(latents.shape[1], len(latents), len(_numbers(trained, r"perceiver\.layers\.(\d+)\.")))
        layers = {number: flamingo_layer(decoder.config.dim, latents.shape[1]) for number in gates}
        resampler = Resampler(sizes)
        own = nn.ModuleDict(
            {"resampler": resampler, "gated": nn.ModuleDict({str(n): one for n, one in layers.items()})}
        )
        own.to(decoder.head)  # its type and place
        load_into(own, trained, OPEN_FLAMINGO, source=str(path))
        if words is not None:
            _take_words(decoder, words)
    decoder.add_gated(layers)
    decoder.eval()
    return resampler.eval()


def _trained(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The resampler and the gated layers, each once: a file may have the latter twice, also among the blocks."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = OPEN_FLAMINGO.bare(key)
        if not name.startswith(("perceiver.", f"{GATED}.")):
            continue  # frozen parts, as some versions of it leave them in
        if name in found and not torch.equal(found[name], tensor):
            raise UserError(f"{key} differs from {name}, of which it is a copy")
        found[name] = tensor
    return found


def _numbers(tensors: dict[str, Tensor], pattern: str) -> list[int]:
    """The numbers that the pattern finds in the keys, in order."""
    return sorted({int(found[1]) for key in tensors if (found := re.match(pattern, key)) is not None})


def _key_of_words(decoder: ReleasedDecoder) -> str:
    """What the decoder's own checkpoints call its word embeddings."""
    (key,) = (entry.theirs[0] for entry in decoder.key_map.body if entry.ours == "tokens.weight")
    return key


def _take_words(decoder: ReleasedDecoder, words: Tensor) -> None:
    """Replace the decoder's table of words (V, E), and its head with it, by one that may have more rows."""
    table = decoder.get_submodule("tokens")
    assert isinstance(table, nn.Embedding)
    (rows, width), tied = table.weight.shape, decoder.head is table.weight
    if words.ndim != 2 or words.shape[1] != width or len(words) < rows or (len(words) > rows and not tied):
        own = "the same" if not tied else f"at least {rows}"
        raise UserError(f"its words are {tuple(words.shape)}, the decoder's ({rows}, {width}): it needs {own} rows")
    decoder.tokens = nn.Embedding.from_pretrained(words.to(table.weight), freeze=not table.weight.requires_grad)
    decoder.config = replace(decoder.config, vocab_size=len(words))
