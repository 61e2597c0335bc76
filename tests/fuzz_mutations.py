"""Mutations of valid files for `fuzz.py`: each takes a file and leaves in its place what a user might have there."""

import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

SURROGATE, NUL, LINES, LONG = "a \ud800 b", "a\0b", "first\nsecond\r\nthird\u2028fourth", "long " * 20_000
NUMBERS = (0, 1, -1, 2, 3, 7, 255, 1_000_000, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.5, 1e308)
TEXTS = ("", " ", "x", "0", "7", "true", NUL, LINES, SURROGATE, LONG, "../../etc/passwd", "<script>", "é日本語🙂")


def deep(levels: int) -> list:
    """A list in a list in a list."""
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def other_value(rng: random.Random) -> Any:
    """A value of any type, often one that is at an edge."""
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: None,
        lambda: rng.choice((True, False)),
        lambda: rng.choice(NUMBERS),
        lambda: rng.choice((float("nan"), float("inf"), -float("inf"))),
        lambda: rng.choice(TEXTS),
        lambda: rng.choice(([], [1], [None], ["x"], [[]], [{}], [1, 2, 3], list(range(3000)))),
        lambda: rng.choice(({}, {"a": 1}, {"0": None}, {"content": 7}, {"": []})),
        lambda: deep(50),
    )
    return rng.choice(kinds)()


