"""Beam search: follow the K best beginnings of each group and collect the K best finished ones.

The rules are those of `transformers`. Of the 2K best continuations the first K may finish; with E > 1 end tokens it
takes the best (1 + E)K, so that K always go on. The value of a finished one is its summed log-probability /
length**length_penalty. A group ends when the values of its K finished ones are all above that of its best running one
(or, with early_stopping "never", above the best value that one can still reach).

Shapes: G groups, K beams, R = G*K rows, V vocabulary.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vqa_scratch.generate.loop import COMPACT_BELOW, Generated
from vqa_scratch.generate.processors import Processed
from vqa_scratch.generate.state import State, member_rows
from vqa_scratch.generation_options import GenerationOptions, end_ids

NEVER = -1e9  # added to a score that must not win


class Node(NamedTuple):
    """One token of a beginning, linked to the token before it."""

    token: int
    log_prob: float
    before: "Node | None"

    def path(self) -> list["Node"]:
        """From the first token to this one."""
        nodes = [self]
        while (before := nodes[-1].before) is not None:
            nodes.append(before)
        return nodes[::-1]


class Group:
    """The beams of one prompt: K running (score, last node), best first, and up to K finished (value, last node)."""

    def __init__(self, options: GenerationOptions) -> None:
        self.ends = end_ids(options.eos_id)
        self.options, self.penalty = options, 1.0 if options.length_penalty is None else options.length_penalty
        self.running: list[tuple[float, Node | None]] = [(0.0, None), *[(NEVER, None)] * (options.num_beams - 1)]
        self.finished: list[tuple[float, Node]] = []
        self.done = False

    def advance(self, scores: list[float], values: list[float], places: list[tuple[int, int]], made: int) -> list[int]:
        """Take the best continuations, best first: score, value, (beam, token); each has `made` tokens.

        Returns the beam that each new running one continues.
        """
        options, going = self.options, []
        last = made == options.max_new_tokens
        for rank, (score, value, (beam, token)) in enumerate(zip(scores, values, places, strict=True)):
            before_score, before = self.running[beam]
            node = Node(token, score - before_score, before)
            ends = last or token in self.ends
            if ends and rank < options.num_beams:
                self.finished.append((value, node))
            going.append((score + NEVER if ends else score, node, beam))
        self.finished = sorted(self.finished, key=lambda one: -one[0])[: options.num_beams]
        going = sorted(going, key=lambda one: -one[0])[: options.num_beams]
        self.running = [(score, node) for score, node, _ in going]
        self.done = len(self.finished) == options.num_beams and (
            options.early_stopping is True or not self.hope(made) > self.finished[-1][0]
        )
        return [beam for _, _, beam in going]

    def hope(self, made: int) -> float:
        """The best value that a running beam can reach, in fp32 as the other values."""
        patient = self.options.early_stopping == "never" and self.penalty > 0
        length = self.options.max_new_tokens if patient else made
        return float(np.float32(self.running[0][0]) / np.float32(length**self.penalty))


def beam_search(
    scores: Tensor,
    state: State,
    options: GenerationOptions,
    prompt_ids: Tensor,
    prompt_mask: Tensor | None,
    fill: int = 0,
) -> Generated:
    """The best finished beginning of each group; `scores` (G, V) and `state` are what `begin` returns."""
    beams, device = options.num_beams, scores.device
    looked_at = max(2, 1 + len(end_ids(options.eos_id))) * beams
    groups = [Group(options) for _ in range(len(scores))]
    live = list(range(len(groups)))  # the groups that still run
    processed = Processed(options, prompt_ids, prompt_mask, torch.arange(len(groups), device=device))
    sums = torch.zeros(len(groups), 1, device=device)  # (G, beams so far) scores of the running beams
    for made in range(1, options.max_new_tokens + 1):
        log_probs = processed(scores.float().log_softmax(-1), made - 1)
        size = log_probs.shape[-1]
        totals = (log_probs.view(*sums.shape, size) + sums[..., None]).flatten(1)
        if totals.shape[1] < looked_at:  # the first step, and few tokens: pretend K equal beams
            never = torch.full((beams - 1, 1), NEVER, device=device).expand(-1, size).flatten()
            totals = torch.cat([totals, totals.repeat(1, beams - 1) + never], 1)
        best = totals.topk(min(looked_at, totals.shape[1]))
        values = (best.values / made ** groups[0].penalty).tolist()
        parents, tokens = [], []
        for place, (number, *row) in enumerate(
            zip(live, best.values.tolist(), values, best.indices.tolist(), strict=True)
        ):
            group, first = groups[number], place * beams
            if group.done:  # decoded until enough others are done too
                kept = list(range(beams))
            else:
                kept = group.advance(row[0], row[1], [divmod(i, size) for i in row[2]], made)
            parents += [first + beam for beam in kept]
            tokens += [node.token for _, node in group.running if node is not None]
        running = [place for place, number in enumerate(live) if not groups[number].done]
        if not running or made == options.max_new_tokens:
            break
        if made == 1:  # from here on one row for each beam; they are still equal
            firsts = torch.arange(len(live), device=device).repeat_interleave(beams)
            processed.keep(firsts)
        elif parents != list(range(len(parents))):
            order = torch.tensor(parents, device=device)
            state.reorder(order)
            processed.keep(order)
        token = torch.tensor(tokens, device=device)
        processed.add(token)
        if len(running) < COMPACT_BELOW * len(live):
            left = torch.tensor(running, device=device)
            rows = member_rows(left, beams)
            state.keep(left)
            processed.keep(rows)
            live, token = [live[place] for place in running], token[rows]
        sums = torch.tensor([[score for score, _ in groups[number].running] for number in live], device=device)
        scores = state.step(token)
    return _gather([group.finished[0][1].path() for group in groups], fill, device)


def _gather(paths: list[list[Node]], fill: int, device: torch.device) -> Generated:
    ids = pad_sequence([torch.tensor([node.token for node in path]) for path in paths], True, fill)
    log_probs = pad_sequence([torch.tensor([node.log_prob for node in path]) for path in paths], True)
    lengths = torch.tensor([len(path) for path in paths])
    return Generated(ids.to(device), log_probs.to(device), lengths.to(device))
