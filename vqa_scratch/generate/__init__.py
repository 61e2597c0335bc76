"""Generate tokens from a prompt and a memory, with the same options for every decoder.

Shapes: B rows, Q prefix embeddings, P prompt tokens (padded on the left), A new tokens, E width of the embedding,
V vocabulary.
"""

import torch
from torch import Tensor

from vqa_scratch.generate.beam import beam_search
from vqa_scratch.generate.choose import chooser
from vqa_scratch.generate.loop import COMPACT_BELOW, Generated, decode
from vqa_scratch.generate.ranking import rank
from vqa_scratch.generate.start import begin, without_gradients
from vqa_scratch.generate.state import State
from vqa_scratch.generation_options import GenerationOptions
from vqa_scratch.nn.attention import masked_safely
from vqa_scratch.nn.decoding import Decoder
from vqa_scratch.nn.memory import Memory

__all__ = ["Decoder", "Generated", "GenerationOptions", "State", "begin", "decode", "generate", "greedy", "rank"]


def generate(
    decoder: Decoder,
    prompt_ids: Tensor,
    prompt_mask: Tensor | None = None,
    memory: list[Memory] | None = None,
    *,
    options: GenerationOptions,
    fill: int = 0,
    generator: torch.Generator | None = None,
    prefix: Tensor | None = None,
    prefix_index: Tensor | None = None,
    embeddings: Tensor | None = None,
    graph: bool = False,
) -> Generated:
    """New tokens after each prompt: greedy, sampled, or by beam search, depending on the options.

    prompt_ids (B, P) with prompt_mask (B, P), True = a real token, padding on the left; None means no padding. `memory`
    is what cross-attention reads. `prefix` (B, Q, E) are embeddings before the prompt's tokens: never padding, and
    counted by positions; with `prefix_index` (B,) row b has prefix `prefix_index[b]` of fewer, each read once, whatever
    the number of its rows. `embeddings` (B, P, E) are those of the prompt's tokens if some are not words, as in
    `ImageTextModel.embed`. `generator` draws the samples, instead of one seeded with `options.seed`. `graph` replays
    the steps as a CUDA graph (`GraphState`). Raises UserError on options that do not fit the vocabulary, ValueError on
    more tokens than positions or if a graph is not possible.
    """
    if generator is None and options.seed is not None:
        generator = torch.Generator(prompt_ids.device).manual_seed(options.seed)
    with without_gradients(), masked_safely(prompt_ids.device):
        steps, beams = options.max_new_tokens - 1, options.num_beams
        scores, state = begin(
            decoder, prompt_ids, prompt_mask, memory, steps=steps, members=beams, prefix=prefix,
            prefix_index=prefix_index, embeddings=embeddings, graph=graph,
        )  # fmt: skip
        options.check_vocabulary(scores.shape[-1])
        if beams > 1:
            made = beam_search(scores, state, options, prompt_ids, prompt_mask, fill)
        else:
            choose = chooser(options, prompt_ids, prompt_mask, generator)
            # Fewer rows need a new graph, and on a GPU they hardly make a step faster.
            most, end, below = options.max_new_tokens, options.eos_id, 0.0 if graph else COMPACT_BELOW
            made = decode(scores, state, choose, max_new_tokens=most, eos_id=end, fill=fill, compact_below=below)
    log_probs = None if made.log_probs is None else made.log_probs.clone()
    return Generated(made.ids.clone(), log_probs, made.lengths.clone())


def greedy(
    decoder: Decoder,
    prompt_ids: Tensor,
    prompt_mask: Tensor | None,
    memory: list[Memory] | None,
    *,
    max_new_tokens: int,
    eos_id: int | tuple[int, ...] | None,
    fill: int = 0,
    prefix: Tensor | None = None,
) -> Generated:
    """The most likely token at each step, until every row has ended or has `max_new_tokens`; see `generate`."""
    options = GenerationOptions(max_new_tokens, eos_id)
    return generate(decoder, prompt_ids, prompt_mask, memory, options=options, fill=fill, prefix=prefix)
