"""A finished run of the single-stream system: how it is laid out, opened, asked, scored and exported."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vqa_scratch.data.answers import AnswerList
from vqa_scratch.data.classes import ClassQuestions
from vqa_scratch.data.groups import TextEncoder
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.text import Tokenizer, check_question
from vqa_scratch.data.vilt_images import images_for, read_processor
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.models.hf_config import labels_from_hf
from vqa_scratch.models.stem import ConvStem
from vqa_scratch.models.vilt import ViLT, ViLTClassifier, ViLTConfig
from vqa_scratch.run import load_weights, write_run_config
from vqa_scratch.storage import write_json, write_text
from vqa_scratch.systems.options import ViLTOptions
from vqa_scratch.training.classify import classify_questions
from vqa_scratch.training.evaluation import AT_ONCE, Answer, other_images
from vqa_scratch.training.precision import Precision
from vqa_scratch.weights.files import write_safetensors

README = """\
# A ViLT that chooses its answer from a list

`id2label` names the answers in the order of the logits; each has a probability of its own, sigmoid(logit). Run this in
the folder to ask about one image.

```python
{load}
tokenizer = AutoTokenizer.from_pretrained(".")
processor = ImageProcessor.from_pretrained(".")
pixels = processor([Image.open("picture.png")])
question = tokenizer("what color is the square?", return_tensors="pt")
with torch.no_grad():
    scores = answer(pixels, question["input_ids"], question["attention_mask"]).sigmoid()[0]
for score, place in zip(*scores.topk(3)):
    print(f"{{labels[int(place)]:20s}} {{score:.3f}}")
```
"""
LOAD = """\
import torch
from PIL import Image
from transformers import AutoTokenizer, ViltForQuestionAnswering

from vqa_scratch.data.images import ImageProcessor

model = ViltForQuestionAnswering.from_pretrained(".").eval()
labels = model.config.id2label


def answer(pixels, ids, mask):
    return model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits

"""
LOAD_OWN = """\
import json

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer

from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.models import ViLTClassifier, ViLTConfig
from vqa_scratch.systems.vilt_run import build_vilt

# A convolutional stem has no place in the ViLT layout of transformers: weights and sizes go by names of vqa_scratch.
sizes = json.load(open("model.json"))
labels = list(sizes["id2label"].values())
answer = ViLTClassifier(build_vilt(ViLTConfig.from_hf(sizes), sizes["stem"]), labels).eval()
answer.load_state_dict(load_file("model.safetensors"))"""


def build_vilt(config: ViLTConfig, stem: str) -> ViLT:
    """Random weights; `stem` is conv or linear."""
    return ViLT(config, ConvStem(config.channels, config.dim, config.patch_size) if stem == "conv" else None)


def save_parts(
    folder: Path, config: ViLTOptions, model: ViLTClassifier, encoder: TextEncoder, processor: ImageProcessor
) -> None:
    """Everything but the weights; config.json holds the labels as id2label."""
    stem = "conv" if isinstance(model.vilt.tower.patch_embed, ConvStem) else "linear"
    write_run_config(folder, config, model.to_hf() | {"stem": stem})
    encoder.text.save(folder / "text_tokenizer")
    processor.save_pretrained(folder)


@dataclass
class TrainedViLT:
    """A finished run, for the commands."""

    decodes: ClassVar[bool] = False

    folder: Path
    config: ViLTOptions
    model: ViLTClassifier
    encoder: TextEncoder
    processor: ImageProcessor
    precision: Precision

    def _answers(
        self, samples: Sequence[VQASample], limit: int | None, shuffled: bool, progress: str | None, top: int
    ) -> dict[int, list[Answer]]:
        questions = ClassQuestions(samples, self.encoder, AnswerList(self.model.labels))
        images = images_for(questions.image_paths, self.processor)
        batches = questions.in_order(limit or len(samples), AT_ONCE)
        swap = other_images(len(images.paths)) if shuffled else None
        return classify_questions(
            self.model, questions, images, self.precision, batches, image_map=swap, progress=progress, top=top
        )

    def ask(self, image: Path, question: str | None, top: int | None) -> tuple[list[Answer], list[str]]:
        if question is None:
            raise UserError(f"{self.folder} answers questions: give it --question")
        if top is not None and top > len(self.model.labels):
            raise UserError(f"--top {top} is more than the {len(self.model.labels):,} answers that {self.folder} knows")
        question = check_question(question)
        sample = VQASample(0, image, 0, question, "", "", (), "")
        return self._answers([sample], None, False, None, top or 1)[0], self.encoder.notes_on(question)

    def answer(
        self, samples: Sequence[VQASample], limit: int | None, *, shuffled: bool = False, progress: str | None = None
    ) -> dict[int, Answer]:
        return {number: best for number, (best,) in self._answers(samples, limit, shuffled, progress, 1).items()}

    def figures(self, answers: dict[int, Answer]) -> dict[str, float]:
        return {}

    def export(self, folder: Path) -> list[str]:
        """The layout of ViltForQuestionAnswering; a convolutional stem has no place in it and keeps our names."""
        self.encoder.text.save(folder)
        self.processor.save_pretrained(folder)
        own = isinstance(self.model.vilt.tower.patch_embed, ConvStem)
        write_text(folder / "README.md", README.format(load=LOAD_OWN if own else LOAD))
        if not own:
            self.model.save_pretrained(folder)
            return []
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.model.state_dict().items()}
        write_safetensors(folder / "model.safetensors", tensors)
        write_json(folder / "model.json", self.model.to_hf() | {"stem": "conv"})
        return [
            f"the model has a convolutional stem, which the ViLT layout has no place for: {folder} holds it under "
            "names of our own, with its sizes in model.json (--stem linear trains one that fits)"
        ]


def open_trained(folder: Path, values: dict[str, Any], config: ViLTOptions, precision: Precision) -> TrainedViLT:
    sizes = values["model"]
    labels = labels_from_hf(sizes, len(sizes["id2label"]), str(folder / "config.json"))
    model = ViLTClassifier(build_vilt(ViLTConfig.from_hf(sizes), sizes["stem"]), labels)
    load_weights(model, folder, precision)
    text = Tokenizer.from_pretrained(folder / "text_tokenizer")
    encoder = TextEncoder(text, max_question_tokens=config.max_question_tokens)
    return TrainedViLT(folder, config, model, encoder, read_processor(folder), precision)
