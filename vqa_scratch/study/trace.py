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
from contextlib import AbstractContextManager
from typing import Self

import torch
from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.nn import taps
from vqa_scratch.nn.attention import MultiHeadAttention, attention_scores
from vqa_scratch.study import names
from vqa_scratch.study.certificate import Certificate, certify, combine, rebuilt_pattern, row_lse
from vqa_scratch.study.changes import Changes

_FROM = {"scores": ("q", "k", "mask"), "pattern": ("q", "k", "mask"), "head_out": ("z",)}
_OF_KEYS = ("k", "v", "mask")  # the same from step to step, or grown by it; not one row for each query
_QUERY_AXIS = {"q": 2, "z": 2, "head_out": 2}


class Trace(Changes):
    """What ran inside a `with` block, by tap name; made by `trace`. Entering again clears it, but edits stay."""

    def __init__(self, model: nn.Module, patterns: tuple[str, ...], grad: bool) -> None:
        super().__init__(names.tapped_modules(model))
        self.model, self.grad = model, grad
        chosen = {name for pattern in patterns for name in names.select(self.modules, pattern)}
        self._live = {live for name in chosen for live in self._needs(name)}
        self._scope: AbstractContextManager[None] | None = None
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
        scope = taps.activate(self)
        scope.__enter__()
        self._scope = scope
        return self

    def __exit__(self, *error: object) -> None:
        self._scope.__exit__(*error)
        self._scope = None

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
        return tensor

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
        names.select(self.modules, name)
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

    def _qkm(self, prefix: str) -> list[tuple[Tensor, Tensor, Tensor]]:
        return list(zip(*(self._calls[f"{prefix}.{label}"] for label in "q k mask".split()), strict=True))

    def _scale(self, prefix: str) -> float:
        return names.attention_at(self.modules, prefix).scale

    def _head_out(self, prefix: str, z: Tensor) -> Tensor:
        module = self.modules[prefix]
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
            width = max(call.shape[-1] for call in calls)
            fill = 0.0 if label == "pattern" else -math.inf
            padded = [nn.functional.pad(call, (0, width - call.shape[-1]), value=fill) for call in calls]
            return torch.cat(padded, 2)  # (B, H, T, K)
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
            ran = self._before.get(f"{name}.z") or self._calls[f"{name}.z"]
            for (q, k, mask), v, z in zip(self._qkm(name), self._calls[f"{name}.v"], ran, strict=True):
                parts.append(certify(q, k, v, mask, self._scale(name), z))
        return combine(parts, len(chosen))


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
