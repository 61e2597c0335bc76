"""The data of the caption system, and how its captions are scored and shown."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from vqa_scratch.data.answers import Answer, Answers
from vqa_scratch.data.captions import check_captions, read_captions
from vqa_scratch.data.descriptions import objects_named, objects_of, read_scenes, scenes_file
from vqa_scratch.data.image_files import load_image
from vqa_scratch.data.scenes import Scene
from vqa_scratch.data.vqa_v2 import VQASample, check_splits, read_vqa, spread
from vqa_scratch.report.gallery import card, write_page
from vqa_scratch.report.table import draw_table
from vqa_scratch.systems.base import RunData
from vqa_scratch.systems.caption_scores import corpus_bleu, score_objects
from vqa_scratch.systems.clip_options import CLIPOptions
from vqa_scratch.systems.options import CaptionOptions
from vqa_scratch.systems.questions import built_in, family_of, with_scored
from vqa_scratch.systems.scoring import other_images
from vqa_scratch.systems.writing import writing_figures

Scenes = Mapping[int | str, Scene]  # by image id
TABLE_ROWS = 8  # of results.png


def to_describe(texts: Sequence[VQASample]) -> list[VQASample]:
    """One caption an image, whose `answers` are all the references; a caption is a sample without a question."""
    first: dict[int | str, VQASample] = {}
    for sample in texts:
        if not sample.question:
            first.setdefault(sample.image_id, sample)
    return list(first.values())


def read_texts(
    folder: Path,
    split: str,
    *,
    seed: int,
    max_images: int | None = None,
    questions: bool = False,
    verbose: bool = False,
) -> list[VQASample]:
    """Captions of a split, each reference a sample; with `questions` then the questions about the same images.

    `verbose` prints what was left out. Raises UserError if there is nothing to read.
    """
    found = [read_captions(folder, split, seed=seed, max_images=max_images)]
    if questions:
        found.append(read_vqa(folder, split))
    if verbose:
        print(*(data.report for data in found), sep="\n")
    shown = {sample.image_id for sample in found[0].samples}
    return [sample for data in found for sample in data.samples if sample.image_id in shown]


def read_captions_data(options: CaptionOptions | CLIPOptions, *, questions: bool) -> RunData:
    """Read every split the run needs, with its questions if they are wanted; draw the built-in data set first if no
    `--data` is given."""
    folder = options.data or built_in(options)
    check_captions(folder, options.splits)
    if questions:
        check_splits(folder, options.splits)
    read = partial(read_texts, folder, seed=options.seed, questions=questions)
    train = read(options.train_split, max_images=options.max_images, verbose=True)
    samples = with_scored(train, (options.val_split, options.test_split), read, options)
    names = {"val": options.train_split if options.val_split == "auto" else options.val_split}
    names |= {"test": options.test_split, "holdout": "holdout"}
    files = {name: scenes_file(folder, split) for name, split in names.items()}
    if files["holdout"].is_file():
        samples["holdout"] = read("holdout", questions=False)
    scenes = {name: read_scenes(path) for name, path in files.items() if path.is_file()}
    return RunData(samples, family_of(folder), scenes)


# ------------------------------------------------------------------------------------------------ figures


def by_image(samples: Sequence[VQASample], answers: Mapping[int | str, Answer]) -> dict[int | str, str]:
    """{image_id: caption} of the samples that have one."""
    return {s.image_id: answers[s.question_id].text for s in samples if s.question_id in answers}


def quality(captions: Mapping[int | str, str], samples: Sequence[VQASample], scenes: Scenes | None) -> dict:
    """Object figures where the scenes are known, and BLEU; `captions` by image id."""
    references = {s.image_id: s.answers for s in samples}
    bleu, signature = corpus_bleu(list(captions.values()), [references[image_id] for image_id in captions])
    figures = score_objects(captions, scenes) if scenes is not None else {}
    return figures | {"bleu": bleu, "bleu_signature": signature}


def accuracy_of(figures: Mapping[str, Any]) -> float:
    """The number that picks the best checkpoint: the harmonic mean of object precision and recall, or without scenes
    BLEU as a share."""
    if "object_recall" not in figures:
        return figures["bleu"] / 100
    precision, recall = figures["object_precision"] or 0.0, figures["object_recall"]
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def other_references(samples: Sequence[VQASample]) -> dict[int | str, str]:
    """A blind baseline, by image id: each image gets a reference of another image."""
    swap = other_images(len(samples))
    return {sample.image_id: samples[int(i)].answers[0] for sample, i in zip(samples, swap, strict=True)}


def report(
    samples: Sequence[VQASample], scenes: Scenes | None, say: Callable[..., Answers]
) -> tuple[dict[str, Any], Answers]:
    """(all figures of these samples, one an image, with blind baselines; the captions by question id).

    `say(shuffled=..., progress=...)` writes the captions, of other images if `shuffled`.
    """
    said = say(shuffled=False, progress="captions")
    shuffled = by_image(samples, say(shuffled=True, progress="shuffled images"))
    figures = quality(by_image(samples, said), samples, scenes)
    baselines = {
        "shuffled_images": quality(shuffled, samples, scenes),
        "other_references": quality(other_references(samples), samples, scenes),
    }
    figures = {"accuracy": accuracy_of(figures), **figures, **writing_figures(said, "caption"), "baselines": baselines}
    return figures, said


# ------------------------------------------------------------------------------------------------ pictures


def caption_cards(
    samples: Sequence[VQASample], answers: Mapping[int | str, Answer], scenes: Scenes | None
) -> list[str]:
    """A card for each sample: its image, the model's caption, and the references below it."""
    cards = []
    for sample in samples:
        said, verdict, note = answers[sample.question_id], "", ""
        if scenes is not None:
            named, there = objects_named(said.text), objects_of(scenes[sample.image_id])
            verdict = "right" if named == there else "partly" if named & there else "wrong"
            note = f"{(named & there).total()} of {there.total()} objects, {(named - there).total()} that are not there"
        people = "<br>".join(escape(reference) for reference in sample.answers)
        cards.append(card(load_image(sample.image_path, upright=sample.upright), "", said.text, verdict, note, people))
    return cards


