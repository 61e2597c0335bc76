"""A learned bias on the scores by relative distance, one table for all layers of a tower (Raffel et al. 2020, T5).

Where our Triton kernel runs it looks the bias up in the table by distance; elsewhere it is written out, once a pass.

Shapes: B rows, H heads, Tq queries, Tk keys, d head size. The queries are the last of the keys.
"""

import math

from torch import Tensor, nn

from vqa_scratch import kernels
from vqa_scratch.nn.scores import allowed


class RelativeBias(nn.Module):
    """The bias of each head on the scores of all self-attentions of one tower."""

    def __init__(self, buckets: int, heads: int, max_distance: int, bidirectional: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(buckets, heads)
        self.max_distance, self.bidirectional = max_distance, bidirectional

    def lookup(self) -> kernels.DistanceBias:
        """What the kernel takes; its gradient is that of the table."""
        return kernels.DistanceBias(self.table.weight, self.max_distance, self.bidirectional)

    def forward(self, queries: int, keys: int) -> Tensor:
        """(1, H, Tq, Tk): the bias written out."""
        return self.table(self.lookup().pairs(queries, keys)).permute(2, 0, 1).unsqueeze(0)


class PassBias:
    """What one pass adds to the scores of every layer: a relative bias, the order of the tokens, the padding.

    The kernel takes the three as they are; elsewhere they are written into one tensor that all layers share.
    """

    def __init__(
        self, bias: RelativeBias, queries: int, keys: int, *, causal: bool, key_mask: Tensor | None = None
    ) -> None:
        """key_mask (B or 1, Tk), True = may look."""
        self.bias, self.queries, self.keys, self.causal, self.key_mask = bias, queries, keys, causal, key_mask
        self._written: tuple[Tensor, Tensor | None] | None = None

    def look_up(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """What each query reads, (B, H, Tq, d), through `kernels.flash_attention`."""
        mask = None if self.key_mask is None else self.key_mask.expand(len(q), -1)
        options = {"key_mask": mask, "causal": self.causal, "scale": scale}
        return kernels.flash_attention(q, k, v, **options, bias=self.bias.lookup())[0]

    def written_out(self) -> tuple[Tensor, Tensor | None]:
        """(bias, key_mask): (1 or B, H, Tq, Tk), -inf where a query may not look, and the mask that is not in the bias.

        The padding stays a mask while the bias is learned: written into it, each row would need a bias of its own.
        """
        if self._written is None:
            bias, rest, sizes = self.bias(self.queries, self.keys), self.key_mask, (self.queries, self.keys)
            order = allowed(None, self.causal, *sizes, bias.device)
            if order is not None:
                bias = bias.masked_fill(~order, -math.inf)
            if rest is not None and not bias.requires_grad:
                bias, rest = bias.masked_fill(~allowed(rest, False, *sizes, bias.device), -math.inf), None
            self._written = bias, rest
        return self._written
