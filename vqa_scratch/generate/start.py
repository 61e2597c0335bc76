"""Runs the prompts through the decoder: the scores of the first new token, and the state to decode from.

Shapes: G groups (prompts), Q prefix embeddings, P prompt tokens, E width of the embedding, V vocabulary.
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from vqa_scratch.errors import UserError
from vqa_scratch.generate.fast import FastState, GraphState
from vqa_scratch.generate.state import ModuleState, State
from vqa_scratch.nn import taps
from vqa_scratch.nn.cache import DecoderCache
from vqa_scratch.nn.connecting import Conditioning
from vqa_scratch.nn.decoding import Decoder, FastParts
from vqa_scratch.nn.memory import Memory, check_rows

NOTHING = Conditioning()  # besides the prompt


def without_gradients() -> AbstractContextManager:
    """Inference mode; only no_grad in a trace, which keeps tensors that a gradient may need later."""
    return torch.no_grad() if taps.active() else torch.inference_mode()


def check_length(decoder: Decoder, prompt_ids: Tensor, given: Conditioning, new_tokens: int) -> None:
    """Raise ValueError if prefix, prompt and new tokens need more positions than the decoder has."""
    total = prompt_ids.shape[1] + given.prefix_length + new_tokens
    if decoder.max_positions is not None and total > decoder.max_positions:
        raise ValueError(f"{total} tokens, but the position table serves {decoder.max_positions}")


def fast_parts(decoder: Decoder) -> FastParts | None:
    """The parts for a fast state; None if the modules must run: in a trace, in training mode, or without parts."""
    parts = None if taps.active() or decoder.training else decoder.fast_state()
    return None if parts is None else parts._replace(head_copy=decoder.head_copy)


def padding(prompt_mask: Tensor | None) -> Tensor | None:
    """The mask as bool; None if nothing is padded."""
    return None if prompt_mask is None or bool(prompt_mask.all()) else prompt_mask.bool()


def _before(embeddings: Tensor, mask: Tensor | None, given: Conditioning) -> tuple[Tensor, Tensor | None]:
    """Prefix and prompt (G, Q + P, E) with their mask, padding first."""
    prefix = given.prefix
    assert prefix is not None
    if prefix.ndim != 3 or prefix.shape[::2] != embeddings.shape[::2]:
        rows, _, width = embeddings.shape
        raise ValueError(f"prefix must be ({rows}, any number, {width}), got {tuple(prefix.shape)}")
    mask = given.seen(mask, embeddings.shape[1])
    embeddings = torch.cat([prefix, embeddings], 1)
    if mask is not None:  # padding between prefix and prompt would change the distances in T5
        order = mask.int().argsort(dim=1, stable=True)
        mask, embeddings = mask.gather(1, order), embeddings.gather(1, order[..., None].expand_as(embeddings))
    return embeddings, mask


def prefill(
    decoder: Decoder,
    prompt_ids: Tensor,
    prompt_mask: Tensor | None,
    given: Conditioning | None,
    embeddings: Tensor | None = None,
) -> tuple[Tensor, DecoderCache, Tensor | None]:
    """The scores of the first new token (G, V), the cache of the prompts, and its mask, None without padding.

    Arguments as in `begin`.
    """
    given = given or NOTHING
    embeddings = decoder.embed(prompt_ids) if embeddings is None else embeddings
    if embeddings.shape[:2] != prompt_ids.shape:
        raise ValueError(f"embeddings must be {(*prompt_ids.shape, 'width')}, got {tuple(embeddings.shape)}")
    mask, cache = padding(prompt_mask), decoder.new_cache()
    if given.prefix_index is not None:
        hidden = decoder.hidden_after(given, embeddings, mask, cache=cache)
        return decoder.logits(hidden[:, -1]), cache, given.seen(mask, embeddings.shape[1])
    if given.prefix is not None:
        embeddings, mask = _before(embeddings, mask, given)
    hidden = decoder.hidden(embeddings, mask, memory=given.memory, cache=cache)[:, -1]
    return decoder.logits(hidden), cache, mask


def _without_tokens(parts: FastParts, cache: DecoderCache, memory: list[Memory] | None, rows: int) -> DecoderCache:
    """The empty cache, with the keys and values of the memory if there is one, as that of no tokens."""
    for block, own in zip(parts.blocks, cache, strict=True):
        like: Tensor = next(block.norm.parameters())
        if memory is not None:
            assert block.cross is not None, "nothing reads the memory"
            read = block.cross.attn.project(memory, cache=own)
            check_rows(read, rows)
            like = read[0].k
        elif torch.is_autocast_enabled(like.device.type):
            like = like.new_empty(0, dtype=torch.get_autocast_dtype(like.device.type))
        nothing = like.new_empty(rows, block.attn.kv_heads, 0, block.attn.head_dim)
        own.append(nothing, nothing)
    return cache


def begin(
    decoder: Decoder,
    prompt_ids: Tensor,
    prompt_mask: Tensor | None,
    given: Conditioning | None,
    *,
    steps: int,
    members: int = 1,
    embeddings: Tensor | None = None,
    graph: bool = False,
) -> tuple[Tensor, State]:
    """Read the prompts. Returns the scores of the first new token (G, V) and the state after the prompts. Call this and
    the steps of the state without gradients.

    prompt_ids (G, P) with prompt_mask (G, P), True = a real token; None means no padding. `given` is what the decoder
    reads besides: memories, or embeddings before the prompts. `embeddings` (G, P, E) are those of the prompts' tokens,
    if not `decoder.embed` of them.
    The state has room for `steps` steps of `members` rows a group; with `graph` it replays them as a CUDA graph. Raises
    ValueError on more tokens than positions, and if a graph is not possible; UserError on more members than tokens in
    the vocabulary.
    """
    given = given or NOTHING
    check_length(decoder, prompt_ids, given, steps)
    parts, (rows, length), memory = fast_parts(decoder), prompt_ids.shape, given.memory
    if graph and parts is None:
        raise ValueError("a CUDA graph needs a decoder with a fast state, in eval mode and without a trace")
    # A prompt of one token is an ordinary step.
    words_only = given.prefix is None and embeddings is None
    one_step = length == members == 1 and words_only and not graph and padding(prompt_mask) is None
    if one_step and parts is not None and (memory is None or parts.blocks[0].cross is not None):
        cache = _without_tokens(parts, decoder.new_cache(), memory, rows)
        state = FastState.after(parts, cache, None, 1 + steps)
        return state.step(prompt_ids[:, 0]), state
    scores, cache, mask = prefill(decoder, prompt_ids, prompt_mask, given, embeddings)
    if members > scores.shape[-1]:  # before a cache for so many rows is made
        raise UserError(f"{members} beams, but the vocabulary has {scores.shape[-1]} tokens")
    if parts is None:
        full = scores.new_ones(rows, cache.length, dtype=torch.bool) if mask is None else mask
        return scores, ModuleState(decoder, cache, full, memory, members)
    if graph:
        return scores, GraphState(parts, cache, mask, steps, members)
    return scores, FastState.after(parts, cache, mask, steps, members)
