"""Decoding: from a prompt and a memory to tokens. One state, one set of options, for every decoder.

Shapes: B rows, P prompt tokens (padded on the left), A new tokens, V vocabulary.
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from vqa_scratch.generate.beam import beam_search
from vqa_scratch.generate.choose import chooser
from vqa_scratch.generate.loop import COMPACT_BELOW, Generated, decode
from vqa_scratch.generate.ranking import rank
from vqa_scratch.generate.start import begin
from vqa_scratch.generate.state import Decoder, State
from vqa_scratch.generation_options import GenerationOptions
from vqa_scratch.nn import taps
from vqa_scratch.nn.attention import masked_safely
from vqa_scratch.nn.memory import Memory

__all__ = ["Decoder", "Generated", "GenerationOptions", "State", "begin", "decode", "generate", "greedy", "rank"]


def _without_gradients() -> AbstractContextManager:
    """Inference mode, whose tensors no gradient may ever read; a trace keeps what it sees, so it gets plain ones."""
    return torch.no_grad() if taps.active() else torch.inference_mode()


def generate(
    decoder: Decoder,
    prompt_ids: Tensor,
    prompt_mask: Tensor | None = None,
    memory: list[Memory] | None = None,
    *,
    options: GenerationOptions,
    fill: int = 0,
    generator: torch.Generator | None = None,
    graph: bool = False,
) -> Generated:
    """New tokens after each prompt, as the options say: greedy, sampled, or the best of a beam search.

    prompt_ids (B, P) with prompt_mask (B, P), True = a real token, padding on the left; None means no padding. `memory`
    is what cross-attention reads. `generator` draws the samples, instead of one seeded with `options.seed`. `graph`
    replays the steps as a CUDA graph (see `generate/graph.py`); ValueError where that cannot be had.
    Raises UserError on options that do not fit the vocabulary, ValueError if the positions do not serve so many tokens.
    """
    if generator is None and options.seed is not None:
        generator = torch.Generator(prompt_ids.device).manual_seed(options.seed)
    with _without_gradients(), masked_safely(prompt_ids.device):
        steps, beams = options.max_new_tokens - 1, options.num_beams
        scores, state = begin(decoder, prompt_ids, prompt_mask, memory, steps=steps, members=beams, graph=graph)
        options.check_vocabulary(scores.shape[-1])
        if beams > 1:
            made = beam_search(scores, state, options, prompt_ids, prompt_mask, fill)
        else:
            choose = chooser(options, prompt_ids, prompt_mask, generator)
            limits = {"max_new_tokens": options.max_new_tokens, "eos_id": options.eos_id, "fill": fill}
            # A graph of fewer rows would have to be captured first, and on a GPU a row less hardly makes a step faster.
            made = decode(scores, state, choose, **limits, compact_below=0.0 if graph else COMPACT_BELOW)
    return Generated(*(part.clone() for part in made))


def greedy(
    decoder: Decoder,
    prompt_ids: Tensor,
    prompt_mask: Tensor | None,
    memory: list[Memory] | None,
    *,
    max_new_tokens: int,
    eos_id: int | None,
    fill: int = 0,
) -> Generated:
    """The likeliest token at each step, until every row has said EOS or `max_new_tokens`; see `generate`."""
    options = GenerationOptions(max_new_tokens, eos_id)
    return generate(decoder, prompt_ids, prompt_mask, memory, options=options, fill=fill)
