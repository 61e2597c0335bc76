"""Quantised weights of a decoder: fewer bytes to read for each token it writes.

A weight becomes a code of 8 or 4 bits, and all codes of a row, or of a group of neighbours in it, share a scale. The
formats are data (`FORMATS`). `quantize` puts a `QuantizedLinear` in place of every matrix of the attentions and MLPs
of a decoder, and gives its head an int8 copy to read; the embedding stays. Norms, routers, gates, positions and
embeddings are never quantised, nor are encoders: they read all their tokens at once, so that arithmetic takes the time
and not the reading of weights. Products are those of torch, in bf16 on a CPU; there is no gradient.

Scales are rounded to bf16, in which the products take them, before the codes are chosen.

Shapes: N outputs, K inputs, g weights of a group, G = K / g groups of a row, R rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.nn.decoding import Decoder
from vqa_scratch.nn.gated import GatedMLP
from vqa_scratch.nn.layers import MLP
from vqa_scratch.weights.files import check_finite

TINY = torch.finfo(torch.float32).tiny  # the scale of weights that are all equal
WHOLE, ALIGNED = 32, 64  # must divide K, and the address of states and codes: torch's int8 product crashes on others
MANY = 16  # rows, from which arithmetic is the limit: unpacked on the way, int8 takes a third of the time with 256 rows
BF16_ONLY = "the products of quantised weights are for bf16 on a CPU (--device cpu --precision bf16)"
NO_TRAINING = "quantised weights have no gradient and cannot be trained; train the run, then quantise it"
PARTS = ("codes", "scale", "zero")  # of a matrix in a file, after its name


class Codes(NamedTuple):
    """A quantised matrix, as files hold it."""

    codes: Tensor  # (N, K) int8; or (N, K / 2) uint8, the first of two codes in the high half
    grid: tuple[Tensor, ...]  # scale, and zero if the format has one: (N, G) in bf16

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of `PARTS`."""
        return self.codes, *self.grid


def pack(codes: Tensor) -> Tensor:
    """Codes from 0 to 15 (..., K) -> bytes (..., K / 2), the first of two in the high half, as bitsandbytes does."""
    high, low = codes.to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return high << 4 | low


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return torch.stack([packed >> 4, packed & 15], -1).flatten(-2)


def _in_bf16(grid: Tensor) -> Tensor:
    return grid.bfloat16().float()