def draw_results(path: Path, title: str, samples: Sequence[VQASample], answers: Mapping[int | str, Answer]) -> None:
    """The results table as a picture: image, caption, a reference. Prints which characters have no font."""
    rows: list[list[str | np.ndarray]] = []
    for sample in samples:
        image = load_image(sample.image_path, upright=sample.upright)
        image.thumbnail((128, 128))
        said = answers[sample.question_id].text or "(nothing)"
        rows.append([np.asarray(image), said, sample.answers[0]])
    missing = draw_table(path, title, ("image", "the model's caption", "one of the references"), rows, (1.1, 3.7, 3.7))
    if missing:
        shown = missing[:20] + ("..." if len(missing) > 20 else "")
        print(
            f"note: no installed font has {len(missing)} of the characters in {path} ({shown}); it shows their codes "
            "instead. A font such as Noto Sans CJK has them"
        )


def in_words(figures: Mapping[str, Any]) -> list[str]:
    """The most important figures, in words."""
    names = [name for name in ("object_precision", "object_recall", "exact_share") if figures.get(name) is not None]
    return [*(f"{name.replace('_', ' ')} {figures[name]:.3f}" for name in names), f"BLEU {figures['bleu']:.1f}"]


def show(
    folder: Path,
    figures: Mapping[str, Any],
    samples: Sequence[VQASample],
    scenes: Scenes | None,
    said: Mapping[int | str, Answer],
    number: int,
    answered: Sequence[tuple[str, list[str]]],
) -> None:
    """samples.html with `number` captions and the sections of `answered` questions, and results.png."""
    described = [sample for sample in samples if sample.question_id in said]
    some, what = spread(described, number), ", ".join(in_words(figures))
    lead = (
        "Images the model was not trained on, with its caption and the references below. Green: every object is "
        "named and nothing else; amber: some; red: none. Questions are coloured by how many annotators agree."
    )
    sections = [("captions", caption_cards(some, said, scenes)), *answered]
    write_page(folder / "samples.html", f"What the model says ({what})", lead, sections)
    draw_results(folder / "results.png", what, spread(some, TABLE_ROWS), said)
