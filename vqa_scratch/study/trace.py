"""Reads and changes every intermediate of a model while it runs, with fused attention and caches too.

    with trace(model, "decoder.*.cross", "image.*.self") as t:
        answer = generate(...)
    t.pattern("decoder.3.cross")         # (B, H, T, K): one row of weights for each token the decoder read
    t.certificate()                      # how far these weights are from those that ran

A trace records q, k, v, the mask and z, all of size O(N d), and rebuilds weights from them on request (see
`study.certificate`), so the model keeps its fast path. Only an attention whose weights or scores are replaced runs the
explicit way. The names of intermediates follow the hook points of TransformerLens (Nanda and Bloom 2022).

Shapes: B batch, H heads, T query tokens, K keys, d head size, D width.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Self

import torch
from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.nn import taps
from vqa_scratch.nn.attention import MultiHeadAttention, attention_scores
from vqa_scratch.study import names
from vqa_scratch.study.certificate import Certificate, certify, combine, rebuilt_pattern, row_lse

Edit = Callable[[Tensor, int], Tensor]  # (what the tap holds, number of the call from 0) -> what it holds instead

_FROM = {"scores": ("q", "k", "mask"), "pattern": ("q", "k", "mask"), "head_out": ("z",)}
_OF_KEYS = ("k", "v", "mask")  # the same from step to step, or grown by it; not one row for each query
_QUERY_AXIS = {"q": 2, "z": 2, "head_out": 2}


def _times(factor: Tensor) -> Edit:
    return lambda tensor, call: tensor * factor.to(tensor)


class Trace:
    """What ran inside a `with` block, by tap name; made by `trace`. Entering again clears it, but edits stay."""

    def __init__(self, model: nn.Module, patterns: tuple[str, ...], grad: bool) -> None:
        self.model, self.modules, self.grad = model, names.tapped_modules(model), grad
        self._known = frozenset(names.tap_names(self.modules))
        chosen = {name for pattern in patterns for name in names.select(self.modules, pattern)}
        self._live = {live for name in chosen for live in self._needs(name)}
        self._edits: dict[str, list[Edit]] = defaultdict(list)
        self._scope = ExitStack()
        self._clear()

    def _needs(self, name: str) -> list[str]:
        prefix, _, label = name.rpartition(".")
        return [f"{prefix}.{source}" for source in _FROM.get(label, (label,))]

    def _clear(self) -> None:
        self._calls: dict[str, list[Tensor]] = defaultdict(list)
        self._before: dict[str, list[Tensor]] = defaultdict(list)  # z as the attention returned it, before an edit
        self._counts: Counter[str] = Counter()

    def __enter__(self) -> Self:
        self._clear()
        self._scope.enter_context(taps.activate(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._scope.close()

    # ------------------------------------------------------------------------------------------ the tap handler

    def wants(self, name: str) -> bool:
        """Asked by every tap."""
        return name in self._live or name in self._edits

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """Called by every tap that is wanted; returns what the model continues with."""
        call = self._counts[name]
        self._counts[name] += 1
        if self.grad and name.endswith(".z") and not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_()  # a frozen model has no graph of its own
        result = tensor
        for edit in self._edits.get(name, ()):
            result = edit(result, call)
        if name in self._live:
            if name in self._edits and name.endswith(".z"):
                self._before[name].append(self._kept(name, tensor))
            self._calls[name].append(self._kept(name, result))
        return result

    def _kept(self, name: str, tensor: Tensor) -> Tensor:
        if self.grad:
            return tensor
        tensor, calls = tensor.detach(), self._calls[name]
        # Cross-attention reads the same keys at every step: kept once.
        if name.endswith((".k", ".v", ".mask")) and calls and calls[-1].shape == tensor.shape:
            return calls[-1] if torch.equal(calls[-1], tensor) else tensor
        # Behind a cache each step reads what the one before read, and more: kept once too, as views of the last.
        if name.endswith((".k", ".v")) and calls and torch.equal(tensor[:, :, : calls[-1].shape[2]], calls[-1]):
            calls[:] = [tensor[:, :, : call.shape[2]] for call in calls]
        return tensor

    # ------------------------------------------------------------------------------------------ changing

    def replace(self, name: str, edit: Edit) -> None:
        """From now on `edit(tensor, call)` decides what a tap holds, or each tap that a pattern matches."""
        for full in names.select(self.modules, name):
            prefix, _, label = full.rpartition(".")
            if label == "mask":
                if name == full:
                    raise UserError("a mask can be read, not replaced: replace the scores or the pattern")
                continue
            self._edits[full].append(_same_shape(full, edit))
            if label in ("scores", "pattern"):
                self._live.add(f"{prefix}.pattern")  # q and k no longer determine what ran

    def ablate(self, name: str, head: int | None = None, *, expert: int | None = None) -> None:
        """Silence one head of an attention (all of them without `head`) or an MLP: its last projection reads zeros.
        Or one `expert` of "decoder.3.router": it adds nothing for the tokens that choose it, which choose no other.

        The bias stays, as if those columns of the projection were zero. `name` may be a pattern: "decoder.*.cross".
        """
        prefixes = [prefix for prefix, m in self.modules.items() if names.labels_of(m) != names.BLOCK_LABELS]
        chosen = [prefix for prefix in prefixes if prefix.count(".") == name.count(".") and names.matches(prefix, name)]
        if not chosen:
            names.select(self.modules, name)
            raise UserError(f"{name!r} has no heads and no neurons to ablate; name an attention or an MLP")
        for prefix in chosen:
            module = self.modules[prefix]
            if expert is not None:
                keep = torch.ones(names.check_expert(module, prefix, expert))
                keep[expert] = 0.0
                self.replace(f"{prefix}.weights", _times(keep))
                continue
            if not isinstance(module, MultiHeadAttention):
                if head is not None:
                    raise UserError(f"{prefix} is no attention: it has no heads")
                last = {"pre": "post", "probabilities": "weights"}.get(names.labels_of(module)[0], "out")
                self.replace(f"{prefix}.{last}", lambda tensor, call: torch.zeros_like(tensor))
                continue
            self.scale(prefix, head, 0.0)

    def scale(self, name: str, head: int | None, factor: float) -> None:
        """Multiply what one head of an attention reads by a factor, or what all of them read: 0 silences it."""
        module = names.attention_at(self.modules, name)
        if head is not None:
            names.check_head(module, name, head)
        factors = torch.ones(module.heads, 1, 1)
        factors[slice(None) if head is None else head] = factor
        self.replace(f"{name}.z", _times(factors))

    def hide(self, name: str, keys: Callable[[int], Tensor]) -> None:
        """No token may look at some keys of an attention: their scores are -inf, as those of padding.

        `keys(K)` says which of K keys, (K,) bool. The mask that is recorded holds the same, so that q, k and mask go on
        to determine the weights, and the certificate covers them.
        """
        names.attention_at(self.modules, name)

        def edit(tensor: Tensor, call: int) -> Tensor:
            return tensor.masked_fill(keys(tensor.shape[-1]).to(tensor.device), -math.inf)

        for label in ("scores", "mask"):
            self._edits[f"{name}.{label}"].append(edit)

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

    # ------------------------------------------------------------------------------------------ reading

    def names(self) -> list[str]:
        """The taps that can be read, with those rebuilt on request."""
        return [name for name in names.tap_names(self.modules) if self._recorded(name)]

    def attentions(self) -> list[str]:
        """The recorded attentions, "decoder.0.cross" and so on."""
        return [p for p, m in self.modules.items() if isinstance(m, MultiHeadAttention) and self._calls.get(f"{p}.q")]

    def _recorded(self, name: str) -> bool:
        return all(self._calls.get(live) for live in self._needs(name))

    def _check(self, name: str) -> None:
        if name not in self._known:
            names.select(self.modules, name)  # names near misses
        if not self._live.issuperset(self._needs(name)):
            raise UserError(f"{name!r} was not traced; add it, or a pattern for it, to trace(...)")
        if not self._recorded(name):
            raise UserError(f"{name!r} was traced, but nothing ran through it")

    def calls(self, name: str) -> list[Tensor]:
        """What one tap held, call by call; with a cache there is one call for each generated token."""
        self._check(name)
        prefix, _, label = name.rpartition(".")
        if label not in _FROM or self._calls.get(name):
            return list(self._calls[name])
        if label == "head_out":
            return [self._head_out(prefix, z) for z in self._calls[f"{prefix}.z"]]
        if label == "scores":
            return [attention_scores(q, k, bias=mask, scale=self._scale(prefix)) for q, k, mask in self._qkm(prefix)]
        return [rebuilt_pattern(q, k, mask, self._scale(prefix)) for q, k, mask in self._qkm(prefix)]

    def returned(self, name: str) -> list[Tensor]:
        """What an attention returned, call by call: its z before any change of it."""
        return self._before.get(f"{name}.z") or self.calls(f"{name}.z")

    def _qkm(self, prefix: str) -> list[tuple[Tensor, Tensor, Tensor]]:
        return list(zip(*(self._calls[f"{prefix}.{label}"] for label in "q k mask".split()), strict=True))

    def _scale(self, prefix: str) -> float:
        return names.attention_at(self.modules, prefix).scale

    def _head_out(self, prefix: str, z: Tensor) -> Tensor:
        module = names.attention_at(self.modules, prefix)
        weight = module.out.weight.unflatten(1, (module.heads, module.head_dim))  # (D, H, d)
        return torch.einsum("bhtd,ehd->bhte", z, weight.to(z.dtype))

    def __getitem__(self, name: str) -> Tensor:
        """One tap over all tokens: calls joined along the query axis; for k, v and mask the last call.

        Raises ValueError if the calls are not steps of one sequence; `calls` gives them one by one.
        """
        calls = self.calls(name)
        label = name.rpartition(".")[2]
        if len(calls) == 1:
            return calls[0]
        self._check_steps(name)
        if label in _OF_KEYS:
            return calls[-1]
        if label in ("scores", "pattern"):
            return joined(calls, 0.0 if label == "pattern" else -math.inf)
        return torch.cat(calls, _QUERY_AXIS.get(label, 1))

    def _check_steps(self, name: str) -> None:
        calls = self._calls[self._needs(name)[0]]
        if len({len(call) for call in calls}) > 1:
            raise ValueError(f"the rows of {name} changed from call to call; read them one by one with calls()")
        prefix = name.rpartition(".")[0]
        if not prefix.endswith(".self") or not self._recorded(f"{prefix}.pattern"):
            return
        lengths = [(q.shape[2], k.shape[2]) for q, k, _ in self._qkm(prefix)]
        for (_, before), (queries, keys) in zip(lengths, lengths[1:], strict=False):
            if keys != before + queries:
                raise ValueError(f"{name} holds several separate passes; read them one by one with calls()")

    def pattern(self, name: str) -> Tensor:
        """(B, H, T, K): the weights of one attention, "decoder.3.cross"; later keys of a cache are 0 in early rows."""
        names.attention_at(self.modules, name)
        return self[f"{name}.pattern"]

    def lse(self, name: str) -> Tensor:
        """(B, H, T): the log-sum-exp of each row of scores of one attention."""
        names.attention_at(self.modules, name)
        self._check(f"{name}.pattern")
        return torch.cat([row_lse(q, k, mask, self._scale(name)) for q, k, mask in self._qkm(name)], 2)

    @torch.no_grad()
    def certificate(self, *attentions: str) -> Certificate:
        """The proof for the given attentions, or all recorded ones, except those whose weights were replaced.

        Raises UserError if there are none.
        """
        for name in attentions:
            names.attention_at(self.modules, name)
            self._check(f"{name}.pattern")
        chosen = [
            name
            for name in attentions or self.attentions()
            if not self._calls.get(f"{name}.pattern") and self._calls.get(f"{name}.z") and self._calls.get(f"{name}.v")
        ]
        if not chosen:
            raise UserError("nothing to certify: no attention was traced whole, as 'decoder.*.cross' would")
        parts = []
        for name in chosen:
            for (q, k, mask), v, z in zip(self._qkm(name), self._calls[f"{name}.v"], self.returned(name), strict=True):
                parts.append(certify(q, k, v, mask, self._scale(name), z))
        return combine(parts, len(chosen))


def joined(calls: list[Tensor], fill: float) -> Tensor:
    """Rows of several calls as one (B, H, T, K); `fill` for the keys that a call had not reached yet."""
    width = max(call.shape[-1] for call in calls)
    return torch.cat([nn.functional.pad(call, (0, width - call.shape[-1]), value=fill) for call in calls], 2)


def _same_shape(name: str, edit: Edit) -> Edit:
    def checked(tensor: Tensor, call: int) -> Tensor:
        result = edit(tensor, call)
        if result.shape != tensor.shape:
            raise UserError(
                f"{name} must keep its shape {tuple(tensor.shape)}; it was replaced by {tuple(result.shape)}"
            )
        return result

    return checked


def _patching(name: str, calls: list[Tensor], head: int | None) -> Edit:
    def edit(tensor: Tensor, call: int) -> Tensor:
        if call >= len(calls):
            raise UserError(f"patch of {name}: the other run made {len(calls)} calls, this one makes more")
        new = calls[call].to(tensor)
        if new.shape != tensor.shape:
            raise UserError(f"patch of {name}: the other run has {tuple(new.shape)}, this one {tuple(tensor.shape)}")
        return of_head(tensor, new, head)

    return edit


def of_head(tensor: Tensor, new: Tensor, head: int | None) -> Tensor:
    """(B, H, ...): `new`, or `tensor` with only this head of `new`."""
    if head is None:
        return new
    result = tensor.clone()
    result[:, head] = new[:, head]
    return result


def trace(model: nn.Module, *patterns: str, grad: bool = False, record: bool = True) -> Trace:
    """A trace of `model`, to be entered with `with`; one at a time.

    patterns -- which taps to record, "decoder.*.cross" or "image.3.resid_post"; every attention if there are none
    grad     -- keep tensors in the autograd graph (run without a cache, which detaches)
    record   -- False: only change (`ablate`, `patch`, `replace`), keep nothing
    Raises UserError, naming near misses, for a pattern that matches nothing; ValueError for patterns with record=False.
    """
    if not record and patterns:
        raise ValueError("patterns say what to record; leave them out with record=False")
    if record and not patterns:
        modules = names.tapped_modules(model)
        patterns = tuple(prefix for prefix, module in modules.items() if isinstance(module, MultiHeadAttention))
    return Trace(model, patterns, grad)
