"""Gated cross-attention layers, through which a decoder that was trained on text alone reads images.

Flamingo (Alayrac et al. 2022, arXiv 2204.14198, section 2.2 and figure 4): x += tanh(a) attention(norm(x), memory);
x += tanh(b) MLP(norm(x)). The gates a and b start at zero, so at first the decoder says exactly what it said before,
and in the first step only they move. A layer stands before a block; `ReleasedDecoder.add_gated` puts it there.

Shapes: B rows, T tokens, D width of the decoder.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.nn.cache import KVCache
from vqa_scratch.nn.decoding import FastGated, FastMLP, Reader
from vqa_scratch.nn.gated import GatedMLP
from vqa_scratch.nn.layers import MLP, init_weights
from vqa_scratch.nn.memory import Memory


class GatedCrossAttention(nn.Module):
    """The layer, made of its parts. `gates` is 1, or D for a gate for each number of a state.

    A token that may read nothing gets zeros from the attention; its MLP runs all the same, as in the reference.
    """

    def __init__(
        self, norm_cross: nn.Module, cross: MultiHeadAttention, norm_mlp: nn.Module, mlp: MLP | GatedMLP, gates: int = 1
    ) -> None:
        super().__init__()
        self.norm_cross, self.cross, self.norm_mlp, self.mlp = norm_cross, cross, norm_mlp, mlp
        self.cross_gate, self.mlp_gate = nn.Parameter(torch.zeros(gates)), nn.Parameter(torch.zeros(gates))

    def forward(self, x: Tensor, memory: Sequence[Memory] | None, cache: KVCache | None) -> Tensor:
        """(B, T, D) -> (B, T, D); without a memory, or its keys in the cache, the same."""
        if memory is None and (cache is None or cache.cross is None):
            return x
        x = x + self.cross_gate.tanh() * self.cross(self.norm_cross(x), memory, cache=cache)
        return x + self.mlp_gate.tanh() * self.mlp(self.norm_mlp(x))

    def fast_parts(self) -> FastGated:
        """The parts of the layer, for `generate`."""
        factors = self.cross_gate.detach().tanh(), self.mlp_gate.detach().tanh()
        reader = Reader(self.norm_cross, self.cross, factors[0])
        return FastGated(reader, FastMLP(self.norm_mlp, self.mlp, factors[1]))


def flamingo_layer(dim: int, context_dim: int, *, heads: int = 8, head_dim: int = 64) -> GatedCrossAttention:
    """The layer of OpenFlamingo (Awadalla et al. 2023, arXiv 2308.01390) with random weights, for a decoder of width
    `dim` and memories of width `context_dim`.

    It has LayerNorms, an MLP of four times the width with GELU, no other biases, and one gate for each half.
    """
    cross = MultiHeadAttention(dim, heads, head_dim=head_dim, context_dim=context_dim, bias=False, out_bias=False)
    layer = GatedCrossAttention(nn.LayerNorm(dim), cross, nn.LayerNorm(dim), MLP(dim, 4 * dim, F.gelu, bias=False))
    layer.apply(init_weights)
    return layer
