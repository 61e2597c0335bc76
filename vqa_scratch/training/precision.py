"""Chooses the device and the number format of a run, with the autocast and loss scaling they need."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F

from vqa_scratch.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORTHWHILE = 1.5  # bf16 must be this many times as fast as fp32 in one product, to make up for the casts


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU. Raises UserError for a device that is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        there = ", ".join(kind for kind, yes in available.items() if yes)
        raise UserError(f"--device {name} is not available here; this machine has {there}")
    return torch.device(name)


def _seconds_of_product(dtype: torch.dtype) -> float:
    x, w = torch.randn(2048, 256, dtype=dtype), torch.randn(1024, 256, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        F.linear(x, w)
        best = min(best, time.perf_counter() - start)
    return best


def pick_precision(name: str, device: torch.device) -> tuple[str, str]:
    """(the format, one line that says why). `auto` measures on a CPU; fp16 needs CUDA (UserError elsewhere)."""
    if name == "fp16" and device.type != "cuda":
        raise UserError(f"--precision fp16 needs a CUDA device, not {device.type}; use bf16 or fp32")
    if name != "auto":
        if name not in DTYPES:
            raise UserError(f"there is no precision {name!r}; there are {', '.join(DTYPES)}")
        return name, f"precision {name}, as asked"
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "precision bf16: the GPU supports it") if fast else ("fp32", "precision fp32: no bf16 here")
    if device.type == "cpu":
        factor = _seconds_of_product(torch.float32) / _seconds_of_product(torch.bfloat16)
        kind = "bf16" if factor >= WORTHWHILE else "fp32"
        return kind, f"precision {kind}: a bf16 product takes 1/{factor:.1f} of an fp32 one on this CPU"
    return "fp32", f"precision fp32: the default on {device.type}"


class Precision:
    """The number format of a run: autocast to `kind` for the forward pass, and loss scaling for fp16.

    Trained weights stay fp32. Frozen weights and features are stored in `dtype`, the same format.
    """

    def __init__(self, kind: str, device: torch.device) -> None:
        self.kind, self.device, self.dtype = kind, device, DTYPES[kind]
        self.autocast: Callable[[], AbstractContextManager] = nullcontext
        if kind != "fp32":
            self.autocast = partial(torch.autocast, device.type, dtype=self.dtype)
        self.scaler = torch.amp.GradScaler(device.type, enabled=kind == "fp16")
