"""Reads checkpoints that others quantised, GPTQ's and AWQ's: each matrix becomes the plain weights that its codes mean.

`quantization_config` in config.json says how. GPTQ (Frantar et al. 2022, arXiv 2210.17323) packs neighbours along the
inputs into an int32, the first in the lowest bits; AWQ (Lin et al. 2023, arXiv 2306.00978) packs outputs, in an order
of its own. w = (code - zero) * scale in both, in the type of the scales.

Shapes: N outputs, K inputs, G groups of inputs, p codes in an int32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqa_scratch.errors import UserError, note
from vqa_scratch.storage import typed

SUPPORTED = "supported are gptq of 2, 4 or 8 bits and awq of 4 bits in its version gemm"
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in an int32 each of eight neighbours is
PARTS = ("qweight", "qzeros", "scales", "g_idx")
TRANSPOSED = ("gpt2",)  # model types whose plain files have matrices (in, out)


@dataclass(frozen=True)
class Scheme:
    """What `quantization_config` says."""

    method: str  # gptq or awq
    bits: int
    group: int  # inputs that share a scale; -1: all
    zeros_less_one: bool = False  # files of GPTQ's first version hold zero - 1
    symmetric: bool = False


def read_scheme(config: Mapping[str, Any], source: object) -> Scheme | None:
    """How the weights of a checkpoint are quantised; None if they are not. Raises UserError for what is not supported,
    naming it."""
    (given,) = typed(f"{source}: config.json", config, {"quantization_config": dict | None})
    if given is None:
        return None
    where = f"{source}: quantization_config"
    types: dict[str, Any] = {"quant_method": str, "bits": int | None}
    types |= {"version": str | None, "checkpoint_format": str | None, "sym": bool | None}
    method, bits, version, layout, symmetric = typed(where, given, types)
    found = " ".join([method, *([f"of {bits} bits"] if bits else []), version or layout or ""]).strip()
    if method == "awq":
        known = bits == 4 and (version or "gemm").lower() == "gemm"
    else:
        known = method == "gptq" and bits in (2, 4, 8) and (layout or "gptq") in ("gptq", "gptq_v2")
    if not known:
        raise UserError(f"{source} is quantised by {found}, which cannot be read; {SUPPORTED}")
    (group,) = typed(where, given, {"group_size": int})
    if group != -1 and group < 1:
        raise UserError(f"{where}: 'group_size' is {group}; it is a number of inputs, or -1 for all of them")
    return Scheme(method, bits, group, method == "gptq" and layout != "gptq_v2", bool(symmetric))


def bits_of(packed: Tensor, bits: int) -> Tensor:
    """int32 (..., W) -> the codes (..., W * p) in them, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (packed[..., None] >> shifts & (1 << bits) - 1).flatten(-2)


def dequantized(scheme: Scheme, name: str, parts: Mapping[str, Tensor], source: object) -> Tensor:
    """A matrix (K, N) from its `PARTS`. Raises UserError, naming it, for parts that do not fit each other."""
    absent = [part for part in PARTS[:3] if part not in parts]
    if absent:
        raise UserError(f"{source} has {name}.qweight, but no {' and no '.join(absent)} for it")
    qweight, qzeros, scales = (parts[part] for part in PARTS[:3])
    per_word, g_idx = 32 // scheme.bits, parts.get("g_idx")
    packed = torch.int32 == qweight.dtype == qzeros.dtype and scales.is_floating_point() and qweight.numel() > 0
    if not packed or not qweight.ndim == qzeros.ndim == scales.ndim == 2:
        raise UserError(f"{name} in {source} is no matrix of {scheme.method}, whose codes are int32 in two dimensions")
    awq = scheme.method == "awq"
    inputs, outputs = len(qweight) * (1 if awq else per_word), qweight.shape[1] * (per_word if awq else 1)
    group = inputs if scheme.group == -1 else scheme.group
    groups = -(-inputs // group)
    zeros_fit = len(qzeros) == groups and qzeros.shape[1] * per_word == outputs
    if tuple(scales.shape) != (groups, outputs) or not zeros_fit:
        raise UserError(
            f"{name} in {source} has scales {tuple(scales.shape)} and zeros {tuple(qzeros.shape)}; {inputs} inputs in "
            f"groups of {group} and {outputs} outputs have {(groups, outputs)} and {(groups, outputs // per_word)}"
        )
    zeros = bits_of(qzeros, scheme.bits)  # (G, N)
    if awq:
        codes = bits_of(qweight, scheme.bits)
        codes, zeros = (x.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1) for x in (codes, zeros))
    else:
        codes = bits_of(qweight.t(), scheme.bits).t()
    if scheme.zeros_less_one:
        middle = 1 << scheme.bits - 1
        if scheme.symmetric and bool((zeros == middle).all()):  # some tools write these under the name of the first
            note(f"{source} has zeros as in gptq_v2, though it does not say so: they are read as such")
        else:
            zeros = zeros + 1
    index = torch.arange(inputs) // group if g_idx is None else g_idx.long()
    if index.shape != (inputs,) or not 0 <= int(index.min()) <= int(index.max()) < groups:
        raise UserError(f"{name}.g_idx in {source} must give each of {inputs} inputs one of {groups} groups")
    return (codes - zeros[index]) * scales[index]


def unpacked(config: Mapping[str, Any], tensors: dict[str, Tensor], source: object) -> dict[str, Tensor]:
    """The tensors of a checkpoint with plain weights in place of packed ones. Raises UserError for a scheme that is not
    supported, and for parts that are missing or do not fit."""
    scheme = read_scheme(config, source)
    names = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    if scheme is None:
        if names:
            raise UserError(f"{source} has {names[0]}.qweight, but config.json has no quantization_config")
        return tensors
    for name in names:
        parts = {part: tensors.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in tensors}
        matrix = dequantized(scheme, name, parts, source)
        tensors[f"{name}.weight"] = matrix if config.get("model_type") in TRANSPOSED else matrix.t()
    return tensors
