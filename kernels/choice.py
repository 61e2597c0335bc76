"""Chooses the implementation: Triton on a GPU that is new enough, otherwise torch, with a warning on a GPU."""

import functools
import importlib.util
import warnings

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

OLDEST = (8, 0)  # older ones have neither bf16 products nor asynchronous copies
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DEVICES = {"cuda"}  # where Triton is tried at all; tests add the CPU, for its interpreter
last = "none"  # what ran last, "triton" or "torch"


def _try_out(device: torch.device) -> str | None:
    """The problem, in words, when the smallest kernel is compiled and run; None if there is none.

    Triton brings its compiler for the device, but needs a C compiler and Python's headers on the machine.
    """
    try:
        from vqa_scratch.kernels import rows

        rows.logprobs(torch.zeros(1, 16, device=device), torch.zeros(1, dtype=torch.long, device=device))
    except Exception as error:  # Triton, the compilers and the driver raise many kinds
        said = str(error).strip().splitlines() or [type(error).__name__]
        return f"Triton does not work here ({said[0][:120]})"
    return None


@functools.cache
@_disable_dynamo  # torch.compile would put the trial into its graph
def missing(device: torch.device) -> str | None:
    """Why Triton does not run on this CUDA device, in words; None if it does. The first call runs a kernel."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"{torch.cuda.get_device_name(device)} has capability {capability[0]}.{capability[1]}, below 8.0"
    return _try_out(device)


@functools.cache
def say_once(line: str) -> None:
    """Warn with this line, the first time only."""
    warnings.warn(line, stacklevel=4)


def takes(name: str, tensor: Tensor, problem: str | None = None) -> bool:
    """Whether the Triton kernel `name` supports `tensor` and the other inputs.

    `problem` is what the kernel does not support, in words. Each reason is warned about once for CUDA tensors.
    """
    if tensor.device.type not in DEVICES:
        return False
    reason = missing(tensor.device) or problem
    if reason is None and tensor.dtype not in DTYPES:
        reason = f"{str(tensor.dtype).removeprefix('torch.')} is none of float16, bfloat16 and float32"
    if reason is not None:
        say_once(f"kernels: {name} runs in torch, not Triton: {reason}")
    return reason is None


def triton_runs(name: str, tensor: Tensor, problem: str | None = None) -> bool:
    """`takes`, for the call that is about to run; keeps the result for `backend()`."""
    global last
    runs = takes(name, tensor, problem)
    last = "triton" if runs else "torch"
    return runs


def backend(device: torch.device | str | None = None) -> str:
    """ "triton" or "torch": what would run for supported tensors on `device`; without it what ran last, or "none"."""
    if device is None:
        return last
    device = torch.device(device)
    return "triton" if device.type == "cuda" and missing(device) is None else "torch"
