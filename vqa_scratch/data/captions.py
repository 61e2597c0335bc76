"""Reads captions of images: those of a COCO captions file, or generated descriptions of the drawn scenes.

The format is that of MS COCO (Chen et al. 2015, "Microsoft COCO Captions", arXiv 1504.00325): `images` with an id and a
file name, `annotations` with an image id and a caption, usually five an image. Each caption becomes a `VQASample` with
an empty `question`; its `answer` is the caption and its `answers` are all captions of its image. So the code that
groups, splits, batches and encodes questions serves captions too.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from vqa_scratch.data.descriptions import describe_all, read_scenes, scenes_file
from vqa_scratch.data.own import shares_of
from vqa_scratch.data.vqa_files import (
    OpenedSplit,
    SplitEntry,
    VQAData,
    VQASample,
    entries,
    first_images,
    image_file_name,
    image_places,
    subtype_in,
    subtype_of,
)
from vqa_scratch.data.vqa_v2 import Limits, read_opened
from vqa_scratch.errors import UserError, some
from vqa_scratch.storage import read_json, typed

CAPTION = "caption"  # the question type and answer type of a sample that is one


def captions_names(split: str) -> tuple[str, ...]:
    """The names a captions file of a split may have: COCO's of 2014 and 2017, and the plain one."""
    return tuple(dict.fromkeys(f"captions_{name}.json" for name in (subtype_of(split), f"{split}2017", split)))


def find_captions(folder: Path, split: str) -> Path | None:
    """The captions file of a split in the folder or in its subfolder `annotations`; None if there is none."""
    places = (place / name for name in captions_names(split) for place in (folder, folder / "annotations"))
    return next(filter(Path.is_file, places), None)


def images_beside(path: Path) -> Path:
    """The folder in which the images of a captions file are looked for."""
    return path.parent.parent if path.parent.name == "annotations" else path.parent


def _image_entries(path: Path, content: Any) -> dict[int, str]:
    """{image_id: file name}. Raises UserError that names a malformed entry."""
    names: dict[int, str] = {}
    for position, entry in enumerate(entries(path, content, "images")):
        where = f"{path}: images[{position}]"
        image_id, name = typed(where, entry, {"id": int, "file_name": str})
        parts = PurePosixPath(name.replace("\\", "/"))
        if not name or parts.is_absolute() or ".." in parts.parts:
            raise UserError(f"{where}: 'file_name' is {name!r}, not the name of a file below the folder of images")
        if names.setdefault(image_id, str(parts)) != str(parts):
            raise UserError(f"{where}: image {image_id} has two file names, {names[image_id]} and {name}")
    return names


def _entry(
    image_id: int, path: Path, caption_id: int, caption: str, references: tuple[str, ...], upright: bool, *state: Any
) -> SplitEntry:
    return SplitEntry(VQASample(image_id, path, caption_id, "", CAPTION, CAPTION, references, caption, upright), *state)


def _annotations(path: Path, content: Any) -> tuple[list[tuple[int, int, str]], dict[int, tuple[str, ...]]]:
    """(caption id, image id and caption of every annotation; all captions of each image).

    One that is empty, or whose id occurred before, is no reference. Raises UserError that names a malformed entry.
    """
    listed, seen, references = [], set(), defaultdict(list)
    for position, entry in enumerate(entries(path, content, "annotations")):
        where, types = f"{path}: annotations[{position}]", {"id": int, "image_id": int, "caption": str}
        caption_id, image_id, caption = typed(where, entry, types)
        caption = " ".join(caption.split())
        listed.append((caption_id, image_id, caption))
        if caption and caption_id not in seen:
            references[image_id].append(caption)
        seen.add(caption_id)
    return listed, {image_id: tuple(captions) for image_id, captions in references.items()}


