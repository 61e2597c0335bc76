"""Ranks a closed list of answers by log-probability, all in one pass after each prompt.

The answers form a tree, so that a common beginning is computed once; all nodes go through the decoder together, each
attending to the prompt and the nodes above it. Prompt and memory are read once. A decoder without a fast state takes
one candidate after the other.

Shapes: B rows, P prompt tokens, C candidates, K nodes of a tree, N edges, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vqa_scratch.generate.fast import tree_states
from vqa_scratch.generate.start import NOTHING, check_length, fast_parts, prefill, without_gradients
from vqa_scratch.nn.attention import masked_safely
from vqa_scratch.nn.cache import DecoderCache
from vqa_scratch.nn.connecting import Conditioning
from vqa_scratch.nn.decoding import Decoder, FastParts
from vqa_scratch.nn.memory import Memory
from vqa_scratch.nn.memory_parts import for_next_tokens

NODES = 256  # of one pass: its attention is K x (P + K) scores a head and row
SCORES = 1 << 24  # elements of the scores (rows x V) made at once


class Tree(NamedTuple):
    """Beginnings of candidates, parents before children. Edge e: how likely is `token` after node `parent`?"""

    tokens: Tensor  # (K,)
    depths: Tensor  # (K,) of the first token: 0
    above: Tensor  # (K, K) bool, True where the second node is the first or one above it
    parents: Tensor  # (N,) node, sorted; -1: the prompt
    asked: Tensor  # (N,) token
    edges: Tensor  # (C, longest) the edges of each candidate; N where it has no more


def tree_of(candidates: Sequence[Sequence[int]]) -> Tree:
    """The tree of the candidates' proper beginnings."""
    nodes: dict[tuple[int, ...], int] = {}
    for candidate in candidates:
        for length in range(1, len(candidate)):
            nodes.setdefault(tuple(candidate[:length]), len(nodes))
    above = torch.eye(len(nodes), dtype=torch.bool)
    for beginning, node in nodes.items():
        for length in range(1, len(beginning)):
            above[node, nodes[beginning[:length]]] = True
    edges = [[(nodes.get(tuple(c[:i]), -1), c[i]) for i in range(len(c))] for c in candidates]  # (parent, token)
    order = {edge: number for number, edge in enumerate(sorted({edge for row in edges for edge in row}))}
    numbers = [torch.tensor([order[edge] for edge in row]) for row in edges]
    return Tree(
        torch.tensor([beginning[-1] for beginning in nodes], dtype=torch.long),
        torch.tensor([len(beginning) - 1 for beginning in nodes], dtype=torch.long),
        above,
        torch.tensor([parent for parent, _ in order]),
        torch.tensor([token for _, token in order]),
        pad_sequence(numbers, batch_first=True, padding_value=len(order)),
    )


def _portions(candidates: Sequence[Sequence[int]]) -> list[list[int]]:
    """Numbers of candidates, sorted by ids so that common beginnings meet, about NODES beginnings a portion."""
    portions: list[list[int]] = [[]]
    size = 0
    for number in sorted(range(len(candidates)), key=lambda i: tuple(candidates[i])):
        if size + len(candidates[number]) - 1 > NODES and portions[-1]:
            portions.append([])
            size = 0
        portions[-1].append(number)
        size += len(candidates[number]) - 1
    return portions


def _by_tree(
    parts: FastParts, cache: DecoderCache, mask: Tensor | None, at_prompt: Tensor, candidates: Sequence[Sequence[int]]
) -> Tensor:
    """(B, C): a portion of the candidates as one tree; at_prompt (B, V) are the log-probabilities of first tokens."""
    tree = Tree(*(part.to(at_prompt.device) for part in tree_of(candidates)))
    begins = int((tree.parents < 0).sum())
    found = [at_prompt[:, tree.asked[:begins]]]
    if len(tree.tokens):
        found += _after_nodes(parts, tree_states(parts, cache, mask, *tree[:3]), tree, begins, at_prompt.shape[1])
    log_probs = torch.cat([*found, at_prompt.new_zeros(len(at_prompt), 1)], 1)  # (B, N + 1)
    return log_probs[:, tree.edges].sum(-1)


