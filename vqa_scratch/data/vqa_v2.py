"""Reads VQA v2 into samples and splits them by image.

The data set and its formats are those of Goyal et al., "Making the V in VQA Matter" (CVPR 2017). Samples hold paths,
never pixels. A report counts what is left out, by reason.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from vqa_scratch.data.image_files import load_image
from vqa_scratch.data.official import read_official
from vqa_scratch.data.own import SPLITS, find_tables, names_of, open_own, splits_of
from vqa_scratch.data.tables import TABLES
from vqa_scratch.data.vqa_files import (
    ImageFolder,
    OpenedSplit,
    ReadReport,
    SplitEntry,
    VQAData,
    VQAFiles,
    VQASample,
    annotations_name,
    find_file,
    image_subtype_of,
    questions_name,
    subtype_in,
    subtype_of,
)
from vqa_scratch.errors import UserError

T = TypeVar("T")


def open_source(
    source: str | Path | VQAFiles, split: str, cache: Path = Path("cache"), keep: bool = False
) -> OpenedSplit:
    """A split of a folder with VQA v2 files, of a table, or of a folder with tables (`data/own.py`).

    A split that is itself the name of a table is that table; the rest as in `read_vqa`. Raises UserError if there is no
    such split.
    """
    columns = cache if keep else None
    if isinstance(source, VQAFiles):
        for path in filter(None, (source.questions, source.annotations)):
            if not Path(path).is_file():
                raise UserError(f"{path} not found: there is no such file")
        return open_official(source, split, columns)
    found = find_split(Path(source), split)
    if found is None:
        raise UserError(nothing_of(Path(source), split))
    return open_official(found, split, columns) if isinstance(found, VQAFiles) else open_own(*found, cache)


def find_split(source: Path, split: str) -> VQAFiles | tuple[list[Path], str] | None:
    """Where a split is: files of VQA v2, or tables and what the split is called in them; None if a folder lacks it.

    Raises UserError as `official_files`.
    """
    is_table = Path(split).suffix.lower() in TABLES or source.is_file()
    return (None if is_table else official_files(source, split)) or find_tables(source, split)


def has_split(source: Path, split: str) -> bool:
    """Whether a source has a split. A table without a column of splits has train, val and test."""
    found = find_split(source, split)
    if found is None or isinstance(found, VQAFiles):
        return found is not None
    tables, name = found
    return name == "all" or names_of(name)[0] in (splits_of(tables) or SPLITS)


def is_shared_out(source: Path) -> bool:
    """Whether the splits of a source are shares of one table that names none."""
    found = find_split(source, "train")
    if found is None or isinstance(found, VQAFiles):
        return False
    tables, name = found
    return name != "all" and not splits_of(tables)


def nothing_of(folder: Path, split: str) -> str:
    """The message that a folder holds no such split."""
    if not folder.is_dir():
        return f"{folder} is not a folder" + ("" if folder.exists() else ": there is no such file or folder")
    return (
        f"{folder} holds no questions of split {split}: neither {questions_name(subtype_of(split))} (not found there "
        f"or in questions/) nor a table {split}.csv, .tsv, .jsonl, .json or .parquet"
    )


def check_splits(source: Path, splits: Iterable[str]) -> None:
    """Raise one UserError that names the files of all splits that a folder lacks, before any of them is read."""
    missing: dict[str, str] = {}
    for split in dict.fromkeys(splits):
        try:
            if find_split(source, split) is None:
                missing[questions_name(subtype_of(split))] = nothing_of(source, split)
        except UserError as error:
            missing[annotations_name(subtype_of(split))] = str(error)
    if len(missing) > 1 and source.is_dir():
        raise UserError(
            f"{source} lacks the files of {len(missing)} splits: {', '.join(missing)} not found, nor tables"
        )
    for message in missing.values():
        raise UserError(message)


def is_official(source: Path, splits: Iterable[str]) -> bool:
    """Whether a source is a folder with files of VQA v2 for any of the splits, complete or not."""
    names = [(what, split) for what in (questions_name, annotations_name) for split in splits]
    words = {questions_name: "question", annotations_name: "annotation"}
    return source.is_dir() and any(find_file(source, what(subtype_of(s)), words[what], s) for what, s in names)


def official_files(folder: Path, split: str) -> VQAFiles | None:
    """The files of a split under their official names, else under others that say what they hold; None without any.

    Raises UserError if there are questions without annotations, unless the split is a test split.
    """
    subtype = subtype_of(split)
    questions = find_file(folder, questions_name(subtype), "question", split)
    if questions is None:
        return None
    annotations = find_file(folder, annotations_name(subtype), "annotation", split)
    if annotations is None and not subtype.startswith("test"):  # the official test splits come without answers
        raise UserError(f"{annotations_name(subtype)} not found beside {questions}")
    return VQAFiles(questions, annotations, folder)


def open_official(files: VQAFiles, split: str, cache: Path | None = None) -> OpenedSplit:
    """A split in the format of VQA v2. Raises UserError if its files are broken or the folder of images is missing."""
    read = read_official(files, cache)
    subtype = read.subtype or subtype_in(files.questions.name) or subtype_of(split)
    finder = ImageFolder(Path(files.images), image_subtype_of(subtype))
    paths = {"questions": files.questions, "annotations": files.annotations, "images": finder.folder}

    def entry(position: int) -> SplitEntry:
        question_id, image_id, question, kind, answer_type, answers, answer, problem = read.questions[position]
        image = finder.find(image_id)
        path = image or finder.folder / finder.names_for(image_id)[0]
        sample = VQASample(image_id, path, question_id, question, kind, answer_type, answers, answer, False)
        return SplitEntry(sample, image is not None, problem or None)

    return OpenedSplit(
        "questions", paths, len(read.questions), entry, read.annotated, Counter(read.notes), upright=False
    )


def _is_readable(path: Path) -> bool:
    try:
        load_image(path)
    except UserError:
        return False
    return True


def _disagree(answers: tuple[str, ...], min_agreement: float) -> bool:
    """Whether the annotators agree less than that."""
    return max(map(answers.count, set(answers))) / len(answers) < min_agreement - 1e-9


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What of a split is read.

    start_at, end_at        -- the slice [start_at, end_at) of the question list that is looked at
    max_images              -- at most so many distinct images: questions on further ones are left out
    max_questions           -- at most so many questions in all
    max_questions_per_image -- at most so many questions on one image
    min_agreement           -- least share of the annotators, 0 to 1, who gave the most common answer, word for word
    verify_images           -- decode each image once and leave out those that cannot be read (slow on large sets)
    """

    start_at: int = 0
    end_at: int | None = None
    max_images: int | None = None
    max_questions: int | None = None
    max_questions_per_image: int | None = None
    min_agreement: float = 0.0
    verify_images: bool = False

    def __post_init__(self) -> None:
        least = {"start_at": 0, "end_at": 0, "max_images": 1, "max_questions": 1, "max_questions_per_image": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise UserError(f"{name} must be {smallest} or more, not {value}")
        if not 0 <= self.min_agreement <= 1:
            raise UserError(f"min_agreement is a share of the annotators, from 0 to 1, not {self.min_agreement}")


def read_vqa(
    source: str | Path | VQAFiles,
    split: str = "train",
    *,
    cache: Path = Path("cache"),
    keep: bool = False,
    **limits: Any,
) -> VQAData:
    """Reads one split of a data set: the files of VQA v2, or a table of one's own (see `open_source`).

    source -- the folder or table, or a VQAFiles with the place of each file
    split  -- "train", "val", "test", "test-dev", an official subtype ("train2014"), any name that files were written
              under, "all" of a table, or the name of a table
    cache  -- the folder for pictures that come inside a table
    keep   -- whether to keep what is parsed of the files of VQA v2 there too, which saves the next reading seconds
    limits -- the fields of `Limits`

    Annotations are required except for splits whose name starts with "test".
    Raises UserError, in one line: a missing file or folder of images, broken JSON, a missing key, a question
    annotated with no answers, a limit out of range, or no question left.
    """
    return read_opened(open_source(source, split, cache, keep), split, Limits(**limits))


def read_opened(opened: OpenedSplit, split: str, limits: Limits) -> VQAData:
    """The entries of a split within the limits that can be used. Raises UserError if there is none."""
    start, end = limits.start_at, limits.end_at
    if limits.min_agreement > 0 and not opened.annotated:
        raise UserError(f"min_agreement={limits.min_agreement} needs annotations, and {split} has none")
    if start and start >= opened.count:
        path = next(iter(opened.files.values()))
        raise UserError(f"start_at={start} is past the end: {path} has {opened.count} {opened.what}")
    report = ReadReport(split, opened.what, opened.files, opened.count, notes=opened.notes, upright=opened.upright)
    samples: list[VQASample] = []
    per_image: Counter[int | str] = Counter()
    is_readable = functools.cache(_is_readable)
    seen: set[int | str] = set()
    stop = opened.count if end is None else min(end, opened.count)
    bar = tqdm(range(start, stop), "verifying images", unit="question", disable=not limits.verify_images)
    for position in bar:
        if len(samples) == limits.max_questions:
            report.skip("over max_questions", count=stop - position)
            break
        sample, there, problem = opened.entry(position)
        number, image = sample.question_id, sample.image_id
        if number in seen:
            report.skip(f"the {opened.what.removesuffix('s')} id occurred before", number)
            continue
        seen.add(number)
        if problem:
            report.skip(problem, number)
        elif limits.min_agreement > 0 and _disagree(sample.answers, limits.min_agreement):
            report.skip("the annotators agree less than min_agreement", number)
        elif per_image[image] == limits.max_questions_per_image:
            report.skip("over max_questions_per_image")
        elif image not in per_image and len(per_image) == limits.max_images:
            report.skip("over max_images")
        elif not there:
            report.skip("the image is missing", sample.image_path)
        elif limits.verify_images and not is_readable(sample.image_path):
            report.skip("the image cannot be read", sample.image_path.name)
        else:
            per_image[image] += 1
            samples.append(sample)
    outside = opened.count - max(stop - start, 0)
    if outside:
        report.skip("outside start_at and end_at", count=outside)
    return VQAData.of(samples, report, seen)


def summary(samples: Sequence[VQASample]) -> str:
    """One line: how many images, questions and answers."""
    images, answers = {s.image_path for s in samples}, {s.answer for s in samples if s.answers}
    return f"{len(images):,} images, {len(samples):,} questions, {len(answers):,} different answers"


def spread(samples: Sequence[T], number: int) -> list[T]:
    """At most `number` of the samples, evenly spaced from the first on."""
    number = min(number, len(samples))
    return [samples[i * len(samples) // number] for i in range(number)]


def split_by_image(
    samples: Iterable[VQASample], fractions: Sequence[float], seed: int = 0
) -> tuple[list[VQASample], ...]:
    """Splits samples so that all questions on one image fall into the same part, one part per fraction.

    The part of an image depends only on its id and the seed (BLAKE2), not on the other images or on their order; so
    parts have the wanted sizes only on average. Only a part that would be empty, of few images, gets the nearest one
    of another. Raises ValueError unless the fractions are positive and sum to 1.
    """
    if any(fraction <= 0 for fraction in fractions) or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions must be positive and sum to 1, not {tuple(fractions)}")
    bounds = [sum(fractions[: i + 1]) for i in range(len(fractions) - 1)]
    samples = list(samples)

    @cache
    def position(image_id: int | str) -> float:
        digest = hashlib.blake2b(f"{seed}:{image_id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64

    part_of = {s.image_id: sum(position(s.image_id) >= bound for bound in bounds) for s in samples}
    for part in range(len(fractions)):
        count = Counter(part_of.values())
        spare = [image_id for image_id, own in part_of.items() if count[own] > 1]
        if not count[part] and spare:
            middle = sum(fractions[:part]) + fractions[part] / 2
            part_of[min(spare, key=lambda image_id: abs(position(image_id) - middle))] = part
    parts: tuple[list[VQASample], ...] = tuple([] for _ in fractions)
    for sample in samples:
        parts[part_of[sample.image_id]].append(sample)
    return parts
