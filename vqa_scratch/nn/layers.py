"""The parts around attention: activations, the two-layer perceptron, weight initialisation. LayerNorm is torch's.

Shapes: D width, hidden the inner width of the perceptron.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.nn import taps

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
    "silu": F.silu,
    "tanh": torch.tanh,
}


def activation(name: str) -> Activation:
    """The activation a config calls `name`. Raises ValueError naming the known ones."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


# Up to 3 rows MKL reads a large weight as fast as the memory gives it; with some more at half of that, and oneDNN's
# product is faster: 50,257 x 768 with 4, 8, 12, 16, 32, 64 rows takes 0.83, 0.61, 0.46, 0.88, 0.83, 0.86 of the time
# (torch 2.13 on two cores with AVX-512).
FEW_ROWS = range(4, 65)
LARGE_WEIGHT = 1 << 20  # bytes


def suits_one_dnn(weight: Tensor) -> bool:
    """Whether `FEW_ROWS` meet this weight faster through oneDNN, and this torch offers that."""
    large = weight.dtype == torch.float32 and weight.nbytes >= LARGE_WEIGHT and weight.device.type == "cpu"
    return large and torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def one_dnn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear without gradients, by the operator that torch.compile emits for linear layers on a CPU."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, as F.linear. On a CPU faster for one row in bf16, and without gradients for a few in fp32.

    With one row torch's product of matrices gains nothing over fp32, its product with a vector reads half the bytes
    in 0.4 of the time (torch 2.13, 50,257 x 768: 5.4 ms and 2.1 ms; fp32 5.8 ms).
    """
    rows = x.numel() // x.shape[-1]
    if rows == 1 and x.dtype == weight.dtype == torch.bfloat16 and x.device.type == "cpu":
        row = torch.mv(weight, x.flatten()) if bias is None else torch.addmv(bias, weight, x.flatten())
        return row.unflatten(0, (*x.shape[:-1], -1)) if x.ndim > 1 else row
    few = rows in FEW_ROWS and x.dtype == weight.dtype and suits_one_dnn(weight)
    if few and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
        return one_dnn(x, weight, bias)
    return F.linear(x, weight, bias)


class MLP(nn.Module):
    """Linear, activation, linear, dropout (Vaswani et al. 2017, section 3.3). (..., D) -> (..., D)."""

    tap_prefix: str | None = None

    def __init__(self, dim: int, hidden: int, activation: Activation, *, bias: bool = True, dropout: float = 0.0):
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = taps.tap(self.tap_prefix, "pre", self.up(x))
        hidden = taps.tap(self.tap_prefix, "post", self.activation(hidden))
        return taps.tap(self.tap_prefix, "out", self.dropout(self.down(hidden)))


def init_weights(module: nn.Module, std: float = 0.02) -> None:
    """Normal(0, std) linear and embedding weights, zero biases, unit LayerNorms: BERT's and GPT-2's start.

    For `Module.apply`.
    """
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.LayerNorm):
        module.reset_parameters()


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """(B, T) position ids that count attended tokens only, so that left padding does not move a prompt.

    Padding in front gets 0, as does the first token.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def decoder_positions(
    rows: int, past: int, new: int, attention_mask: Tensor | None, limit: int, device: torch.device
) -> Tensor:
    """(B or 1, T) position ids of `new` tokens behind `past` cached ones, for a table of `limit` positions.

    attention_mask (B, past + T): positions count attended tokens; None: all are. Raises ValueError on more tokens than
    positions, or a mask of another shape.
    """
    total = past + new
    if total > limit:
        raise ValueError(f"{total} tokens, but the position table serves {limit}")
    if attention_mask is None:
        return torch.arange(past, total, device=device)[None]
    if attention_mask.shape != (rows, total):
        raise ValueError(f"attention_mask must be {(rows, total)}, got {tuple(attention_mask.shape)}")
    return positions_from_mask(attention_mask)[:, past:]
