"""The files of VQA v2 on disk: their names, where they and the images are found, and what is read of them.

Names follow the public release of VQA v2 (Goyal et al., CVPR 2017), which names images as MS COCO does.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from vqa_scratch.errors import UserError, in_a_line, some

SUBTYPES = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}
IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg")


def subtype_of(split: str) -> str:
    """The official `data_subtype` of a split ("train" -> "train2014"); any other name is its own subtype."""
    return SUBTYPES.get(split, split)


def subtype_in(name: str) -> str | None:
    """The subtype that a file name has in it ("vqa_train2017_questions.json" -> "train2017"), if any."""
    found = re.search(r"(train|val|test|test-dev)20[0-9]{2}", name)
    return found[0] if found else None


def image_subtype_of(subtype: str) -> str:
    """The subtype in the names of the images: test-dev asks some of the questions on test2015."""
    return subtype.replace("test-dev", "test")


def questions_name(subtype: str) -> str:
    return f"v2_OpenEnded_mscoco_{subtype}_questions.json"


def annotations_name(subtype: str) -> str:
    return f"v2_mscoco_{subtype}_annotations.json"


def pairs_name(subtype: str) -> str:
    return f"v2_mscoco_{subtype}_complementary_pairs.json"


def image_file_name(split: str, image_id: int, suffix: str = ".jpg") -> Path:
    """The path of an image below the data folder: train2014/COCO_train2014_000000000042.jpg."""
    subtype = image_subtype_of(subtype_of(split))
    return Path(subtype) / f"COCO_{subtype}_{image_id:012d}{suffix}"


@dataclass(frozen=True, slots=True)
class VQASample:
    """One question on one image. On a test split without annotations the types and `answer` are "", `answers` is ()."""

    image_id: int | str
    image_path: Path
    question_id: int | str
    question: str
    question_type: str
    answer_type: str
    answers: tuple[str, ...]
    answer: str
    # Whether the image is turned as its EXIF orientation says; the official files are read as they are stored.
    upright: bool = field(default=True, compare=False)


@dataclass(frozen=True)
class VQAFiles:
    """The paths of a split: two JSON files (a test split may have no annotations) and the folder of images."""

    questions: Path
    annotations: Path | None
    images: Path


class SplitEntry(NamedTuple):
    """A question or caption as a source has it, before anything is left out."""

    sample: VQASample
    there: bool  # whether its image is
    problem: str | None = None  # why it cannot be used


@dataclass(frozen=True)
class OpenedSplit:
    """A split of a data set, opened: its entries are parsed one at a time."""

    what: str  # the entries: "questions" or "captions"
    files: dict[str, Path | None]
    count: int
    entry: Callable[[int], SplitEntry]
    annotated: bool
    notes: Counter[str]
    upright: bool  # whether photos are turned as their EXIF orientation says; the official files are read as stored


def find_file(folder: Path, name: str, what: str, split: str) -> Path | None:
    """`name` in `folder` or in its subfolders `questions`, `annotations`; None if there is no such file.

    Without it, the one JSON file there whose name has the words `what` ("question", "annotation") and `split`. Raises
    UserError if there are several.
    """
    places = [folder, folder / "questions", folder / "annotations"]
    for place in places:
        if (place / name).is_file():
            return place / name
    names = (path for place in places for path in sorted(place.glob("*.json")) if what in path.name.lower())
    found = [path for path in names if split in re.split("[^a-z-]+", path.name.lower())]
    if len(found) > 1:
        raise UserError(f"{folder} has several files of {what}s of split {split}: {some(p.name for p in found)}")
    return found[0] if found else None


def image_places(root: Path, subtype: str) -> list[Path]:
    """The folders that may hold the images of a subtype, in the order they are tried."""
    return [root / subtype, root / "images" / subtype, root / "images", root]


class ImageFolder:
    """Finds the image of an id. It lists the folder once, so that no image costs a look at the disk."""

    def __init__(self, root: Path, subtype: str) -> None:
        self.subtype = subtype
        self._paths: dict[int | str, Path | None] = {}
        places = image_places(root, subtype)
        for self.folder in filter(Path.is_dir, places):
            self._names = {name for name in os.listdir(self.folder) if name.lower().endswith(IMAGE_SUFFIXES)}
            if self._names:
                return
        looked = ", ".join(map(str, places))
        raise UserError(f"no image ({'/'.join(IMAGE_SUFFIXES)}) of {subtype} found; looked in {looked}")

    def names_for(self, image_id: int | str) -> list[str]:
        """COCO's names of 2014/15, then those of 2017, then the plain id; .jpg before .png."""
        padded = f"{image_id:0>12}"
        stems = (f"COCO_{self.subtype}_{padded}", padded, str(image_id))
        return [stem + suffix for stem in stems for suffix in IMAGE_SUFFIXES]

    def find(self, image_id: int | str) -> Path | None:
        """The path of the image, the same object at every call, or None if there is none."""
        if image_id not in self._paths:
            name = next((name for name in self.names_for(image_id) if name in self._names), None)
            self._paths[image_id] = self.folder / name if name else None
        return self._paths[image_id]


