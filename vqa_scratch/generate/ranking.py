"""Ranking a closed list of answers by their log-probability, all in one pass behind each prompt.

The answers are joined in a tree of their beginnings, so that what two begin with is computed once; all nodes go through
the decoder together, each seeing the prompt and the nodes above it. Prompt and memory are read once.

Shapes: B rows, P prompt tokens, C candidates, K nodes of a tree, E edges, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vqa_scratch.generate.start import check_length, prefill
from vqa_scratch.generate.state import Decoder, StaticState
from vqa_scratch.nn.attention import masked_safely
from vqa_scratch.nn.memory import Memory

NODES = 256  # of one pass: its attention is K x (P + K) scores a head and row
SCORES = 1 << 24  # elements of the scores (rows x V) made at once


class Tree(NamedTuple):
    """Beginnings of candidates, parents before children. Edge e asks: how likely is `token` after node `parent`?"""

    tokens: Tensor  # (K,)
    depths: Tensor  # (K,) of the first token: 0
    above: Tensor  # (K, K) bool, True where the second node is the first or one above it
    parents: Tensor  # (E,) node, sorted; -1: the prompt
    asked: Tensor  # (E,) token
    edges: Tensor  # (C, longest) the edges of each candidate; E where it has no more


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
    asked = {(nodes.get(tuple(c[:i]), -1), c[i]) for c in candidates for i in range(len(c))}
    order = {edge: number for number, edge in enumerate(sorted(asked))}
    longest = max(map(len, candidates))
    edges = [[order[nodes.get(tuple(c[:i]), -1), c[i]] for i in range(len(c))] for c in candidates]
    return Tree(
        torch.tensor([beginning[-1] for beginning in nodes], dtype=torch.long),
        torch.tensor([len(beginning) - 1 for beginning in nodes], dtype=torch.long),
        above,
        torch.tensor([parent for parent, _ in order]),
        torch.tensor([token for _, token in order]),
        torch.tensor([row + [len(order)] * (longest - len(row)) for row in edges]),
    )


def _portions(candidates: Sequence[Sequence[int]]) -> list[list[int]]:
    """Candidates by number, neighbours in the alphabet of ids together, with about NODES beginnings a portion."""
    portions, size = [[]], 0
    for number in sorted(range(len(candidates)), key=lambda i: tuple(candidates[i])):
        if size + len(candidates[number]) - 1 > NODES and portions[-1]:
            portions.append([])
            size = 0
        portions[-1].append(number)
        size += len(candidates[number]) - 1
    return portions


@torch.inference_mode()
def _rank(
    decoder: Decoder,
    prompt_ids: Tensor,
    prompt_mask: Tensor | None,
    memory: list[Memory] | None,
    candidates: Sequence[Sequence[int]],
) -> Tensor:
    longest = max(map(len, candidates))
    parts = decoder.decoding_parts()
    check_length(parts, prompt_ids.shape[1] + longest - 1)
    first, cache, mask = prefill(decoder, prompt_ids, prompt_mask, memory)
    at_prompt = first.float().log_softmax(-1)  # (B, V)
    rows, vocabulary = at_prompt.shape
    if max(max(c) for c in candidates) >= vocabulary:
        raise ValueError(f"a candidate has token {max(max(c) for c in candidates)}, the vocabulary {vocabulary}")
    result = at_prompt.new_empty(rows, len(candidates))
    for portion in _portions(candidates):
        tree = Tree(*(part.to(first.device) for part in tree_of([candidates[i] for i in portion])))
        begins = int((tree.parents < 0).sum())
        found = [at_prompt[:, tree.asked[:begins]]]
        if len(tree.tokens):
            state = StaticState(parts, cache, mask, int(tree.depths.max()) + 1, len(tree.tokens), tree=True)
            found += _after_nodes(decoder, state.tree(*tree[:3]), tree, begins)
        log_probs = torch.cat([*found, at_prompt.new_zeros(rows, 1)], 1)  # (B, E + 1)
        result[:, torch.tensor(portion, device=first.device)] = log_probs[:, tree.edges].sum(-1)
    return result


def _after_nodes(decoder: Decoder, states: Tensor, tree: Tree, begins: int) -> list[Tensor]:
    """Log-probabilities of the edges after `begins`, (B, some) a piece; never more than SCORES scores at once."""
    found, at = [], begins
    vocabulary = decoder.logits(states[:1, :1]).shape[-1]
    for nodes in torch.arange(states.shape[1], device=states.device).split(
        max(1, SCORES // (len(states) * vocabulary))
    ):
        first, last = int(nodes[0]), int(nodes[-1])
        until = int((tree.parents <= last).sum())
        log_probs = decoder.logits(states[:, first : last + 1]).float().log_softmax(-1)
        found.append(log_probs[:, tree.parents[at:until] - first, tree.asked[at:until]])
        at = until
    return found


def rank(
    decoder: Decoder,
    prompt_ids: Tensor,
    prompt_mask: Tensor | None,
    memory: list[Memory] | None,
    candidates: Sequence[Sequence[int]],
) -> Tensor:
    """Log-probability of each candidate after each prompt, (B, C) in nats: the sum over its tokens.

    prompt_ids (B, P) with prompt_mask (B, P), True = a real token, padding on the left; None means no padding.
    `candidates` are ids, with the end token where an answer has to end there. Raises ValueError on no candidates, an
    empty one or one that the vocabulary or the positions do not serve, and on a decoder in training mode.
    """
    if not candidates or not all(candidates):
        raise ValueError("rank needs candidates of one token at least")
    if decoder.training:
        raise ValueError("rank needs a decoder in eval mode")
    with masked_safely(prompt_ids.device):
        return _rank(decoder, prompt_ids, prompt_mask, memory, candidates).clone()
