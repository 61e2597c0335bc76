"""The device and the number formats of a run, with the autocast and loss scaling they need."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from vqa_scratch.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU. Raises UserError for a device that is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        there = ", ".join(kind for kind, yes in available.items() if yes)
        raise UserError(f"--device {name} is not available here; this machine has {there}")
    return torch.device(name)


def formats(name: str, device: torch.device) -> tuple[str, ...]:
    """The formats that `--precision` leaves: one, or with `auto` on a CPU that has products in bf16, fp32 and bf16.

    Which of two is faster depends on the model, and on what else the machine does (`training/threads.py` times them);
    where nothing is timed, the last one is taken. Raises UserError for fp16 elsewhere than on CUDA.
    """
    if name == "fp16" and device.type != "cuda":
        raise UserError(f"--precision fp16 needs a CUDA device, not {device.type}; use bf16 or fp32")
    if name != "auto":
        if name not in DTYPES:
            raise UserError(f"there is no precision {name!r}; there are {', '.join(DTYPES)}")
        return (name,)
    if device.type == "cuda":
        return ("bf16",) if torch.cuda.is_bf16_supported(including_emulation=False) else ("fp32",)
    native = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return ("fp32", "bf16") if native else ("fp32",)


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
