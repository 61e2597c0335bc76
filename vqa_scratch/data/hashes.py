"""Hashes of the data of a run, by which a run that is resumed knows whether they are still the same."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError, some

BLOCK = 10_000  # rows that are hashed at once
Hashes = dict[str, dict[str, Any]]  # {split: {"samples": their number, "hash": of all of them}}


def facts(samples: Sequence[VQASample]) -> Iterable[tuple[Any, ...]]:
    """What makes each sample itself: id, question, answers, the name of its image's file and which image it is.

    Folders are left out, so data may be moved.
    """
    images: dict[Path, tuple[str, int]] = {}
    for s in samples:
        image = images.get(s.image_path) or images.setdefault(s.image_path, (s.image_path.name, len(images)))
        yield s.question_id, s.question, s.answer, s.answers, *image


def hashes_of(splits: Mapping[str, Iterable[Any]]) -> Hashes:
    """The hashes of the facts of each split, in their order."""
    result: Hashes = {}
    for name, rows in splits.items():
        digest, number, left = hashlib.blake2b(digest_size=12), 0, iter(rows)
        while block := [repr(row) for row in islice(left, BLOCK)]:
            digest.update("".join(block).encode("utf-8", "backslashreplace"))
            number += len(block)
        result[name] = {"samples": number, "hash": digest.hexdigest()}
    return result


def check_same(kept: Any, found: Hashes, where: Path, but: str | None = None) -> None:
    """Raise UserError that says how the data that are found differ from those that a run kept, if they do.

    `but` is a split that may differ. None is kept by runs of older versions.
    """
    if kept is None:
        return
    entries = list(kept.values()) if isinstance(kept, dict) else [None]
    if not all(isinstance(entry, dict) and isinstance(entry.get("samples"), int) for entry in entries):
        raise UserError(f"{where} holds no hashes of data, as train.py and rlhf.py write them, but {str(kept)[:40]}")
    changes = []
    for name in dict.fromkeys([*kept, *found]):
        if name == but or kept.get(name) == found.get(name):
            continue
        before, now = (hashes[name]["samples"] if name in hashes else 0 for hashes in (kept, found))
        changes.append(f"{name} had {before:,} samples, now {now:,}" if before != now else f"{name} has other samples")
    if changes:
        raise UserError(
            f"the data are not those that {where} was made with: {some(changes, 2)}. A resumed run needs the same; "
            "for others, begin a run with another --out"
        )
