"""Generate tokens from a prompt and what else the decoder reads, with the same options for every decoder.

Shapes: B rows, P prompt tokens (padded on the left), A new tokens, E width of the embedding, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vqa_scratch.generate.beam import beam_search
from vqa_scratch.generate.choose import chooser
from vqa_scratch.generate.loop import COMPACT_BELOW, Choose, Generated, decode
from vqa_scratch.generate.ranking import rank
from vqa_scratch.generate.start import begin, without_gradients
from vqa_scratch.generate.state import State
from vqa_scratch.generation_options import GenerationOptions
from vqa_scratch.nn.attention import masked_safely
from vqa_scratch.nn.connecting import Conditioning
from vqa_scratch.nn.decoding import Decoder

__all__ = ["Conditioning", "Decoder", "Generated", "GenerationOptions", "State", "begin", "decode", "generate", "rank"]


def generate(
    decoder: Decoder,
    prompt_ids: Tensor,
    prompt_mask: Tensor | None = None,
    given: Conditioning | None = None,
    *,
    options: GenerationOptions,
    fill: int = 0,
    generator: torch.Generator | None = None,
    embeddings: Tensor | None = None,
    graph: bool = False,
    choosing: Callable[[Choose], Choose] | None = None,
) -> Generated:
    """New tokens after each prompt: greedy, sampled, or by beam search, depending on the options.

    prompt_ids (B, P) with prompt_mask (B, P), True = a real token, padding on the left; None means no padding. `given`
    is what the decoder reads besides: memories, or embeddings before the prompts. `embeddings` (B, P, E) are those of
    the prompt's tokens if some are not words, as in `ImageTextModel.embed`. `generator` draws the samples, instead of
    one seeded with `options.seed`. `graph` replays the steps as a CUDA graph (`GraphState`). `choosing` wraps how each
    token is chosen, without beams: to see it at once, or to choose another. Raises UserError on options that do not
    fit the vocabulary, ValueError on more tokens than positions or if a graph is not possible.
    """
    if generator is None and options.seed is not None:
        generator = torch.Generator(prompt_ids.device).manual_seed(options.seed)
    with without_gradients(), masked_safely(prompt_ids.device):
        steps, beams = options.max_new_tokens - 1, options.num_beams
        room = {"steps": steps, "members": beams}
        scores, state = begin(decoder, prompt_ids, prompt_mask, given, **room, embeddings=embeddings, graph=graph)
        options.check_vocabulary(scores.shape[-1])
        if beams > 1:
            made = beam_search(scores, state, options, prompt_ids, prompt_mask, fill)
        else:
            choose = chooser(options, prompt_ids, prompt_mask, generator)
            choose = choose if choosing is None else choosing(choose)
            # Fewer rows need a new graph, and on a GPU they hardly make a step faster.
            most, end, below = options.max_new_tokens, options.eos_id, 0.0 if graph else COMPACT_BELOW
            made = decode(scores, state, choose, max_new_tokens=most, eos_id=end, fill=fill, compact_below=below)
    log_probs = None if made.log_probs is None else made.log_probs.clone()
    return Generated(made.ids.clone(), log_probs, made.lengths.clone())
