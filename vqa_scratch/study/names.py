"""The names of taps: which ones a model has, which ones a pattern matches, and near misses for errors.

A pattern is a dotted name whose segments may hold shell wildcards: "decoder.*.cross" matches everything inside those
attentions, "image.[0-3].resid_post" one tap in four layers, "*" everything.
"""

import difflib
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

from vqa_scratch.errors import UserError
from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.nn.experts import MixtureOfExperts, Router

ATTENTION_LABELS = ("q", "k", "v", "mask", "scores", "pattern", "z", "head_out", "out")
MLP_LABELS = ("pre", "post", "out")
ROUTER_LABELS = ("probabilities", "weights")
BLOCK_LABELS = ("resid_pre", "resid_mid", "resid_post")


def tapped_modules(model: nn.Module) -> dict[str, nn.Module]:
    """{tap prefix: module} of every module with taps, in the order of `model.modules()`.

    Raises UserError for a model without taps, or if two parts of it have the same name.
    """
    found: dict[str, nn.Module] = {}
    for module in model.modules():
        prefix = getattr(module, "tap_prefix", None)
        if prefix is None:
            continue
        if prefix in found:
            raise UserError(f"two modules of this model are both named {prefix!r}; trace only one of them")
        found[prefix] = module
    if not found:
        raise UserError(f"{type(model).__name__} has no taps: nothing in it is built from vqa_scratch.nn")
    return found


def labels_of(module: nn.Module) -> tuple[str, ...]:
    """The taps below one module's prefix."""
    if isinstance(module, MultiHeadAttention):
        return ATTENTION_LABELS
    if isinstance(module, Router):
        return ROUTER_LABELS
    if isinstance(module, MixtureOfExperts):
        return ("out",)
    return BLOCK_LABELS if hasattr(module, "attn") else MLP_LABELS


def tap_names(modules: Mapping[str, nn.Module]) -> list[str]:
    """Every tap of a model by its full name."""
    return [f"{prefix}.{label}" for prefix, module in modules.items() for label in labels_of(module)]


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` matches `name` or something that contains it."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(wanted) <= len(parts) and all(map(fnmatchcase, parts, wanted))


def select(modules: Mapping[str, nn.Module], pattern: str) -> list[str]:
    """The taps that a pattern matches. Raises UserError, naming near misses, if there are none."""
    chosen = [name for name in tap_names(modules) if matches(name, pattern)]
    if not chosen:
        raise UserError(f"no tap matches {pattern!r}{_hint(modules, pattern)}")
    return chosen


def _hint(modules: Mapping[str, nn.Module], pattern: str) -> str:
    """What is wrong with the layer, or which names are near; starts with its own punctuation."""
    parts = pattern.split(".")
    layers = sorted({int(p.split(".")[1]) for p in modules if p.split(".")[0] == parts[0]})
    if len(parts) > 1 and layers and re.fullmatch(r"-?\d+", parts[1]) and int(parts[1]) not in layers:
        return f": {parts[0]} has layers 0 to {layers[-1]}"
    known: set[str] = set()
    for name in tap_names(modules):
        pieces = name.split(".")
        pieces[1] = parts[1] if len(parts) > 1 and not parts[1].isalpha() else "*"
        known.update(".".join(pieces[:n]) for n in range(1, len(pieces) + 1))
    near = difflib.get_close_matches(pattern, sorted(known), n=3, cutoff=0.5)
    if near:
        return "; did you mean " + " or ".join(repr(name) for name in near) + "?"
    roots = sorted({prefix.split(".")[0] for prefix in modules})
    return f"; names begin with {', '.join(roots)} (see docs/attention.md)"


def attention_at(modules: Mapping[str, nn.Module], name: str) -> MultiHeadAttention:
    """The attention called `name`, "decoder.3.cross". Raises UserError, naming near misses, for anything else."""
    module = modules.get(name)
    if isinstance(module, MultiHeadAttention):
        return module
    attentions = {prefix: m for prefix, m in modules.items() if isinstance(m, MultiHeadAttention)}
    if module is not None or name in tap_names(modules):
        raise UserError(f"{name!r} is not an attention; the attentions end in .self or .cross")
    raise UserError(f"no attention is named {name!r}{_hint(attentions, name)}")


def check_head(module: MultiHeadAttention, name: str, head: int) -> None:
    """Raises UserError unless the attention has that head."""
    if not 0 <= head < module.heads:
        raise UserError(f"{name} has heads 0 to {module.heads - 1}, not {head}")


def check_expert(module: nn.Module, name: str, expert: int) -> int:
    """The number of experts of a router. Raises UserError unless the module is one and has that expert."""
    if not isinstance(module, Router):
        raise UserError(f"{name} has no experts; a router has, such as 'decoder.0.router'")
    if not 0 <= expert < module.choice.experts:
        raise UserError(f"{name} has experts 0 to {module.choice.experts - 1}, not {expert}")
    return module.choice.experts
