"""T5's learned bias on attention scores by relative distance (Raffel et al. 2020), one table for all layers.

Our Triton kernel looks the bias up in the table by distance; otherwise it becomes one tensor, once a forward pass.

Shapes: B rows, H heads, Tq queries, Tk keys, d head size. The queries are the last of the keys.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from vqa_scratch import kernels
from vqa_scratch.nn.scores import allowed, hide


class RelativeBias(nn.Module):
    """The bias of each head on the scores of all self-attentions of one encoder or decoder."""

    def __init__(self, buckets: int, heads: int, max_distance: int, bidirectional: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(buckets, heads)
        self.max_distance, self.bidirectional = max_distance, bidirectional

    def lookup(self) -> kernels.DistanceBias:
        """The argument of the kernel; its gradient goes to the table."""
        return kernels.DistanceBias(self.table.weight, self.max_distance, self.bidirectional)

    def forward(self, queries: int, keys: int) -> Tensor:
        """(1, H, Tq, Tk): the bias as one tensor."""
        return self.table(self.lookup().pairs(queries, keys)).permute(2, 0, 1).unsqueeze(0)


class ScoreBias(ABC):
    """What one forward pass adds to the scores of self-attention, masks included. It may depend on the queries."""

    by_distance = False  # whether our kernel can take it, through `look_up`

    def look_up(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention with this bias, (B, H, Tq, d), by `kernels.flash_attention`."""
        raise NotImplementedError

    @abstractmethod
    def written_out(self, q: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        """(bias, key_mask): bias (1 or B, H, Tq, Tk), -inf where a query may not look, and a mask that is not in it."""


class PassBias(ScoreBias):
    """What one forward pass adds to the scores of every layer: relative bias, causal order and padding mask.

    The kernel takes the three separately; otherwise they become one tensor that all layers share.
    """

    by_distance = True

    def __init__(
        self, bias: RelativeBias, queries: int, keys: int, *, causal: bool, key_mask: Tensor | None = None
    ) -> None:
        """key_mask (B or 1, Tk), True = may attend."""
        self.bias, self.queries, self.keys, self.causal, self.key_mask = bias, queries, keys, causal, key_mask
        self._written: tuple[Tensor, Tensor | None] | None = None

    def look_up(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        mask = None if self.key_mask is None else self.key_mask.expand(len(q), -1)
        bias = self.bias.lookup()
        return kernels.flash_attention(q, k, v, key_mask=mask, causal=self.causal, scale=scale, bias=bias)[0]

    def written_out(self, q: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        """A bias that is being learned does not include the padding: each row would have its own bias and gradient."""
        if self._written is None:
            bias, rest, sizes = self.bias(self.queries, self.keys), self.key_mask, (self.queries, self.keys)
            bias = hide(bias, allowed(None, self.causal, *sizes, bias.device))
            if rest is not None and not bias.requires_grad:
                bias, rest = hide(bias, allowed(rest, False, *sizes, bias.device)), None
            self._written = bias, rest
        return self._written