@dataclass(frozen=True)
class Format(ABC):
    """How weights become codes, and codes weights. A grid is what a group of weights shares: scale, and maybe zero."""

    name: str
    group: int | None = None  # the number of neighbours in a row that share a grid; None: all
    parts: ClassVar[int] = 2  # tensors of a matrix in a file
    code: ClassVar[torch.dtype] = torch.uint8  # two a byte
    multiplies: ClassVar[bool] = True  # whether there is a product; else it is a format of files alone
    outputs: ClassVar[int] = 1  # what must divide N for the product

    @abstractmethod
    def grid(self, weights: Tensor) -> tuple[Tensor, ...]:
        """Weights (..., g) in fp32 -> the grid of each group, (..., 1) each, in fp32, rounded to bf16."""

    @abstractmethod
    def encode(self, weights: Tensor, *grid: Tensor) -> Tensor:
        """The codes of the values nearest to the weights."""

    @abstractmethod
    def decode(self, codes: Tensor, *grid: Tensor) -> Tensor:
        """The values in fp32."""

    def ready(self, stored: Codes) -> tuple[Tensor, Tensor]:
        """Codes and grid as `multiply` takes them."""
        raise NotImplementedError

    def multiply(self, x: Tensor, codes: Tensor, grid: Tensor) -> Tensor:
        """x (R, K) in bf16 -> (R, N)."""
        raise NotImplementedError

    def check(self, name: str, weight: Tensor) -> None:
        """Raise UserError, naming it, for a matrix (N, K) that cannot be quantised so."""
        group, inputs = self.group, weight.shape[1]
        if group and inputs % group:
            raise UserError(f"{self.name} has groups of {group} weights, which do not divide the {inputs} of {name}")
        if self.multiplies and (inputs % WHOLE or len(weight) % self.outputs):
            needs = f"inputs that {WHOLE} divides" + (
                f", and outputs that {self.outputs} does" if self.outputs > 1 else ""
            )
            raise UserError(f"the product of {self.name} needs {needs}; {name} has {inputs} and {len(weight)}")
        check_finite(name, weight, "the model")

    def stored(self, codes: Tensor, grid: tuple[Tensor, ...]) -> Codes:
        """Codes (N, K) of any type and their grid (N, G) each, as files hold them."""
        codes = codes.to(torch.int8) if self.code == torch.int8 else pack(codes)
        return Codes(codes, tuple(part.bfloat16() for part in grid))

    def quantize(self, weight: Tensor) -> Codes:
        """A matrix (N, K), each weight rounded to the nearest value."""
        groups = weight.detach().float().unflatten(1, (-1, self.group or weight.shape[1]))  # (N, G, g)
        grid = self.grid(groups)
        return self.stored(self.encode(groups, *grid).flatten(1), tuple(part.squeeze(2) for part in grid))

    def dequantize(self, stored: Codes) -> Tensor:
        """The matrix (N, K) in fp32."""
        codes = stored.codes if self.code == torch.int8 else unpack(stored.codes)
        groups = codes.unflatten(1, (stored.grid[0].shape[1], -1))
        return self.decode(groups, *(part.float()[..., None] for part in stored.grid)).flatten(1)

    def fits(self, stored: Codes) -> bool:
        """Whether tensors of a file are a matrix in this format."""
        codes, scale = stored.codes, stored.grid[0]
        if codes.dtype != self.code or any(part.shape != scale.shape for part in stored.grid) or codes.ndim != 2:
            return False
        inputs = codes.shape[1] * (1 if self.code == torch.int8 else 2)
        return scale.shape == (len(codes), inputs // (self.group or inputs)) and inputs % (self.group or inputs) == 0


class Int8(Format):
    """w = code * scale, with codes from -127 to 127: the largest weight of a row is 127 scales."""

    code = torch.int8

    def grid(self, weights: Tensor) -> tuple[Tensor, ...]:
        return (_in_bf16(weights.abs().amax(-1, True) / 127).clamp(min=TINY),)

    def encode(self, weights: Tensor, *grid: Tensor) -> Tensor:
        return (weights / grid[0]).round().clamp(-127, 127)

    def decode(self, codes: Tensor, *grid: Tensor) -> Tensor:
        return codes * grid[0]

    def ready(self, stored: Codes) -> tuple[Tensor, Tensor]:
        return stored.codes.clone(), stored.grid[0][:, 0].clone()  # a file may be mapped to any address

    def multiply(self, x: Tensor, codes: Tensor, grid: Tensor) -> Tensor:
        if len(x) >= MANY:
            return F.linear(x, codes.to(torch.bfloat16)) * grid
        return torch._weight_int8pack_mm(x, codes, grid)


class Int4(Format):
    """w = (code - 8) * scale + zero, with codes from 0 to 15 that span a group from its least to its largest weight."""

    parts = 3
    outputs = 16

    def grid(self, weights: Tensor) -> tuple[Tensor, ...]:
        least, most = weights.aminmax(dim=-1, keepdim=True)
        scale = _in_bf16((most - least) / 15).clamp(min=TINY)
        return scale, _in_bf16(least + 8 * scale)

    def encode(self, weights: Tensor, *grid: Tensor) -> Tensor:
        scale, zero = grid
        return ((weights - zero) / scale + 8).round().clamp(0, 15)

    def decode(self, codes: Tensor, *grid: Tensor) -> Tensor:
        scale, zero = grid
        return (codes.float() - 8) * scale + zero

    def ready(self, stored: Codes) -> tuple[Tensor, Tensor]:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack(stored.codes).int(), 1)
        return packed, torch.stack(stored.grid, -1).transpose(0, 1).contiguous()  # (G, N, 2)

    def multiply(self, x: Tensor, codes: Tensor, grid: Tensor) -> Tensor:
        if len(x) > 2 * x.shape[1]:  # a plain product takes 0.4 of the time, and that of the identity is the matrix
            return x @ self.multiply(torch.eye(x.shape[1], dtype=x.dtype), codes, grid)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, self.group, grid)


