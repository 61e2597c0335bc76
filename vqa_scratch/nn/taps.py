"""Taps: every intermediate tensor of a transformer passes through `tap`, where a trace may read or replace it.

Without a trace a tap costs one `is None` check. The idea is TransformerLens' hook points (Nanda and Bloom, 2022),
without a module for each: blocks hold the names (`tap_prefix`), one variable holds the handler. Each thread has its
own, so threads that share a model neither see nor change what runs in another.

Names: `{model}.{layer}.{self|cross|mlp}.{label}` with the labels q, k, v, mask, scores, pattern, z, head_out, out
(an MLP has pre, post, out) and `{model}.{layer}.resid_{pre,mid,post}`. A mixture of experts has `mlp.out` alone, and
`{model}.{layer}.router.{probabilities,weights}`.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn


class Handler(Protocol):
    """The interface of a trace."""

    def wants(self, name: str) -> bool: ...

    def __call__(self, name: str, tensor: Tensor) -> Tensor: ...


class Tapped(nn.Module):
    """A module with taps."""

    tap_prefix: str | None = None  # how their names begin


class _Here(threading.local):
    """What is of one thread alone. (`torch.compile` knows how to guard this, and no context variable.)"""

    def __init__(self) -> None:  # in each thread
        self.handler: Handler | None = None


_here = _Here()
_TAPPED = {"": "", "attn": ".self", "cross": ".cross", "mlp": ".mlp", "mlp.router": ".router"}


def tap(prefix: str | None, label: str, tensor: Tensor) -> Tensor:
    """Pass `tensor` to the active trace as `prefix.label` and return its result; without a trace, `tensor` itself."""
    handler = _here.handler
    if handler is None:
        return tensor
    name = f"{prefix}.{label}"
    return handler(name, tensor) if handler.wants(name) else tensor


def wanted(prefix: str | None, *labels: str) -> bool:
    """Whether a trace wants any of `prefix.label`; for work that only a trace needs."""
    handler = _here.handler
    return handler is not None and any(handler.wants(f"{prefix}.{label}") for label in labels)


def active() -> bool:
    """Whether a trace is active in this thread; for a faster path without taps."""
    return _here.handler is not None


@contextmanager
def activate(handler: Handler) -> Iterator[None]:
    """Send every tap of this thread to `handler` in this context. Raises RuntimeError inside another trace."""
    if _here.handler is not None:
        raise RuntimeError("a trace is already active; leave it before starting another")
    _here.handler = handler
    try:
        yield
    finally:
        _here.handler = None


def name_modules(blocks: nn.ModuleList, name: str) -> None:
    """Name the taps of an encoder or decoder by its blocks, which hold `attn`, and maybe `cross` and `mlp`.

    A model names itself when built; one that joins several renames them ("image", "text", "decoder", ...).
    """
    for layer, block in enumerate(blocks):
        modules = dict(block.named_modules())
        for child, label in _TAPPED.items():
            module = modules.get(child)
            if isinstance(module, Tapped):
                module.tap_prefix = f"{name}.{layer}{label}"
        if (gated := getattr(block, "gated", None)) is not None:
            gated.cross.tap_prefix, gated.mlp.tap_prefix = f"{name}.{layer}.cross", f"{name}.{layer}.gated"
