"""Copy weights from a checkpoint into a model and back by a key map, strictly in both directions.

Strict means: each of our parameters has its tensor, each tensor of the file is used or known to be superfluous, and
every shape fits. One UserError lists everything that does not.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from vqa_scratch.errors import UserError, some
from vqa_scratch.weights.files import check_finite
from vqa_scratch.weights.maps import ABSENT, HEADS, Entry, KeyMap

logger = logging.getLogger(__name__)

# What programs put around a model before they save it: DataParallel, torch.compile, a module of their own.
WRAPPERS = ("module.", "_orig_mod.", "model.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """All that a checkpoint must have: the parameters, shared ones once, and the buffers of the state dict."""
    saved = model.state_dict(keep_vars=True)
    return dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name in saved}


def _look_up(entries: dict[str, Entry], name: str) -> Entry | None:
    """The entry of our parameter `name`, with its numbers filled in; None if the map does not have it."""
    if name in entries:
        return entries[name]
    entry = entries.get(_NUMBER.sub("{}", name))
    return entry and entry._replace(theirs=tuple(key.format(*_NUMBER.findall(name)) for key in entry.theirs))


def _pieces(tensor: Tensor, entry: Entry) -> tuple[Tensor, ...]:
    """The parts of our tensor that are one key each."""
    if len(entry.theirs) == 1:
        return (tensor,)
    shares = entry.shares or (1,) * len(entry.theirs)
    return tensor.split([len(tensor) // sum(shares) * share for share in shares])


def _matcher(templates: Iterable[str]) -> re.Pattern[str]:
    """Matches any key of one of the templates."""
    return re.compile("|".join(re.escape(template).replace(r"\{\}", r"\d+") for template in templates) or r"(?!)")


def spellings(key: str) -> Iterator[str]:
    """A key of a file as a layout may spell it: as it is, and without one name of `WRAPPERS` after the other."""
    yield key
    while (wrapper := next((name for name in WRAPPERS if key.startswith(name)), None)) is not None:
        key = key.removeprefix(wrapper)
        yield key


def unwrapped(key: str) -> str:
    """A key without all `WRAPPERS`, for a layout of whose own names none begins with one."""
    *_, last = spellings(key)
    return last


def find(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The tensor of that key, whatever stands in front of it; None if there is none."""
    return next((tensor for key, tensor in tensors.items() if f".{key}".endswith(f".{name}")), None)


def load_into(
    model: nn.Module,
    tensors: dict[str, Tensor],
    key_map: KeyMap,
    *,
    optional: Iterable[Entry] = (),
    source: str = "the checkpoint",
) -> list[str]:
    """Copy `tensors` into `model` and return the names of our parameters that were left unchanged.

    Only parameters of `optional` entries may be left, and only if the file has none of them: half a set is an error.
    Keys may have the names of older files and those of `WRAPPERS` in front, and a tied tensor any of its names. What
    only training needed, such as a head, is left out with a line in the log.
    Removes each tensor from `tensors` once it is copied, so that no weights are held twice for long.
    Raises UserError, with the first few of the missing, unexpected, misshapen or wrongly typed keys, and for weights
    that are not finite numbers.
    """
    ours = _parameters(model)
    entries = {entry.ours: entry for entry in (*key_map.body, *key_map.head)}
    wanted = {name: entry for name in ours if (entry := _look_up(entries, name)) is not None}
    unmapped = [name for name in ours if name not in wanted]
    assert not unmapped, f"no key map entry for {', '.join(unmapped)} of {type(model).__name__}"
    used = {key for entry in wanted.values() for key in entry.theirs} - {ABSENT}
    heads, buffers, skippable = _matcher(HEADS), _matcher(key_map.dropped), _matcher(entry.ours for entry in optional)

    by_key: dict[str, str] = {}  # key as the map spells it -> key in the file
    doubled, ignored, unexpected = [], [], []
    for key in tensors:
        spelled = [key_map.bare(spelling) for spelling in spellings(key)]
        bare = next((b for b in spelled if b in used or b in key_map.tied), None)
        if bare in by_key:
            doubled.append(f"{by_key[bare]} and {key}")
        elif bare is not None:
            by_key[bare] = key
        elif any(map(heads.fullmatch, spelled)):
            ignored.append(key)
        elif not any(map(buffers.fullmatch, spelled)):
            unexpected.append(key)
    for key, same in key_map.tied.items():
        if key in by_key and same in used and same not in by_key:
            by_key[same] = by_key.pop(key)

    absent = {
        name: [key for key in entry.theirs if key != ABSENT and key not in by_key] for name, entry in wanted.items()
    }
    left = [name for name in ours if skippable.fullmatch(name)]
    if any(len(absent[name]) < len(wanted[name].theirs) for name in left):
        left = []
    missing = [key for name, keys in absent.items() if name not in left for key in keys]

    wrong = []
    for name, entry in wanted.items():
        for piece, key in zip(_pieces(ours[name].detach().to("meta"), entry), entry.theirs, strict=True):
            if key not in by_key:
                continue
            tensor, should = tensors[by_key[key]], tuple(entry.order.write(piece).shape)
            if tensor.shape != should:
                wrong.append(f"{by_key[key]} is {tuple(tensor.shape)}, should be {should}")
            elif tensor.is_floating_point() != ours[name].is_floating_point():
                wrong.append(f"{by_key[key]} is {tensor.dtype}, should be {ours[name].dtype}")
    for key, same in key_map.tied.items():
        if key in by_key and same in by_key and not torch.equal(tensors[by_key[key]], tensors[by_key[same]]):
            wrong.append(f"{by_key[key]} differs from {by_key[same]}, but this model shares the two")

    groups = (("missing", missing), ("unexpected", unexpected), ("present twice", doubled), ("wrong", wrong))
    problems = [f"{label}: {some(keys)}" for label, keys in groups if keys]
    if problems:
        raise UserError(f"{source} does not fit {type(model).__name__}: {'; '.join(problems)}")

    if ignored:
        logger.warning("%s: left out, since %s has no use for it: %s", source, type(model).__name__, some(ignored))
    with torch.no_grad():
        for name, entry in wanted.items():
            if name in left:
                continue
            for piece, key in zip(_pieces(ours[name], entry), entry.theirs, strict=True):
                if key == ABSENT:
                    piece.zero_()
                    continue
                tensor = tensors.pop(by_key[key])
                check_finite(by_key[key], tensor, source)
                piece.copy_(entry.order.read(tensor))
    return left


def to_hf(model: nn.Module, key_map: KeyMap) -> dict[str, Tensor]:
    """The weights of `model` under the keys of the map: contiguous, detached, on the CPU, no two sharing memory."""
    prefix = key_map.prefix if key_map.write_prefix else ""
    head = {entry.ours for entry in key_map.head}
    entries = {entry.ours: entry for entry in (*key_map.body, *key_map.head)}
    tensors = {}
    for name, parameter in _parameters(model).items():
        entry = _look_up(entries, name)
        if entry is None:
            raise ValueError(f"{name} of {type(model).__name__} has no place in this checkpoint layout")
        for piece, key in zip(_pieces(parameter.detach().cpu(), entry), entry.theirs, strict=True):
            if key != ABSENT:
                whole = ("" if entry.ours in head else prefix) + key
                tensors[whole] = entry.order.write(piece).contiguous().clone()
    return tensors