# ------------------------------------------------------------------------------------------- values in a tree


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value below `tree`; tuples are left out, since they cannot be changed."""
    found = []
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        found.append((tree, key))
        found += places(tree[key])
    return found


def some_place(tree: Any, rng: random.Random) -> tuple[Any, Any] | None:
    """A place in the tree. Every depth is as likely as another, else a vocabulary would get all the changes."""
    path, node = [], tree
    while isinstance(node, (dict, list)) and node and (not path or rng.random() < 0.8):
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        path.append((node, key))
        node = node[key]
    return path[-1] if path else None


def with_other_value(tree: Any, rng: random.Random) -> Any:
    place = some_place(tree, rng)
    if place is None or rng.random() < 0.03:
        return other_value(rng)
    container, key = place
    container[key] = other_value(rng)
    return tree


def without_a_key(tree: Any, rng: random.Random) -> Any:
    place = some_place(tree, rng)
    if place is None:
        return other_value(rng)
    del place[0][place[1]]
    return tree


def with_one_more(tree: Any, rng: random.Random) -> Any:
    """A key more, or an entry of a list more: another value, or a copy of what is there."""
    place = some_place(tree, rng)
    if place is None:
        return [tree, tree]
    container, key = place
    value = rng.choice((container[key], other_value(rng)))
    if isinstance(container, dict):
        container[rng.choice(("extra", "", SURROGATE, str(key) + " ", str(key).upper()))] = value
    else:
        container.insert(key, value)
    return tree


def with_values_swapped(tree: Any, rng: random.Random) -> Any:
    one, two = some_place(tree, rng), some_place(tree, rng)
    if one and two:
        text = json.dumps([one[0][one[1]], two[0][two[1]]])  # copies: one may lie inside the other
        two[0][two[1]], one[0][one[1]] = json.loads(text)
    return tree


TREE = (with_other_value,) * 5 + (without_a_key,) * 2 + (with_one_more, with_values_swapped)


# ------------------------------------------------------------------------------------------- bytes


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 8))):
        if changed:
            changed[rng.randrange(min(len(changed), rng.choice((64, 4096, 10**9))))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def more_bytes(data: bytes, rng: random.Random) -> bytes:
    extra = rng.choice((b"\0", b"\n\n", b"\xff\xfe", b"\xef\xbb\xbf", b"x" * 100_000, data))
    at = rng.choice((0, len(data), rng.randrange(len(data) + 1)))
    return data[:at] + extra + data[at:]


def other_bytes(data: bytes, rng: random.Random) -> bytes:
    kinds = (b"", b" ", b"\0" * 64, b"null", b"[]", b"{}", b'"x"', b"\x89PNG\r\n\x1a\n", b"PK\x03\x04", b"\xff" * 9)
    return rng.choice((*kinds, b"[" * 50 + b"]" * 50, b"[" * 100_000 + b"]" * 100_000))


BYTES = (cut, flipped, flipped, more_bytes, other_bytes)


def change_bytes(path: Path, rng: random.Random) -> str:
    how = rng.choice(BYTES)
    path.write_bytes(how(path.read_bytes(), rng))
    return how.__name__


def change_kind_of_file(path: Path, rng: random.Random) -> str:
    """The file is gone, a folder, a link to nowhere, or cannot be what its name says."""
    kind = rng.choice(("missing", "folder", "dangling link", "empty"))
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to(path.parent / "nowhere")
    elif kind == "empty":
        path.write_bytes(b"")
    return kind


# ------------------------------------------------------------------------------------------- kinds of files


def change_json(path: Path, rng: random.Random) -> str:
    tree = json.loads(path.read_text())
    if isinstance(tree, dict) and tree and rng.random() < 0.07:  # a key that is there twice
        key = rng.choice(list(tree))
        path.write_text(f"{{{json.dumps(key)}: {json.dumps(other_value(rng))}, {json.dumps(tree)[1:]}")
        return "a key twice"
    how = rng.choice(TREE)
    path.write_text(json.dumps(how(tree, rng)))
    return how.__name__


def change_line(path: Path, rng: random.Random) -> str:
    """One line of a text file; of JSON lines a value."""
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    if path.suffix == ".jsonl" and rng.random() < 0.7:
        how = rng.choice(TREE)
        lines[at] = json.dumps(how(json.loads(lines[at]), rng))
        what = f"{how.__name__} in a line"
    else:
        lines[at] = rng.choice((lines[at][:3], lines[at] + ",x", "", '"' + lines[at], NUL, LONG, "é", lines[at] * 2))
        what = "another line"
    path.write_text("\n".join(lines) + "\n")
    return what


def change_safetensors(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    if rng.random() < 0.3:  # the header, which is JSON
        size = int.from_bytes(data[:8], "little")
        how = rng.choice(TREE)
        header = json.dumps(how(json.loads(data[8 : 8 + size]), rng)).encode()
        size = len(header) if rng.random() < 0.9 else rng.choice((0, 2**63, 10**9))
        path.write_bytes(size.to_bytes(8, "little") + header + data[8 + int.from_bytes(data[:8], "little") :])
        return f"{how.__name__} in the header"
    tensors = load(data)
    what = change_tensors(tensors, rng)
    path.write_bytes(save({k.encode("utf-8", "replace").decode(): v.contiguous() for k, v in tensors.items()}))
    return what


def change_tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> str:
    """One tensor of a dictionary, in place."""
    key = rng.choice(list(tensors))
    tensor = tensors[key]
    kinds: dict[str, Callable[[], Any]] = {
        "a tensor less": lambda: tensors.pop(key),
        "a tensor more": lambda: tensors.update({rng.choice(("extra", key + ".extra", "")): torch.zeros(2)}),
        "every name longer": lambda: [tensors.update({f"x.{k}": tensors.pop(k)}) for k in list(tensors)],
        "no tensors": tensors.clear,
        "a row less": lambda: tensors.update({key: tensor[1:].clone() if tensor.ndim else tensor}),
        "a row more": lambda: tensors.update({key: torch.cat([tensor, tensor[:1]]) if tensor.ndim else tensor}),
        "a number": lambda: tensors.update({key: torch.tensor(1.0)}),
        "whole numbers": lambda: tensors.update({key: tensor.long()}),
        "another type": lambda: tensors.update({key: tensor.to(rng.choice((torch.float16, torch.float64)))}),
        "truth values": lambda: tensors.update({key: tensor != 0}),
        "nothing in it": lambda: tensors.update({key: tensor[:0].clone() if tensor.ndim else tensor}),
        "not a number": lambda: tensors.update({key: torch.full_like(tensor, float("nan"))}),
        "infinite": lambda: tensors.update({key: torch.full_like(tensor, float("inf"))}),
        "huge": lambda: tensors.update({key: torch.full_like(tensor, 3e38)}),
    }
    what = rng.choice(list(kinds))
    if what in ("not a number", "infinite", "huge") and not tensor.is_floating_point():
        what = "whole numbers"
    kinds[what]()
    return what


def change_pickle(path: Path, rng: random.Random) -> str:
    """A value of what torch saved: also deep inside, and also of the tensors."""
    tree = torch.load(path, weights_only=True)
    dicts = [tree] + [c[k] for c, k in places(tree) if isinstance(c[k], dict)]
    dicts = [d for d in dicts if d and all(isinstance(v, torch.Tensor) for v in d.values())]
    if dicts and rng.random() < 0.4:
        what = change_tensors(rng.choice(dicts), rng)
    else:
        how = rng.choice((with_other_value, with_other_value, without_a_key, with_one_more))
        tree, what = how(tree, rng), how.__name__
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    path.write_bytes(buffer.getvalue())
    return what


CHANGES = {
    ".json": change_json,
    ".jsonl": change_line,
    ".csv": change_line,
    ".tsv": change_line,
    ".txt": change_line,
    ".toml": change_line,
    ".safetensors": change_safetensors,
    ".pt": change_pickle,
    ".bin": change_pickle,
}


def change_file(path: Path, rng: random.Random) -> str:
    """Change one valid file; returns what was done, in words."""
    chance = rng.random()
    if chance < 0.06:
        return change_kind_of_file(path, rng)
    if chance < 0.25 or path.suffix not in CHANGES:
        return change_bytes(path, rng)
    return CHANGES[path.suffix](path, rng)


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
