"""Two parts of DINOv2's blocks: a gated MLP, and a learned scale on the output of a sublayer.

Shapes: D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.nn import taps


class SwiGLU(taps.Tapped):
    """`out(silu(gate) * up)` (Shazeer 2020, 2002.05202), gate and up from one product: DINOv2's giant.

    The inner width is two thirds of `hidden`, rounded up to a multiple of 8: the cost of a plain MLP.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        inner = -(-int(hidden * 2 / 3) // 8) * 8
        self.gate_up, self.out = nn.Linear(dim, 2 * inner), nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        hidden = F.silu(taps.tap(self.tap_prefix, "pre", gate)) * up
        return taps.tap(self.tap_prefix, "out", self.out(taps.tap(self.tap_prefix, "post", hidden)))


class LayerScale(nn.Module):
    """One learned factor for each channel (Touvron et al. 2021, "Going deeper with Image Transformers", 2103.17239)."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight
