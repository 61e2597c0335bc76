"""The pictures of a request: an unseen test scene, objects that somebody places, or an upload. No file is written."""

import io
import random
from dataclasses import asdict
from functools import cached_property
from typing import Any

from PIL import Image

from vqa_scratch.data.descriptions import MOST_OBJECTS, describe, read_scenes, scenes_file
from vqa_scratch.data.image_files import bytes_in, data_url, decode_image, load_image, wav_url
from vqa_scratch.data.placed import drawn, placed
from vqa_scratch.data.scenes import QuestionWriter, Scene, draw_scene, render
from vqa_scratch.data.shapes import ShapesSpec
from vqa_scratch.data.spoken import unseen_speech
from vqa_scratch.data.vqa_v2 import VQASample, read_vqa
from vqa_scratch.errors import UserError, note
from vqa_scratch.storage import typed

MOST_PIXELS, QUESTIONS, VOICES, LARGEST, MOST_IMAGES = 25_000_000, 8, 8, 448, 200
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # of uploads; others are rare, or decoded by programs outside Pillow
FIRST = 1 + 1_000_000 * list(ShapesSpec().splits()).index("test")  # the id of the first built-in test scene


class Pictures:
    """The test scenes of a run with these `options` (None: of a released model), with what it is `asked`, and every
    other picture it is shown."""

    def __init__(self, options: Any, asked: str) -> None:
        self.options, self.asked = options, asked
        self.seed = 0 if options is None else options.seed
        self.built_in = options is None or options.data is None  # drawn from the seed: no file is needed
        self.name = f"{self.seed}" if self.built_in else str(options.data)  # the same: the same scenes

    @cached_property
    def own(self) -> dict[str, tuple[Scene, list[VQASample]]]:
        """The first test images of the run's own data: what is drawn in each, if it is drawn, and its questions."""
        data, split = self.options.data, self.options.test_split
        found: dict[str, tuple[Scene, list[VQASample]]] = {}
        try:
            read = read_vqa(data, split, cache=self.options.cache, max_images=MOST_IMAGES)
            drawn_in = read_scenes(path) if (path := scenes_file(data, split)).is_file() else {}
        except UserError as error:
            note(f"there are no test scenes: {error}")
            return found
        for sample in read.samples:
            found.setdefault(str(sample.image_id), (drawn_in.get(sample.image_id, ()), []))[1].append(sample)
        return found

    @property
    def ids(self) -> list[str]:
        """Of all test scenes."""
        return list(map(str, range(FIRST, FIRST + ShapesSpec().test))) if self.built_in else list(self.own)

    def _draw(self, name: str) -> tuple[Scene, random.Random]:
        rng = random.Random(f"{self.seed}/test/{name}")  # as `scenes_of` does
        return draw_scene(rng), rng

    def of(self, picture: Any) -> Image.Image:
        """The picture of a request. Raises UserError if there is none."""
        types = {"scene": str | None, "objects": list | None, "data": str | None}
        scene, objects, data = typed("the picture", picture, types)
        if sum(given is not None for given in (scene, objects, data)) != 1:
            raise UserError("a picture has one of three: scene, objects or data")
        if data is not None:
            file = io.BytesIO(bytes_in(data, "image"))
            return decode_image(file, "the picture that was sent", most=MOST_PIXELS, formats=FORMATS)
        if objects is not None:
            return drawn(placed(objects))
        if scene not in self.ids:
            raise UserError(f"there is no test scene {scene!r}")
        if self.built_in:
            return render(*self._draw(scene))
        sample = self.own[scene][1][0]
        return load_image(sample.image_path, upright=sample.upright)

    def scenes(self, number: int, seed: int) -> list[dict[str, Any]]:
        """Test scenes with their questions, or of what hears utterances; other ones for another seed."""
        if self.asked == "sound":
            said = unseen_speech(VOICES * seed, VOICES, self.seed) if self.built_in else []
            return [{"id": s, "sound": wav_url(wav), "questions": [{"question": "", "answer": s}]} for s, wav in said]
        ids = self.ids
        start = number * seed % max(1, len(ids))
        return [self.scene(name) for name in (ids + ids)[start : start + min(number, len(ids))]]

    def scene(self, name: str) -> dict[str, Any]:
        """A test scene with its questions. Raises UserError if there is none."""
        image, rng = data_url(self.of({"scene": name}), LARGEST), random.Random(f"{self.seed}/{name}")
        if self.built_in:
            scene = self._draw(name)[0]
            asked = [(question.text, question.answer) for question in QuestionWriter(rng).write(scene, QUESTIONS)]
        else:
            scene, samples = self.own[name]
            asked = [(sample.question, sample.answer) for sample in samples[:QUESTIONS]]
        if self.asked != "question" and 0 < len(scene) <= MOST_OBJECTS:
            asked = [(text, "") if self.asked == "text" else ("", text) for text in describe(scene, rng)]
        questions = [{"question": question, "answer": answer} for question, answer in asked]
        return {"id": name, "image": image, "objects": [asdict(thing) for thing in scene], "questions": questions}
