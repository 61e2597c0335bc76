"""Move weights between our parameters and a checkpoint's keys, by a key map, strictly in both directions.

Strict means: every parameter of ours finds its tensor, every tensor of the file is used or known to be superfluous,
every shape fits. Whatever does not is listed, all of it, in one UserError.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.weights.maps import Entry, KeyMap

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Everything a checkpoint must bring: parameters, shared ones once, and the buffers a state dict would hold."""
    saved = model.state_dict(keep_vars=True)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return dict(model.named_parameters()) | buffers


def _look_up(entries: dict[str, Entry], name: str) -> tuple[str, ...] | None:
    """The file keys of our parameter `name` with the layer filled in; None if the map does not know it."""
    if name in entries:
        return entries[name].theirs
    layer = _NUMBER.search(name)
    entry = entries.get(_NUMBER.sub("{}", name, count=1)) if layer else None
    return None if entry is None else tuple(key.replace("{}", layer.group()) for key in entry.theirs)


def _entry(entries: dict[str, Entry], name: str) -> Entry:
    return entries.get(name) or entries[_NUMBER.sub("{}", name, count=1)]


def _matcher(templates: Iterable[str]) -> re.Pattern[str]:
    """Matches any key that one of the templates stands for."""
    return re.compile("|".join(re.escape(template).replace(r"\{\}", r"\d+") for template in templates) or r"(?!)")


def _shape(tensor: Tensor, transposed: bool) -> tuple[int, ...]:
    return tuple(reversed(tensor.shape)) if transposed else tuple(tensor.shape)


def load_into(
    model: nn.Module,
    tensors: dict[str, Tensor],
    key_map: KeyMap,
    *,
    optional: Iterable[Entry] = (),
    source: str = "the checkpoint",
) -> list[str]:
    """Copy `tensors` into `model` and return the names of ours that were left as they are.

    Only parameters of `optional` entries may be left, and only if the file has none of them: half a set is an error.
    Takes each tensor out of `tensors` as it is copied, so that weights are not held twice for longer than needed.
    Raises UserError naming every missing, unexpected, misshapen or wrongly typed key.
    """
    ours = _parameters(model)
    entries = {entry.ours: entry for entry in (*key_map.body, *key_map.head)}
    skippable = _matcher(entry.ours for entry in optional)
    by_key: dict[str, str] = {}  # key as the map spells it -> key in the file
    doubled = []
    for key in tensors:
        bare = key_map.bare(key)
        if bare in by_key:
            doubled.append(f"{by_key[bare]} and {key}")
        by_key[bare] = key

    wanted = {name: keys for name in ours if (keys := _look_up(entries, name)) is not None}
    unmapped = [name for name in ours if name not in wanted]
    assert not unmapped, f"no key map entry for {', '.join(unmapped)} of {type(model).__name__}"
    absent = {name: [key for key in keys if key not in by_key] for name, keys in wanted.items()}
    left = [name for name in ours if skippable.fullmatch(name)]
    if any(len(absent[name]) < len(wanted[name]) for name in left):
        left = []
    missing = [key for name, keys in absent.items() if name not in left for key in keys]

    used = {key for keys in wanted.values() for key in keys}
    superfluous = _matcher(key_map.ignored)
    unexpected = [key for bare, key in by_key.items() if bare not in used and bare not in key_map.tied]
    unexpected = [key for key in unexpected if not superfluous.fullmatch(key_map.bare(key))]

    wrong = []
    for name, keys in wanted.items():
        transposed = _entry(entries, name).transposed
        should = (ours[name].shape[0] // len(keys), *ours[name].shape[1:]) if ours[name].ndim else ()
        for key in keys:
            if key not in by_key:
                continue
            tensor = tensors[by_key[key]]
            if _shape(tensor, transposed) != should:
                right = tuple(reversed(should)) if transposed else should
                wrong.append(f"{by_key[key]} is {tuple(tensor.shape)}, should be {right}")
            elif tensor.is_floating_point() != ours[name].is_floating_point():
                wrong.append(f"{by_key[key]} is {tensor.dtype}, should be {ours[name].dtype}")
    for key, same in key_map.tied.items():
        if key in by_key and same in by_key and not torch.equal(tensors[by_key[key]], tensors[by_key[same]]):
            wrong.append(f"{by_key[key]} differs from {by_key[same]}, but this model shares the two")

    groups = (("missing", missing), ("unexpected", unexpected), ("present twice", doubled), ("wrong", wrong))
    problems = [f"{label}: {', '.join(keys)}" for label, keys in groups if keys]
    if problems:
        raise UserError(f"{source} does not fit {type(model).__name__}: {'; '.join(problems)}")

    with torch.no_grad():
        for name, keys in wanted.items():
            if name in left:
                continue
            transposed = _entry(entries, name).transposed
            for piece, key in zip(ours[name].chunk(len(keys)) if len(keys) > 1 else (ours[name],), keys, strict=True):
                tensor = tensors.pop(by_key[key])
                piece.copy_(tensor.T if transposed else tensor)
    return left


def to_hf(model: nn.Module, key_map: KeyMap) -> dict[str, Tensor]:
    """The weights of `model` under the keys of the map: contiguous, detached, on the CPU, no two sharing memory."""
    prefix = key_map.prefix if key_map.write_prefix else ""
    head = {entry.ours for entry in key_map.head}
    entries = {entry.ours: entry for entry in (*key_map.body, *key_map.head)}
    tensors = {}
    for name, parameter in _parameters(model).items():
        keys = _look_up(entries, name)
        if keys is None:
            raise ValueError(f"{name} of {type(model).__name__} has no place in this checkpoint layout")
        entry = _entry(entries, name)
        data = parameter.detach().cpu()
        for piece, key in zip(data.chunk(len(keys)) if len(keys) > 1 else (data,), keys, strict=True):
            piece = piece.T if entry.transposed else piece
            tensors[("" if entry.ours in head else prefix) + key] = piece.contiguous().clone()
    return tensors
