"""Relative keys in self-attention (Shaw et al. 2018, arXiv 1803.02155, equation 5, without the values of equation 3).

The query also meets a learned vector of its distance to the key: score_ij = s q_i . (k_j + p[i - j]), with s the scale
of the scores and distances clipped to -most ... most - 1. One table serves all heads and layers.

Shapes: B rows, H heads, T tokens, d head size.
"""

import torch
from torch import Tensor, nn

from vqa_scratch.nn.relative_bias import ScoreBias
from vqa_scratch.nn.scores import allowed, hide


class RelativeKeys(nn.Module):
    """The vectors of the distances -most ... most - 1."""

    def __init__(self, most: int, head_dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(2 * most, head_dim)
        self.most = most


class PassKeys(ScoreBias):
    """What one forward pass over T tokens adds to the scores of every layer: relative keys and the padding mask."""

    def __init__(self, keys: RelativeKeys, tokens: int, key_mask: Tensor | None = None) -> None:
        """key_mask (B, T), True = may attend."""
        weight, before, after = keys.table.weight, min(tokens - 1, keys.most), min(tokens, keys.most)
        self.vectors = weight[keys.most - before : keys.most + after]  # the distances that occur
        place = torch.arange(tokens, device=weight.device)
        self.row = (place[:, None] - place).clamp(-before, after - 1) + before  # (T, T): the row of i - j
        self.key_mask = key_mask

    def written_out(self, q: Tensor, scale: float) -> tuple[Tensor, None]:
        apart = (q * scale) @ self.vectors.to(q.dtype).T  # (B, H, T, distances)
        bias = apart.gather(-1, self.row.expand(*q.shape[:2], -1, -1))
        return hide(bias, allowed(self.key_mask, False, len(self.row), len(self.row), q.device)), None
