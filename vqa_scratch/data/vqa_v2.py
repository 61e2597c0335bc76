"""Reads VQA v2 into samples and splits them by image.

The data set and its formats are those of Goyal et al., "Making the V in VQA Matter" (CVPR 2017). Samples hold paths,
never pixels. A report counts what is left out, by reason.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from tqdm import tqdm

from vqa_scratch.data.image_files import load_image
from vqa_scratch.data.vqa_files import (
    Annotation,
    ImageFolder,
    ReadReport,
    VQAData,
    VQAFiles,
    VQASample,
    annotations_name,
    entries,
    fields,
    find_file,
    image_subtype_of,
    load_annotations,
    questions_name,
    subtype_of,
)
from vqa_scratch.errors import UserError
from vqa_scratch.storage import read_json


def _find(source: str | Path | VQAFiles, split: str) -> VQAFiles:
    if isinstance(source, VQAFiles):
        for path in filter(None, (source.questions, source.annotations)):
            if not Path(path).is_file():
                raise UserError(f"{path} not found: there is no such file")
        return source
    folder, subtype = Path(source), subtype_of(split)
    questions = find_file(folder, questions_name(subtype))
    try:
        annotations = find_file(folder, annotations_name(subtype))
    except UserError:
        if not subtype.startswith("test"):  # the official test splits come without answers
            raise
        annotations = None
    return VQAFiles(questions, annotations, folder)


def _check_limits(split: str, annotated: bool, min_agreement: float, **counts: int | None) -> None:
    for name, value in counts.items():
        least = 0 if name in ("start_at", "end_at") else 1
        if value is not None and value < least:
            raise UserError(f"{name} must be {least} or more, not {value}")
    if not 0 <= min_agreement <= 1:
        raise UserError(f"min_agreement is a share of the annotators, from 0 to 1, not {min_agreement}")
    if min_agreement > 0 and not annotated:
        raise UserError(f"min_agreement={min_agreement} needs annotations, and {split} has none")


def _is_readable(path: Path) -> bool:
    try:
        load_image(path)
    except UserError:
        return False
    return True


def _problem(annotation: Annotation | None, image_id: int, min_agreement: float) -> str | None:
    """Why the annotation rules its question out."""
    if annotation is None:
        return "the question has no annotation"
    if annotation.image_id != image_id:
        return "the annotation is about another image"
    if min_agreement > 0:
        most_common = max(map(annotation.answers.count, set(annotation.answers)))
        if most_common / len(annotation.answers) < min_agreement - 1e-9:
            return "the annotators agree less than min_agreement"
    return None


def read_vqa(
    source: str | Path | VQAFiles,
    split: str = "train",
    *,
    start_at: int = 0,
    end_at: int | None = None,
    max_images: int | None = None,
    max_questions: int | None = None,
    max_questions_per_image: int | None = None,
    min_agreement: float = 0.0,
    verify_images: bool = False,
) -> VQAData:
    """Reads one split of a folder that holds the official files.

    source                  -- the folder, or a VQAFiles with the place of each file
    split                   -- "train", "val", "test", "test-dev", an official subtype ("train2014"), or any name that
                               files were written under
    start_at, end_at        -- the slice [start_at, end_at) of the question list that is looked at
    max_images              -- at most so many distinct images: questions on further ones are left out
    max_questions           -- at most so many questions in all
    max_questions_per_image -- at most so many questions on one image
    min_agreement           -- least share of the annotators, 0 to 1, who gave the most common answer, word for word
    verify_images           -- decode each image once and leave out those that cannot be read (slow on large sets)

    Annotations are required except for splits whose name starts with "test".
    Raises UserError, in one line: a missing file or folder of images, broken JSON, a missing key, a question
    annotated with no answers, an option out of range, or no question left.
    """
    files = _find(source, split)
    _check_limits(
        split,
        files.annotations is not None,
        min_agreement,
        start_at=start_at,
        end_at=end_at,
        max_images=max_images,
        max_questions=max_questions,
        max_questions_per_image=max_questions_per_image,
    )
    content = read_json(files.questions)
    questions = entries(files.questions, content, "questions")
    subtype = content.get("data_subtype") or subtype_of(split)
    finder = ImageFolder(Path(files.images), image_subtype_of(subtype))
    annotations: dict[int, Annotation] | None = None
    paths = {"questions": files.questions, "annotations": files.annotations, "images": finder.folder}
    report = ReadReport(split, "questions", paths, in_file=len(questions))
    if files.annotations is not None:
        annotations, report.notes = load_annotations(files.annotations)
    if start_at >= len(questions):
        raise UserError(f"start_at={start_at} is past the end: {files.questions} has {len(questions)} questions")

    samples: list[VQASample] = []
    per_image: Counter[int] = Counter()
    is_readable = cache(_is_readable)
    seen: set[int] = set()
    types = {"question_id": int, "image_id": int, "question": str}
    no_annotation = Annotation(0, "", "", (), "")
    stop = len(questions) if end_at is None else min(end_at, len(questions))
    bar = tqdm(range(start_at, stop), "verifying images", unit="question", disable=not verify_images)
    for position in bar:
        if max_questions is not None and len(samples) == max_questions:
            report.skip("over max_questions", count=stop - position)
            break
        where = f"{files.questions}: questions[{position}]"
        question_id, image_id, question = fields(where, questions[position], types)
        if question_id in seen:
            report.skip("the question id occurred before", question_id)
            continue
        seen.add(question_id)
        if not question.strip():
            report.skip("the question is empty", question_id)
            continue
        found = no_annotation
        if annotations is not None:
            found = annotations.get(question_id)
            problem = _problem(found, image_id, min_agreement)
            if problem:
                report.skip(problem, question_id)
                continue
        if max_questions_per_image is not None and per_image[image_id] >= max_questions_per_image:
            report.skip("over max_questions_per_image")
            continue
        if max_images is not None and image_id not in per_image and len(per_image) == max_images:
            report.skip("over max_images")
            continue
        path = finder.find(image_id)
        if path is None:
            report.skip("the image is missing", finder.folder / finder.names_for(image_id)[0])
            continue
        if verify_images and not is_readable(path):
            report.skip("the image cannot be read", path.name)
            continue
        per_image[image_id] += 1
        kinds = (found.question_type, found.answer_type)
        samples.append(VQASample(image_id, path, question_id, question.strip(), *kinds, found.answers, found.answer))
    outside = len(questions) - max(stop - start_at, 0)
    if outside:
        report.skip("outside start_at and end_at", count=outside)
    return VQAData.of(samples, report)


def spread(samples: Sequence[VQASample], number: int) -> list[VQASample]:
    """At most `number` of the samples, evenly spaced from the first on."""
    number = min(number, len(samples))
    return [samples[i * len(samples) // number] for i in range(number)]


def split_by_image(
    samples: Iterable[VQASample], fractions: Sequence[float], seed: int = 0
) -> tuple[list[VQASample], ...]:
    """Splits samples so that all questions on one image fall into the same part, one part per fraction.

    The part of an image depends only on its id and the seed (BLAKE2), not on the other images or on their order; so
    parts have the wanted sizes only on average. Raises ValueError unless the fractions are positive and sum to 1.
    """
    if any(fraction <= 0 for fraction in fractions) or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions must be positive and sum to 1, not {tuple(fractions)}")
    bounds = [sum(fractions[: i + 1]) for i in range(len(fractions) - 1)]
    parts: tuple[list[VQASample], ...] = tuple([] for _ in fractions)
    for sample in samples:
        digest = hashlib.blake2b(f"{seed}:{sample.image_id}".encode(), digest_size=8).digest()
        position = int.from_bytes(digest, "big") / 2**64
        parts[sum(position >= bound for bound in bounds)].append(sample)
    return parts
