"""The built-in data set: every answer derived again from the scene files, nothing to guess, nothing held out shown."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqa_scratch.data.scenes import COLORS, FAMILIES, FAMILY_OF_TYPE, HELD_OUT, SHAPES, SIZES, annotate
from vqa_scratch.data.shapes import ShapesSpec, ensure_shapes, scenes_of
from vqa_scratch.data.vqa_files import pairs_name, subtype_of
from vqa_scratch.data.vqa_v2 import VQASample, read_vqa
from vqa_scratch.errors import UserError
from vqa_scratch.metrics import accuracy_by
from vqa_scratch.systems.scoring import QuestionOnly, TypePrior, blind

SPEC = ShapesSpec(train=60, val=20, test=20, holdout=40, questions_per_scene=16)
SPLITS = tuple(SPEC.splits())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return ensure_shapes(tmp_path_factory.mktemp("shapes"), SPEC, progress=False)


@pytest.fixture(scope="module")
def samples(folder) -> dict[str, list[VQASample]]:
    return {split: read_vqa(folder, split).samples for split in SPLITS}


@pytest.fixture(scope="module")
def scenes(folder) -> dict[int, list[dict]]:
    """The objects of each image, by its id."""
    files = [json.loads((folder / f"scenes_{split}.json").read_text()) for split in SPLITS]
    return {int(image_id): scene["objects"] for file in files for image_id, scene in file.items()}


def in_memory(spec: ShapesSpec, split: str) -> list[VQASample]:
    """The questions and annotations of a split without its images."""
    result = []
    for image_id, _, questions, rng in scenes_of(spec, split):
        for k, question in enumerate(questions):
            types = FAMILIES[question.family]
            answers = annotate(rng, question)
            sample = (image_id, Path(), image_id * 1000 + k, question.text, *types, answers, question.answer)
            result.append(VQASample(*sample))
    return result


# ------------------------------------------------------------------------------------------------ the same again


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    """In another process, whose hash seed is another one too."""
    program = (
        "import sys, pathlib; from vqa_scratch.data.shapes import *; "
        f"ensure_shapes(pathlib.Path(sys.argv[1]), {SPEC!r}, progress=False)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env=environment, cwd=root)
    again = contents(tmp_path / folder.name)
    assert again == contents(folder) and len(again) == sum(SPEC.splits().values()) + 4 * len(SPLITS)


def test_another_seed_gives_other_scenes(tmp_path):
    one, other = ([scene for _, scene, _, _ in scenes_of(ShapesSpec(train=5, seed=seed), "train")] for seed in (0, 1))
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_it_is_written_once(folder):
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert ensure_shapes(folder.parent, SPEC, progress=False) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name], "nothing unfinished is left"


def test_an_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("vqa_scratch.data.shapes.write_vqa", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_shapes(tmp_path, ShapesSpec(1, 1, 1, 1), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the built-in data set below .*file.cache"):
        ensure_shapes(tmp_path / "file" / "cache", SPEC, progress=False)


# ------------------------------------------------------------------------------------------------ true answers


def things(scene: list[dict], words: str) -> list[dict]:
    """The objects that a description such as "small red squares" fits."""
    kept = scene
    for word in words.split():
        word = word.removesuffix("s")
        if word == "object":
            continue
        (key,) = (k for k, known in (("size", SIZES), ("color", COLORS), ("shape", SHAPES)) if word in known)
        kept = [thing for thing in kept if thing[key] == word]
    return kept


def the(scene: list[dict], words: str) -> dict:
    (only,) = things(scene, words)  # "the" means there is exactly one
    return only


def derived(question: str, scene: list[dict]) -> str:
    """The answer worked out from the words of the question and the objects of the scene alone."""
    if match := re.fullmatch(r"what (color|shape) is the (.+)\?", question):
        return the(scene, match[2])[match[1]]
    if match := re.fullmatch(r"is there a (.+)\?", question):
        return "yes" if things(scene, match[1]) else "no"
    if match := re.fullmatch(r"how many (.+) are there\?", question):
        return str(len(things(scene, match[1])))
    if match := re.fullmatch(r"are there more (.+) than (.+)\?", question):
        return "yes" if len(things(scene, match[1])) > len(things(scene, match[2])) else "no"
    if match := re.fullmatch(r"is the (.+) (left of|right of|above|below) the (.+)\?", question):
        one, other = the(scene, match[1]), the(scene, match[3])
        axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[match[2]]
        offset = sign * (one["center"][axis] - other["center"][axis])
        assert abs(offset) >= 6, "too close to tell"
        return "yes" if offset > 0 else "no"
    if match := re.fullmatch(r"what is closest to the (.+)\?", question):
        here = the(scene, match[1])
        away = {i: np.hypot(*np.subtract(o["center"], here["center"])) for i, o in enumerate(scene) if o is not here}
        nearest, *rest = sorted(away, key=away.get)
        assert not rest or away[rest[0]] - away[nearest] >= 5, "too close to tell"
        return f"{scene[nearest]['color']} {scene[nearest]['shape']}"
    if match := re.fullmatch(r"where is the (.+)\?", question):
        x, y = the(scene, match[1])["center"]
        assert min(abs(x - 32), abs(y - 32)) >= min(SIZES.values()), "on the line"
        return f"{'top' if y < 32 else 'bottom'} {'left' if x < 32 else 'right'}"
    raise AssertionError(f"not a known form: {question}")


def test_every_answer_follows_from_the_scene(samples, scenes):
    """Each "the" has exactly one referent, and spatial questions have a margin that can be seen."""
    families = Counter()
    for split in SPLITS:
        for sample in samples[split]:
            assert derived(sample.question, scenes[sample.image_id]) == sample.answer, sample
            families[FAMILY_OF_TYPE[sample.question_type]] += 1
    assert set(families) == set(FAMILIES) and len(FAMILIES) >= 7 and min(families.values()) > 50


def test_what_is_asked_is_in_the_picture(folder, scenes, samples):
    """Every PNG decodes to 64 x 64 RGB pixels; the centre of each object has about its colour, corners do not."""
    paths = {s.image_id: s.image_path for split in SPLITS for s in samples[split]}
    assert len(paths) == sum(SPEC.splits().values())
    for image_id, path in paths.items():
        with Image.open(path) as image:
            pixels = np.asarray(image)
        assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
        for thing in scenes[image_id]:
            x, y = thing["center"]
            assert np.abs(pixels[y, x].astype(int) - COLORS[thing["color"]]).max() <= 15
            left, top, right, bottom = thing["box"]
            assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64
            corner = pixels[top, left].astype(int)
            if thing["shape"] == "square":
                assert np.abs(pixels[top + 1, left + 1].astype(int) - COLORS[thing["color"]]).max() <= 15
            else:
                assert corner.min() >= 200, "the upper left corner of a circle's or triangle's box is background"


def test_sizes_and_numbers(scenes):
    objects = [thing for scene in scenes.values() for thing in scene]
    assert {len(scene) for scene in scenes.values()} == {2, 3, 4, 5}
    assert {o["shape"] for o in objects} == set(SHAPES) and len(SHAPES) >= 3
    assert {o["color"] for o in objects} == set(COLORS) and len(COLORS) >= 6
    assert {o["size"] for o in objects} == {"small", "large"}
    for scene in scenes.values():
        boxes = [o["box"] for o in scene]
        for i, (left, top, right, bottom) in enumerate(boxes):
            for other in boxes[i + 1 :]:
                assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top, "overlap"


# ------------------------------------------------------------------------------------------------ nothing to guess


@pytest.fixture(scope="module")
def many() -> tuple[list[VQASample], list[VQASample]]:
    """Enough questions for shares that hold to a few hundredths: about 200 questions a family to score."""
    spec = ShapesSpec(train=1200, test=300)
    return in_memory(spec, "train"), in_memory(spec, "test")


def test_an_oracle_is_right_under_the_annotators_noise(many, samples):
    for split in (many[1], samples["val"], samples["holdout"]):
        truth = {s.question_id: s.answer for s in split}
        by_family = accuracy_by(split, truth, "question_type")
        assert by_family.overall.accuracy >= 0.99
        assert min(group.accuracy for group in by_family.groups.values()) >= 0.97


def test_no_family_can_be_guessed(many):
    """From the words of the question and its type's prior, learned on the training scenes."""
    train, test = many
    for predictor in (QuestionOnly(train), TypePrior(train)):
        guesses = {s.question_id: predictor(s) for s in test}
        families = accuracy_by(test, guesses, "question_type").groups
        assert len(families) == len(FAMILIES)
        assert {kind: score.accuracy for kind, score in families.items() if score.accuracy > 0.6} == {}
        assert blind(test, predictor) <= 0.45