def open_coco(path: Path, folder: Path) -> OpenedSplit:
    """One captions file; its images lie below `folder`. Raises UserError that names a malformed entry."""
    content = read_json(path)
    names = _image_entries(path, content)
    annotations, references = _annotations(path, content)
    upright = subtype_in(path.name) is None  # the official files, of 2014 and 2017, are read as they are stored
    places = image_places(folder, path.stem.removeprefix("captions_"))
    listed = cache(lambda place: set(os.listdir(place)) if place.is_dir() else set())  # each folder once

    @cache
    def find(name: str) -> Path | None:
        paths = (place / name for place in places)
        return next((found for found in paths if found.name in listed(found.parent)), None)

    def entry(position: int) -> SplitEntry:
        caption_id, image_id, caption = annotations[position]
        name, texts = names.get(image_id), references.get(image_id, ())
        image = None if name is None else find(name)
        problem = (
            'the image is not listed under "images"' if name is None else None if caption else "the caption is empty"
        )
        place = image or Path(name or path)
        return _entry(image_id, place, caption_id, caption, texts, upright, image is not None, problem)

    return OpenedSplit("captions", {"captions": path}, len(annotations), entry, True, Counter(), upright)


def open_described_scenes(folder: Path, split: str, seed: int = 0) -> OpenedSplit:
    """The drawn scenes of a split with their generated descriptions, which depend on (seed, image id) alone."""
    path, found = scenes_file(folder, split), []
    for number, captions in describe_all(read_scenes(path), seed).items():
        image_id = int(number)
        image = folder / image_file_name(split, image_id, ".png")
        there = image.is_file()
        all_of_it = (tuple(captions), True, there)
        found += [_entry(image_id, image, image_id * 1000 + k, text, *all_of_it) for k, text in enumerate(captions)]
    return OpenedSplit("captions", {"captions": path}, len(found), found.__getitem__, True, Counter(), True)


def nothing_of(folder: Path, splits: list[str]) -> str:
    """The message that a folder holds no captions of these splits."""
    if not folder.is_dir():
        there = " with captions, nor a captions file of COCO's layout (.json)"
        return f"{folder} is not a folder" + (there if folder.exists() else " (there is no such path)")
    if len(splits) == 1:
        which, wanted = f"split {splits[0]}", " or ".join(captions_names(splits[0]))
    else:
        which, wanted = f"{len(splits)} splits", some(f"captions_{split}.json" for split in splits)
    return f"no captions of {which}: {folder} and its subfolder annotations/ have no {wanted}"


def check_captions(folder: Path, splits: Iterable[str]) -> None:
    """Raise one UserError that names the files of all splits that a folder lacks, before any of them is read."""
    missing = [s for s in dict.fromkeys(splits) if not (find_captions(folder, s) or scenes_file(folder, s).is_file())]
    if missing:
        raise UserError(nothing_of(folder, missing))


def read_captions(folder: str | Path, split: str = "train", *, seed: int = 0, max_images: int | None = None) -> VQAData:
    """One split of a folder: its captions file if there is one, else the descriptions of its drawn scenes.

    `folder` may be a captions file, whose images are shared out among train, val and test, and so may `split`. With
    `max_images`, at most that many images. Raises UserError if there is neither, or if no caption is left.
    """
    folder, limits = Path(folder), Limits(max_images=max_images)
    if Path(split).suffix == ".json":
        return read_opened(open_coco(Path(split), images_beside(Path(split))), "all", limits)
    if folder.is_file():
        data = read_opened(open_coco(folder, images_beside(folder)), split, Limits())
        chosen = shares_of(split, (sample.image_id for sample in data.samples), str(folder))
        kept = first_images([sample for sample in data.samples if sample.image_id in chosen], max_images)
        data.report.skip("of another split, or over max_images", count=len(data.samples) - len(kept))
        return VQAData.of(kept, data.report)
    path = find_captions(folder, split)
    if path is not None:
        return read_opened(open_coco(path, folder), split, limits)
    if scenes_file(folder, split).is_file():
        return read_opened(open_described_scenes(folder, split, seed), split, limits)
    raise UserError(nothing_of(folder, [split]))