NORMAL_FLOATS = (  # quantiles of a normal distribution, -1 and 1 its ends, and an exact 0
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class NormalFloat(Format):
    """w = table[code] * scale: NF4 of QLoRA (Dettmers et al. 2023, arXiv 2305.14314), for files alone."""

    multiplies = False

    def grid(self, weights: Tensor) -> tuple[Tensor, ...]:
        return (_in_bf16(weights.abs().amax(-1, True)).clamp(min=TINY),)

    def encode(self, weights: Tensor, *grid: Tensor) -> Tensor:
        table = weights.new_tensor(NORMAL_FLOATS)
        return torch.bucketize(weights / grid[0], (table[1:] + table[:-1]) / 2)

    def decode(self, codes: Tensor, *grid: Tensor) -> Tensor:
        return grid[0].new_tensor(NORMAL_FLOATS)[codes.long()] * grid[0]


HEAD = Int8("int8")
FORMATS: dict[str, Format] = {
    one.name: one
    for one in (HEAD, Int4("int4", 32), *(Int4(f"int4-g{g}", g) for g in (64, 128, 256)), NormalFloat("nf4", 64))
}


class QuantizedLinear(nn.Module):
    """In place of an `nn.Linear`: (..., K) -> (..., N) in bf16, whose bias is no parameter either."""

    codes: Tensor
    grid: Tensor
    bias: Tensor | None

    def __init__(self, kind: Format, stored: Codes, bias: Tensor | None) -> None:
        super().__init__()
        self.kind, self.training = kind, False
        self.out_features = len(stored.codes)
        codes, grid = kind.ready(stored)
        self.register_buffer("codes", codes, persistent=False)  # in the layout of the product
        self.register_buffer("grid", grid, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().bfloat16(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Raises UserError where gradients are wanted, and for another device or type, unless autocast sets it."""
        place, autocast = x.device.type, False
        if place == "cpu" and torch.is_autocast_enabled("cpu"):
            autocast = torch.get_autocast_dtype("cpu") == torch.bfloat16
        if place != "cpu" or not (autocast or x.dtype == torch.bfloat16):
            raise UserError(f"{BF16_ONLY}, not {str(x.dtype).removeprefix('torch.')} on {place}")
        if x.requires_grad and torch.is_grad_enabled():
            raise UserError(NO_TRAINING)
        rows = x.to(torch.bfloat16).reshape(-1, x.shape[-1]).contiguous()
        rows = rows.clone() if rows.data_ptr() % ALIGNED else rows
        out = self.kind.multiply(rows, self.codes, self.grid)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def train(self, mode: bool = True) -> "QuantizedLinear":
        if mode:
            raise UserError(NO_TRAINING)
        return self

    @property
    def weight(self) -> Tensor:
        """Raises UserError: the layout of the codes is the product's own."""
        raise UserError("this needs the weights themselves, which are quantised here; --precision fp32 unpacks them")


def decoders(model: nn.Module) -> dict[str, Decoder]:
    """The decoders in a model, by name; "" is the model itself."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Decoder)}


def matrices(model: nn.Module) -> dict[str, nn.Linear]:
    """What is quantised, by name. Raises UserError if there is nothing."""
    layers = {
        name: layer
        for prefix, decoder in decoders(model).items()
        for name, layer in decoder.named_modules(prefix=prefix)
        if isinstance(layer, MultiHeadAttention | MLP | GatedMLP)
    }
    found = {
        f"{name}.{child}": linear
        for name, layer in layers.items()
        for child, linear in layer.named_children()
        if isinstance(linear, nn.Linear)
    }
    if not found:
        raise UserError("there is nothing to quantise: only the weights of a decoder are, and only once")
    return found


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` was."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def checked(model: nn.Module, kind: Format) -> dict[str, nn.Linear]:
    """The `matrices`. Raises UserError for one, or a head, that cannot be quantised so, before anything is."""
    found = matrices(model)
    for name, linear in found.items():
        kind.check(name, linear.weight)
    for decoder in decoders(model).values() if kind.multiplies else ():
        HEAD.check("the head", _table(decoder))
    return found


def _table(decoder: Decoder) -> Tensor:
    """(V, E), what the states of a decoder are multiplied with at the end."""
    parts = decoder.fast_state()
    return decoder.head if parts is None else parts.head.weight


def install(model: nn.Module, kind: Format, codes: Mapping[str, Codes]) -> None:
    """Put quantised weights in place of these matrices, and copies in int8 in place of the heads' products."""
    linears = checked(model, kind)
    for name, stored in codes.items():
        replace(model, name, QuantizedLinear(kind, stored, linears[name].bias))
    for decoder in decoders(model).values():
        decoder.head_copy = QuantizedLinear(HEAD, HEAD.quantize(_table(decoder)), None)
        if getattr(decoder, "lm_head", None) is not None:  # nothing else reads it, as it does an embedding
            decoder.lm_head = decoder.head_copy


def round_to_nearest(model: nn.Module, kind: Format) -> dict[str, Codes]:
    """Of all `matrices`. Raises UserError as `checked`."""
    return {name: kind.quantize(linear.weight) for name, linear in checked(model, kind).items()}


def quantize(model: nn.Module, kind: Format) -> None:
    """Round the weights of its decoder, in place. The model then runs in bf16, or inside autocast to it."""
    install(model, kind, round_to_nearest(model, kind))


def take(tensors: dict[str, Tensor], kind: Format, source: object) -> dict[str, Codes]:
    """The quantised matrices among the tensors of a file, which are taken out. Raises UserError, naming `source`."""
    found = {}
    for name in [key.removesuffix(".codes") for key in tensors if key.endswith(".codes")]:
        parts = [tensors.pop(f"{name}.{part}") for part in PARTS[: kind.parts] if f"{name}.{part}" in tensors]
        if len(parts) < kind.parts or not kind.fits(Codes(parts[0], tuple(parts[1:]))):
            raise UserError(f"{name} in {source} is no matrix in the format {kind.name}")
        for part in parts[1:]:
            check_finite(name, part, source)
        found[name] = Codes(parts[0], tuple(parts[1:]))
    return found