def entries(path: Path, content: Any, key: str) -> list[Any]:
    """content[key], which must be a list."""
    if not isinstance(content, dict) or key not in content:
        found = ", ".join(map(repr, content)) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise UserError(f'{path} has no list "{key}" (found {found or "nothing"}); is it the right file?')
    if not isinstance(content[key], list):
        raise UserError(f'{path}: "{key}" is a {type(content[key]).__name__}, not a list')
    return content[key]


@dataclass
class ReadReport:
    """What was read of a split, kept and left out. `str(report)` is a text of several lines.

    `skipped` counts the entries left out by reason; `examples` holds the first entry for each reason.
    """

    split: str
    what: str  # "questions" or "captions"
    files: dict[str, Path | None]
    in_file: int
    kept: int = 0
    images: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    upright: bool = True  # whether photos are turned

    def skip(self, reason: str, example: object = None, count: int = 1) -> None:
        self.skipped[reason] += count
        if example is not None:
            self.examples.setdefault(reason, in_a_line(example))

    @property
    def about(self) -> str:
        """What the entries are about."""
        turned = "turned as their EXIF says" if self.upright else "read as they are stored (no EXIF turn)"
        return f"on {self.images:,} images, {turned}"

    def check_left(self) -> None:
        """Raise UserError, with the reasons, if nothing was kept."""
        if not self.kept:
            first = {reason: f" ({example})" for reason, example in self.examples.items()}
            why = "; ".join(f"{n} because {reason}{first.get(reason, '')}" for reason, n in self.skipped.most_common())
            path = next(iter(self.files.values()))
            raise UserError(f"no {self.what.removesuffix('s')} of {path} is left: {why or 'it holds none'}")

    def __str__(self) -> str:
        first = {reason: f" (first: {example})" for reason, example in self.examples.items()}
        return "\n".join(
            [
                f"{self.split}: kept {self.kept:,} of {self.in_file:,} {self.what}, {self.about}",
                *(f"  {name:<11}  {path or 'none'}" for name, path in self.files.items()),
                *(f"  left out {n:,}: {reason}{first.get(reason, '')}" for reason, n in self.skipped.most_common()),
                *(f"  note: {count:,} {note}" for note, count in self.notes.items()),
            ]
        )


@dataclass(frozen=True)
class VQAData:
    """The samples in the order of their file, the report on them, and the ids of all questions of the file."""

    samples: list[VQASample]
    report: ReadReport
    ids: Collection[int | str] = ()

    @classmethod
    def of(cls, samples: list[VQASample], report: ReadReport, ids: Collection[int | str] = ()) -> Self:
        """The samples with their completed report. Raises UserError if there are none."""
        report.kept, report.images = len(samples), len({sample.image_id for sample in samples})
        report.check_left()
        return cls(samples, report, ids)

    @property
    def annotated(self) -> bool:
        """Whether the split has answers; a test split may have none."""
        return bool(self.samples[0].answers)


def first_images(samples: list[VQASample], number: int | None) -> list[VQASample]:
    """The samples of the first `number` images, all of them if it is None."""
    kept = set(list(dict.fromkeys(sample.image_id for sample in samples))[:number])
    return [sample for sample in samples if sample.image_id in kept]
