"""The parts around attention: activations, the two-layer MLP, initial weights, position ids. LayerNorm is torch's.

Shapes: B rows, T tokens, D width, hidden the inner width of the MLP.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.nn import taps
from vqa_scratch.nn.cache import DecoderCache

Activation = Callable[[Tensor], Tensor]


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the approximation CLIP was trained with (Hendrycks and Gimpel 2016, section 2)."""
    return x * torch.sigmoid(1.702 * x)


gelu_tanh = partial(F.gelu, approximate="tanh")

# Keyed by the names that checkpoint configs use; "gelu" is the exact one, through erf.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
    "silu": F.silu,
    "tanh": torch.tanh,
}


def activation(name: str) -> Activation:
    """The activation a config calls `name`. Raises UserError naming the known ones."""
    if name not in ACTIVATIONS:
        raise UserError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class MLP(taps.Tapped):
    """Linear, activation, linear, dropout (Vaswani et al. 2017, section 3.3). (..., D) -> (..., D)."""

    def __init__(self, dim: int, hidden: int, activation: Activation, *, bias: bool = True, dropout: float = 0.0):
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)
        self.activation, self.dropout = activation, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = taps.tap(self.tap_prefix, "pre", self.up(x))
        hidden = taps.tap(self.tap_prefix, "post", self.activation(hidden))
        return taps.tap(self.tap_prefix, "out", self.dropout(self.down(hidden)))


def init_weights(module: nn.Module, std: float = 0.02) -> None:
    """For `Module.apply`: normal(0, std) linear and embedding weights, zero biases, unit LayerNorms, as in BERT."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.LayerNorm):
        module.reset_parameters()


def sinusoid_rates(dim: int) -> Tensor:
    """(dim / 2,) radians a place: 10000^(-i / (dim/2 - 1))."""
    return torch.exp(torch.arange(dim // 2) * (-math.log(10_000) / (dim // 2 - 1)))


def sinusoids(length: int, dim: int) -> Tensor:
    """(length, dim): the sines of the places times `sinusoid_rates`, then their cosines, not in turn as in Vaswani et
    al."""
    angles = torch.arange(length)[:, None] * sinusoid_rates(dim)
    return torch.cat([angles.sin(), angles.cos()], 1)


def decoder_positions(
    embeddings: Tensor, attention_mask: Tensor | None, cache: DecoderCache | None, limit: int | None
) -> Tensor:
    """(B or 1, T) position ids of new tokens (B, T, D) after the cached ones, for a table of `limit` positions.

    Only tokens that attention_mask (B, cached + T) keeps are counted, so left padding does not move a prompt; padding
    in front gets 0. Raises ValueError on more tokens than positions, or a mask of another shape.
    """
    past, rows = 0 if cache is None else cache.length, len(embeddings)
    total = past + embeddings.shape[1]
    if limit is not None and total > limit:
        raise ValueError(f"{total} tokens, but the position table serves {limit}")
    if attention_mask is None:
        return torch.arange(past, total, device=embeddings.device)[None]
    if attention_mask.shape != (rows, total):
        raise ValueError(f"attention_mask must be {(rows, total)}, got {tuple(attention_mask.shape)}")
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
