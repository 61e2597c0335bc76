"""Reading the prompts: the first scores, and the state that takes decoding from there.

Shapes: G groups (prompts), P prompt tokens, V vocabulary.
"""

import torch
from torch import Tensor

from vqa_scratch.generate.graph import GraphState
from vqa_scratch.generate.state import Decoder, ModuleState, State, StaticState
from vqa_scratch.nn import taps
from vqa_scratch.nn.cache import DecoderCache
from vqa_scratch.nn.memory import Memory


def prefill(
    decoder: Decoder, prompt_ids: Tensor, prompt_mask: Tensor | None, memory: list[Memory] | None, steps: int
) -> tuple[Tensor, DecoderCache, Tensor | None]:
    """The scores of the first new token (G, V), the cache behind the prompts, and the mask, None if nothing is padded.

    `steps` tokens must fit behind the prompts. Arguments and errors as in `begin`.
    """
    mask = None if prompt_mask is None or bool(prompt_mask.all()) else prompt_mask.bool()
    limit, total = decoder.decoding_parts().max_positions, prompt_ids.shape[1] + steps
    if limit is not None and total > limit:
        raise ValueError(f"{total} tokens, but the position table serves {limit}")
    cache = decoder.new_cache()
    hidden = decoder.hidden(prompt_ids, mask, memory=memory, cache=cache)[:, -1]
    return decoder.logits(hidden), cache, mask


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
    """Read the prompts. Returns the scores of the first new token (G, V), and the state after the prompts.

    prompt_ids (G, P) with prompt_mask (G, P), True = a real token; None means no padding. The state takes up to `steps`
    steps of `members` rows a group; with `graph` it replays them as a CUDA graph. Raises ValueError if the decoder's
    positions do not serve so many tokens, and where a graph cannot be had.
    """
    logits, cache, mask = prefill(decoder, prompt_ids, prompt_mask, memory, steps)
    if graph:
        return logits, GraphState(decoder, cache, mask, steps, members)
    if taps.active() or decoder.training:
        full = torch.ones_like(prompt_ids, dtype=torch.bool) if mask is None else mask
        return logits, ModuleState(decoder, cache, full, memory, members)
    return logits, StaticState(decoder, cache, mask, steps, members)
