"""Writes the built-in data set: drawn scenes with questions (`data/scenes.py`) as VQA v2 files.

Three colour-shape pairs are neither drawn nor asked about in `train`, `val` and `test`; the `holdout` split asks about
nothing else (a compositional hold-out as in CLEVR-CoGenT, Johnson et al. 2017). The same seed gives the same scenes,
questions and pixels.
"""

import hashlib
import json
import os
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from vqa_scratch.data import scenes as scenes_module
from vqa_scratch.data.scenes import FAMILIES, Question, QuestionWriter, Scene, annotate, draw_scene, render
from vqa_scratch.data.vqa_files import VQASample, image_file_name
from vqa_scratch.data.vqa_write import write_vqa
from vqa_scratch.errors import UserError
from vqa_scratch.storage import unfinished


@dataclass(frozen=True)
class ShapesSpec:
    """Sizes of the splits in scenes, and the seed."""

    train: int = 12_000
    val: int = 500
    test: int = 1_000
    holdout: int = 500
    questions_per_scene: int = 16
    seed: int = 0

    def splits(self) -> dict[str, int]:
        return {"train": self.train, "val": self.val, "test": self.test, "holdout": self.holdout}


def scenes_of(spec: ShapesSpec, split: str) -> Iterator[tuple[int, Scene, list[Question], random.Random]]:
    """(image_id, scene, questions, rng of this scene) for one split; no two splits share an image id."""
    held_out = split == "holdout"
    writer = QuestionWriter(random.Random(f"{spec.seed}/{split}/questions"), held_out=held_out)
    first = 1 + 1_000_000 * list(spec.splits()).index(split)
    for image_id in range(first, first + spec.splits()[split]):
        rng = random.Random(f"{spec.seed}/{split}/{image_id}")
        scene = draw_scene(rng, held_out=held_out)
        yield image_id, scene, writer.write(scene, spec.questions_per_scene), rng


def complementary_pairs(samples: list[VQASample]) -> list[tuple[int | str, int | str]]:
    """Pairs of question ids with the same question, different scenes and different answers; each id at most once."""
    waiting: dict[str, dict[str, list[int | str]]] = defaultdict(lambda: defaultdict(list))
    pairs = []
    for sample in samples:
        others = waiting[sample.question]
        partner = next((a for a, ids in others.items() if a != sample.answer and ids), None)
        if partner is None:
            others[sample.answer].append(sample.question_id)
        else:
            pairs.append((others[partner].pop(), sample.question_id))
    return pairs


def write_split(folder: Path, spec: ShapesSpec, split: str, bar: tqdm) -> None:
    """One split: official question, annotation and pair files, PNG images, and `scenes_<split>.json`."""
    samples, scenes = [], {}
    (folder / image_file_name(split, 0)).parent.mkdir(parents=True, exist_ok=True)
    for image_id, scene, questions, rng in scenes_of(spec, split):
        path = folder / image_file_name(split, image_id, ".png")
        render(scene, rng).save(path, compress_level=1)
        scenes[image_id] = {
            "objects": [
                {"shape": o.shape, "color": o.color, "size": o.size, "box": o.box, "center": (o.x, o.y)} for o in scene
            ],
            "about": {image_id * 1000 + k: question.about for k, question in enumerate(questions)},
        }
        for k, question in enumerate(questions):
            question_type, answer_type = FAMILIES[question.family]
            place, answers = (image_id, path, image_id * 1000 + k), annotate(rng, question)
            samples.append(VQASample(*place, question.text, question_type, answer_type, answers, question.answer))
        bar.update()
    about = "Drawn shapes with questions and ten simulated annotators"
    write_vqa(folder, split, samples, description=about, license_name="MIT", pairs=complementary_pairs(samples))
    (folder / f"scenes_{split}.json").write_text(json.dumps(scenes, separators=(",", ":")))


def ensure_shapes(cache: Path, spec: ShapesSpec, progress: bool = True) -> Path:
    """The folder of the data set below `cache`; it is written first if it is missing.

    Its name holds a hash of `spec` and of the generator's source, so a changed generator never uses old files. It is
    written under another name and then renamed, so that an interrupted run leaves nothing half done. Raises UserError
    if `cache` is not writable.
    """
    source = hashlib.blake2b(digest_size=8)
    for module in (__file__, scenes_module.__file__):
        source.update(Path(module).read_bytes())
    source.update(json.dumps(asdict(spec), sort_keys=True).encode())
    folder = cache / f"shapes-{source.hexdigest()}"
    if folder.is_dir():
        return folder
    total = sum(spec.splits().values())
    try:
        with unfinished(folder, folder=True, tidy=True) as own:
            with tqdm(total=total, desc="drawing scenes", unit="scene", disable=not progress) as bar:
                for split in spec.splits():
                    write_split(own, spec, split, bar)
            if not folder.is_dir():  # another process may have been faster
                os.replace(own, folder)
    except OSError as error:
        raise UserError(f"cannot write the built-in data set below {cache}: {error.strerror}") from error
    return folder
