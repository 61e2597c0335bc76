"""Reading the prompts: the first scores, and the state that takes decoding from there.

Shapes: G groups (prompts), P prompt tokens, V vocabulary.
"""

import torch
from torch import Tensor

from vqa_scratch.errors import UserError
from vqa_scratch.generate.graph import GraphState
from vqa_scratch.generate.single import SingleState
from vqa_scratch.generate.state import Decoder, ModuleState, State, StaticState
from vqa_scratch.nn import taps
from vqa_scratch.nn.cache import DecoderCache
from vqa_scratch.nn.decoding import DecoderParts
from vqa_scratch.nn.memory import Memory, check_rows


def check_length(parts: DecoderParts, total: int) -> None:
    """Raise ValueError if the positions do not serve so many tokens."""
    if parts.max_positions is not None and total > parts.max_positions:
        raise ValueError(f"{total} tokens, but the position table serves {parts.max_positions}")


def prefill(
    decoder: Decoder, prompt_ids: Tensor, prompt_mask: Tensor | None, memory: list[Memory] | None
) -> tuple[Tensor, DecoderCache, Tensor | None]:
    """The scores of the first new token (G, V), the cache behind the prompts, and the mask, None if nothing is padded.

    Arguments as in `begin`.
    """
    mask = None if prompt_mask is None or bool(prompt_mask.all()) else prompt_mask.bool()
    cache = decoder.new_cache()
    hidden = decoder.hidden(prompt_ids, mask, memory=memory, cache=cache)[:, -1]
    return decoder.logits(hidden), cache, mask


def _only_memory(parts: DecoderParts, cache: DecoderCache, memory: list[Memory], rows: int) -> DecoderCache:
    """The empty cache with the keys and values of the memory, and of no token yet."""
    for layer, own in zip(parts.layers, cache, strict=True):
        read = layer.cross.project(memory)
        check_rows(read, rows)
        own.fill_cross(read)
        nothing = read[0].k.new_empty(rows, layer.attn.heads, 0, layer.attn.head_dim)
        own.append(nothing, nothing)
    return cache


def begin(
    decoder: Decoder,
    prompt_ids: Tensor,
    prompt_mask: Tensor | None,
    memory: list[Memory] | None,
    *,
    steps: int,
    members: int = 1,
    graph: bool = False,
) -> tuple[Tensor, State]:
    """Read the prompts. Returns the scores of the first new token (G, V), and the state after the prompts. Call it, and
    the state's steps, where gradients are off.

    prompt_ids (G, P) with prompt_mask (G, P), True = a real token; None means no padding. The state takes up to `steps`
    steps of `members` rows a group; with `graph` it replays them as a CUDA graph. Raises ValueError if the decoder's
    positions do not serve so many tokens, and where a graph cannot be had; UserError on more members than tokens in the
    vocabulary.
    """
    parts, (rows, length) = decoder.decoding_parts(), prompt_ids.shape
    check_length(parts, length + steps)
    modules = taps.active() or decoder.training
    make = SingleState if rows == members == 1 else StaticState
    reads = memory is not None and parts.layers[0].cross is not None
    if prompt_mask is not None and bool(prompt_mask.all()):
        prompt_mask = None
    # A prompt of one token is a step like any other.
    if length == members == 1 and prompt_mask is None and reads and not modules and not graph:
        state = make(parts, _only_memory(parts, decoder.new_cache(), memory, rows), None, 1 + steps, members)
        return state.step(prompt_ids[:, 0]), state
    logits, cache, mask = prefill(decoder, prompt_ids, prompt_mask, memory)
    if members > logits.shape[-1]:  # before a cache for so many rows is made
        raise UserError(f"{members} beams, but the vocabulary has {logits.shape[-1]} tokens")
    if graph:
        return logits, GraphState(parts, cache, mask, steps, members)
    if modules:
        full = torch.ones_like(prompt_ids, dtype=torch.bool) if mask is None else mask
        return logits, ModuleState(decoder, cache, full, memory, members)
    return logits, make(parts, cache, mask, steps, members)
