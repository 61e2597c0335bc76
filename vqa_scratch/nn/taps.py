"""Named identities: every intermediate of a transformer flows through `tap`, where a trace may read or replace it.

With no trace active a tap costs one `is None` check. The idea is TransformerLens' hook points (Nanda and Bloom, 2022),
without a module per point: the names live in the blocks (`tap_prefix`), the handler in one global.

Names: `{tower}.{layer}.{self|cross|mlp}.{label}` with the labels q, k, v, mask, scores, pattern, z, head_out, out
(an MLP has pre, post, out) and `{tower}.{layer}.resid_{pre,mid,post}`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn


class Handler(Protocol):
    """What a trace must implement."""

    def wants(self, name: str) -> bool: ...

    def __call__(self, name: str, tensor: Tensor) -> Tensor: ...


_handler: Handler | None = None


def tap(prefix: str | None, label: str, tensor: Tensor) -> Tensor:
    """Pass `tensor` to the active trace as `prefix.label` and return the trace's answer; with no trace, `tensor`."""
    if _handler is None:
        return tensor
    name = f"{prefix}.{label}"
    return _handler(name, tensor) if _handler.wants(name) else tensor


def wanted(prefix: str | None, *labels: str) -> bool:
    """Whether the active trace wants any of `prefix.label`; asked before work that only a trace needs."""
    handler = _handler
    return handler is not None and any(handler.wants(f"{prefix}.{label}") for label in labels)


def active() -> bool:
    """Whether a trace is active; asked where a faster way has no taps."""
    return _handler is not None


@contextmanager
def activate(handler: Handler) -> Iterator[None]:
    """Send every tap to `handler` inside the block. One at a time: a second raises RuntimeError."""
    global _handler
    if _handler is not None:
        raise RuntimeError("a trace is already active; leave it before starting another")
    _handler = handler
    try:
        yield
    finally:
        _handler = None


def name_modules(tower: nn.Module, name: str) -> None:
    """Name the taps of `tower`, whose `blocks` hold `attn`, and where they have them `cross` and `mlp`.

    A tower names itself when built; a model that joins several renames them ("image", "text", "decoder", ...).
    """
    for layer, block in enumerate(tower.blocks):
        block.tap_prefix = f"{name}.{layer}"
        for child, label in (("attn", "self"), ("cross", "cross"), ("mlp", "mlp")):
            module = getattr(block, child, None)
            if module is not None:
                module.tap_prefix = f"{name}.{layer}.{label}"