def test_annotators_disagree_sometimes(many):
    """Ten answers each; about seven in ten questions unanimous; synonyms and errors among the others."""
    unanimous = [len(set(s.answers)) == 1 for s in many[0]]
    assert all(len(s.answers) == 10 for s in many[0])
    assert 0.65 < sum(unanimous) / len(unanimous) < 0.8
    said = {answer for s in many[0] for answer in s.answers}
    assert {"two", "none", "grey", "yes."} <= said


def test_answers_of_several_words_occur(samples):
    answers = Counter(len(s.answer.split()) for s in samples["train"])
    assert answers[2] > 50 and set(answers) == {1, 2}


# ------------------------------------------------------------------------------------------------ split apart


def names(text: str) -> set[tuple[str, str]]:
    """The colour-shape pairs that a text names."""
    words = [word.strip("?").removesuffix("s") for word in text.split()]
    return {(a, b) for a, b in zip(words, words[1:], strict=False) if a in COLORS and b in SHAPES}


def test_held_out_pairs_are_neither_drawn_nor_asked_about(samples, scenes):
    for split in SPLITS[:3]:
        for sample in samples[split]:
            assert not {(o["color"], o["shape"]) for o in scenes[sample.image_id]} & HELD_OUT
            assert not names(f"{sample.question} {sample.answer}") & HELD_OUT


def test_the_hold_out_is_about_nothing_else(folder, samples, scenes):
    """A held-out pair is in every scene, and each question names it, points at it or has it as its answer."""
    about = json.loads((folder / "scenes_holdout.json").read_text())
    for sample in samples["holdout"]:
        pairs = [(o["color"], o["shape"]) for o in scenes[sample.image_id]]
        assert sum(pair in HELD_OUT for pair in pairs) == 1
        pointed = {pairs[i] for i in about[str(sample.image_id)]["about"][str(sample.question_id)]}
        assert (names(f"{sample.question} {sample.answer}") | pointed) & HELD_OUT, sample.question


def test_splits_share_no_image(samples):
    ids = [{s.image_id for s in samples[split]} for split in SPLITS]
    assert len(set.union(*ids)) == sum(map(len, ids)) == sum(SPEC.splits().values())


def test_complementary_pairs(folder, samples):
    """The same question about two images, with different answers; no question in two pairs."""
    for split in SPLITS:
        by_id = {s.question_id: s for s in samples[split]}
        pairs = json.loads((folder / pairs_name(subtype_of(split))).read_text())
        assert len(pairs) > 5 and len({i for pair in pairs for i in pair}) == 2 * len(pairs)
        for one, other in ((by_id[a], by_id[b]) for a, b in pairs):
            assert one.question == other.question and one.answer != other.answer and one.image_id != other.image_id