def _after_nodes(parts: FastParts, states: Tensor, tree: Tree, begins: int, vocabulary: int) -> list[Tensor]:
    """Log-probabilities of the edges after `begins`, (B, some) a piece; never more than SCORES scores at once."""
    found, at = [], begins
    nodes = torch.arange(states.shape[1], device=states.device)
    for piece in nodes.split(max(1, SCORES // (len(states) * vocabulary))):
        first, last = int(piece[0]), int(piece[-1])
        until = int((tree.parents <= last).sum())
        log_probs = parts.logits(states[:, first : last + 1]).float().log_softmax(-1)
        found.append(log_probs[:, tree.parents[at:until] - first, tree.asked[at:until]])
        at = until
    return found


def _one_by_one(
    decoder: Decoder,
    cache: DecoderCache,
    mask: Tensor | None,
    memory: list[Memory] | None,
    at_prompt: Tensor,
    candidates: Sequence[Sequence[int]],
) -> Tensor:
    """(B, C) by the decoder's modules: one candidate after all prompts at a time, then the cache is rewound."""
    rows, length, result = len(at_prompt), cache.length, list[Tensor]()
    memory = for_next_tokens(memory)
    for candidate in candidates:
        ids = torch.tensor([candidate], device=at_prompt.device).expand(rows, -1)  # (B, tokens)
        log_probs = at_prompt[:, None]
        if len(candidate) > 1:
            seen = None if mask is None else F.pad(mask, (0, len(candidate) - 1), value=True)
            hidden = decoder.hidden(decoder.embed(ids[:, :-1]), seen, memory=memory, cache=cache)
            log_probs = torch.cat([log_probs, decoder.logits(hidden).float().log_softmax(-1)], 1)
            cache.rewind(length)
        result.append(log_probs.gather(2, ids[..., None]).sum((1, 2)))
    return torch.stack(result, 1)


def rank(
    decoder: Decoder,
    prompt_ids: Tensor,
    prompt_mask: Tensor | None,
    given: Conditioning | None,
    candidates: Sequence[Sequence[int]],
) -> Tensor:
    """Log-probability of each candidate after each prompt, (B, C) in nats: the sum over its tokens.

    prompt_ids (B, P) with prompt_mask (B, P), True = a real token, padding on the left; None means no padding. `given`
    is what the decoder reads besides, as in `generate`. `candidates` are ids, with an end token if the answer has to
    end there. Raises ValueError on no candidates, an empty one, an id outside the vocabulary, more tokens than
    positions, and a decoder in training mode.
    """
    if not candidates or not all(candidates):
        raise ValueError("rank needs candidates of one token at least")
    if decoder.training:
        raise ValueError("rank needs a decoder in eval mode")
    given = given or NOTHING
    check_length(decoder, prompt_ids, given, max(map(len, candidates)) - 1)
    with without_gradients(), masked_safely(prompt_ids.device):
        first, cache, mask = prefill(decoder, prompt_ids, prompt_mask, given)
        at_prompt = first.float().log_softmax(-1)  # (B, V)
        rows, vocabulary = at_prompt.shape
        if max(max(c) for c in candidates) >= vocabulary:
            raise ValueError(f"a candidate has token {max(max(c) for c in candidates)}, the vocabulary {vocabulary}")
        parts = fast_parts(decoder)
        result = at_prompt.new_empty(rows, len(candidates))
        if parts is None:
            result.copy_(_one_by_one(decoder, cache, mask, given.memory, at_prompt, candidates))
        else:
            for portion in _portions(candidates):
                some = _by_tree(parts, cache, mask, at_prompt, [candidates[i] for i in portion])
                result[:, torch.tensor(portion, device=first.device)] = some
    return result.clone()
