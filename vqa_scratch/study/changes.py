"""Changes what runs in a model: replace any tap, silence heads, patch in what another run recorded.

Shapes: B batch, H heads, T query tokens, d head size.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.study import names

if TYPE_CHECKING:
    from vqa_scratch.study.trace import Trace

Edit = Callable[[Tensor, int], Tensor]  # (what the tap holds, number of the call from 0) -> what it holds instead


class Changes:
    """The edits of a trace, by tap name. They stay until the trace is dropped."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self._live: set[str] = set()  # the taps to record
        self._edits: dict[str, list[Edit]] = defaultdict(list)

    def replace(self, name: str, edit: Edit) -> None:
        """From now on `edit(tensor, call)` decides what a tap holds, or each tap that a pattern matches."""
        for full in names.select(self.modules, name):
            prefix, _, label = full.rpartition(".")
            if label == "mask":
                if name == full:
                    raise UserError("a mask can be read, not replaced: replace the scores or the pattern")
                continue
            self._edits[full].append(self._same_shape(full, edit))
            if label in ("scores", "pattern"):
                self._live.add(f"{prefix}.pattern")  # q and k no longer determine what ran

    @staticmethod
    def _same_shape(name: str, edit: Edit) -> Edit:
        def checked(tensor: Tensor, call: int) -> Tensor:
            result = edit(tensor, call)
            if result.shape != tensor.shape:
                raise UserError(
                    f"{name} must keep its shape {tuple(tensor.shape)}; it was replaced by {tuple(result.shape)}"
                )
            return result

        return checked

    def ablate(self, name: str, head: int | None = None) -> None:
        """Silence one head of an attention (all of them without `head`) or an MLP: its last projection reads zeros.

        The bias stays, as if those columns of the projection were zero. `name` may be a pattern: "decoder.*.cross".
        """
        prefixes = [prefix for prefix, m in self.modules.items() if names.labels_of(m) != names.BLOCK_LABELS]
        chosen = [prefix for prefix in prefixes if prefix.count(".") == name.count(".") and names.matches(prefix, name)]
        if not chosen:
            names.select(self.modules, name)
            raise UserError(f"{name!r} has no heads and no neurons to ablate; name an attention or an MLP")
        for prefix in chosen:
            module = self.modules[prefix]
            if not isinstance(module, MultiHeadAttention):
                if head is not None:
                    raise UserError(f"{prefix} is an MLP: it has no heads")
                self.replace(f"{prefix}.post", lambda tensor, call: torch.zeros_like(tensor))
                continue
            if head is not None:
                names.check_head(module, prefix, head)
            keep = torch.ones(module.heads, 1, 1)
            keep[slice(None) if head is None else head] = 0.0
            self.replace(f"{prefix}.z", lambda tensor, call, keep=keep: tensor * keep.to(tensor))

    def patch(self, other: "Trace", name: str, *, head: int | None = None) -> None:
        """Replace what runs by what `other` recorded, call by call; only one head of it if `head` is given.

        Raises UserError at once if `other` lacks it, and during the run if shapes or the number of calls differ.
        """
        if isinstance(self.modules.get(name), MultiHeadAttention):
            name = f"{name}.z"
        for full in names.select(self.modules, name):
            prefix, _, label = full.rpartition(".")
            if head is not None:
                if label in ("out", *names.MLP_LABELS, *names.BLOCK_LABELS):
                    raise UserError(f"{full} has no heads; patch z, q, k, v, scores, pattern or head_out")
                names.check_head(names.attention_at(self.modules, prefix), prefix, head)
            self.replace(full, _patching(full, other.calls(full), head))


def _patching(name: str, calls: list[Tensor], head: int | None) -> Edit:
    def edit(tensor: Tensor, call: int) -> Tensor:
        if call >= len(calls):
            raise UserError(f"patch of {name}: the other run made {len(calls)} calls, this one makes more")
        new = calls[call].to(tensor)
        if new.shape != tensor.shape:
            raise UserError(f"patch of {name}: the other run has {tuple(new.shape)}, this one {tuple(tensor.shape)}")
        if head is None:
            return new
        tensor = tensor.clone()
        tensor[:, head] = new[:, head]
        return tensor

    return edit
