"""Decoding: from a prompt and a memory to tokens. One cache serves every decoder.

Shapes: B rows, P prompt tokens (padded on the left), A new tokens, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vqa_scratch.models.gpt2 import GPT2
from vqa_scratch.nn.memory import Memory


class Generated(NamedTuple):
    """`ids` (B, A): the new tokens, EOS included, then `fill`; `log_probs` (B, A): of each of them, 0 after EOS."""

    ids: Tensor
    log_probs: Tensor
    lengths: Tensor  # (B,) new tokens a row, EOS included


@torch.no_grad()
def greedy(
    decoder: GPT2,
    prompt_ids: Tensor,
    prompt_mask: Tensor | None,
    memory: list[Memory] | None,
    *,
    max_new_tokens: int,
    eos_id: int,
    fill: int = 0,
) -> Generated:
    """The most likely token at each step, until every row has said EOS or `max_new_tokens`.

    prompt_ids (B, P) with prompt_mask (B, P), True = a real token; None means no padding.
    """
    rows, device = len(prompt_ids), prompt_ids.device
    cache = decoder.new_cache()
    mask = torch.ones_like(prompt_ids, dtype=torch.bool) if prompt_mask is None else prompt_mask.bool()
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    tokens, scores = [], []
    inputs = prompt_ids
    for _ in range(max_new_tokens):
        hidden = decoder.hidden(inputs, mask, memory=memory, cache=cache)[:, -1]
        memory = None  # its keys are in the cache
        log_probs = decoder.logits(hidden).float().log_softmax(-1)  # (B, V)
        score, chosen = log_probs.max(-1)
        tokens.append(chosen.masked_fill(done, fill))
        scores.append(score.masked_fill(done, 0.0))
        done = done | (chosen == eos_id)
        if done.all():
            break
        inputs = tokens[-1][:, None]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    ids, log_probs = torch.stack(tokens, 1), torch.stack(scores, 1)
    is_eos = ids == eos_id
    lengths = torch.where(is_eos.any(1), is_eos.int().argmax(1) + 1, ids.shape[1])
    return Generated(ids, log_probs, lengths)
