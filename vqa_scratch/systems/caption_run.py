"""A finished run of the captioner: how it is laid out, opened, asked, scored and exported."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from vqa_scratch.data.batches import Encoder
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.text import Tokenizer, check_question
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.models.caption import CaptionConfig, CaptionModel
from vqa_scratch.models.resnet import FrozenBatchNorm
from vqa_scratch.run import load_weights, save_weights, write_run_config
from vqa_scratch.storage import write_json, write_text
from vqa_scratch.systems.captions import lengths, read_texts, report
from vqa_scratch.systems.options import CaptionOptions
from vqa_scratch.training.evaluation import Answer, answer_samples
from vqa_scratch.training.precision import Precision
from vqa_scratch.weights.files import write_safetensors

TOWERS = ("image.", "decoder.")
README = """\
# A captioner in two towers

- `image/`  {image}; `preprocessor_config.json` says how an image becomes pixels
- `decoder/`  GPT2LMHeadModel with cross-attention, with its tokenizer; `transformers` loads it
- `joint.safetensors`  what joins them: the projection of the map of features, and the table of its places
- `captioner.json`  the sizes of all of it

Run this in the folder to describe one image. A caption starts after the token {bos} and ends at the token {eos}; a
question that the model was trained to answer stands before {bos}.

```python
import json

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel

from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.models import CaptionConfig, CaptionModel

model = CaptionModel.from_config(CaptionConfig.from_json(json.load(open("captioner.json")))).eval()
{load}
model.load_state_dict(load_file("joint.safetensors"), strict=False)
decoder = GPT2LMHeadModel.from_pretrained("decoder").eval()
tokenizer = AutoTokenizer.from_pretrained("decoder")
pixels = ImageProcessor.from_pretrained("image")([Image.open("picture.png")])
with torch.no_grad():
    memory = model.encode_image(pixels)
    ids = torch.tensor([[{bos_id}]])
    for _ in range({most}):
        logits = decoder(ids, encoder_hidden_states=memory).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == {eos_id}:
            break
print(tokenizer.decode(ids[0, 1:], skip_special_tokens=True).strip())
```
"""
LOAD_TORCHVISION = """\
from vqa_scratch.models import ResNet

model.image = ResNet.from_pretrained("image/model.safetensors")"""
LOAD_OWN = 'model.image.load_state_dict(load_file("image/model.safetensors"))'


def caption_encoder(config: CaptionOptions, decoder: Tokenizer) -> Encoder:
    """No text tower: a question is a prompt of the decoder."""
    return Encoder(
        None,
        decoder,
        max_question_tokens=config.max_question_tokens,
        max_answer_tokens=config.max_caption_tokens,
        question_prompt=True,
    )


def save_parts(
    folder: Path, config: CaptionOptions, model: CaptionModel, encoder: Encoder, processor: ImageProcessor
) -> None:
    """Everything but the weights."""
    write_run_config(folder, config, model.config.to_json())
    encoder.decoder.save(folder / "decoder_tokenizer")
    processor.save_pretrained(folder)


@dataclass
class TrainedCaptioner:
    """A finished run, for the commands."""

    decodes: ClassVar[bool] = True

    folder: Path
    config: CaptionOptions
    model: CaptionModel
    precision: Precision
    encoder: Encoder
    processor: ImageProcessor

    def ask(
        self, image: Path, question: str | None, top: int | None, decoding: Mapping[str, Any] | None = None
    ) -> tuple[list[Answer], list[str]]:
        """A caption without a question, an answer with one; `decoding` as in `answer_questions`."""
        if top is not None:
            raise UserError(f"{self.folder} writes one text and ranks no list of them: leave out --top")
        if question is not None:
            self._needs_questions()
            question = check_question(question)
        said = self._say([VQASample(0, image, 0, question or "", "", "", (), "")], decoding=decoding)
        return [said[0]], self.encoder.notes_on(question or "")

    def answer(
        self, samples: Sequence[VQASample], limit: int | None, *, shuffled: bool = False, progress: str | None = None
    ) -> dict[int, Answer]:
        self._needs_questions()
        return self._say(samples, limit, shuffled=shuffled, progress=progress)

    def figures(self, answers: dict[int, Answer]) -> dict[str, float]:
        figures = lengths(answers)
        return {"eos_rate": figures["eos_rate"], "mean_answer_tokens": figures["mean_caption_tokens"]}

    def describe(self, data: Path, split: str, limit: int | None) -> dict[str, Any]:
        """Describe a split, or about its first `limit` images, and score it as the run's own report does."""
        texts = read_texts(data, split, seed=self.config.seed, told=True)
        samples = texts.to_describe[:limit]
        figures, _ = report(samples, texts.scenes, partial(self._say, samples))
        return {"data": str(data), "split": split, "images": len(samples)} | figures

    def _needs_questions(self) -> None:
        if not self.config.question_share:
            raise UserError(
                f"{self.folder} was trained to describe images alone; --question-share trains one that answers too"
            )

    def _say(self, samples: Sequence[VQASample], limit: int | None = None, **options: Any) -> dict[int, Answer]:
        """`options` are those of `answer_samples`."""
        return answer_samples(self.model, samples, self.encoder, self.processor, self.precision, limit=limit, **options)

    def export(self, folder: Path) -> list[str]:
        """Both towers and what joins them; the image tower under torchvision's names if it came from there."""
        state, image = self.model.state_dict(), folder / "image"
        image.mkdir(parents=True, exist_ok=True)
        released = isinstance(self.model.image.norm1, FrozenBatchNorm)
        if released:
            self.model.image.save_pretrained(image / "model.safetensors")
        else:
            save_weights(image / "model.safetensors", self.model.image)
        self.processor.save_pretrained(image)
        self.model.decoder.save_pretrained(folder / "decoder")
        self.encoder.decoder.save(folder / "decoder")
        joint = {name: t.detach().cpu().contiguous() for name, t in state.items() if not name.startswith(TOWERS)}
        write_safetensors(folder / "joint.safetensors", joint)
        write_json(folder / "captioner.json", self.model.config.to_json())
        first, *_, last = self.encoder.answer("x")
        kind = "a ResNet in torchvision's layout" if released else "a small ResNet with group norm, under our own names"
        name = self.encoder.decoder.backend.id_to_token
        page = README.format(
            image=kind, load=LOAD_TORCHVISION if released else LOAD_OWN, bos=f"`{name(first)}`", eos=f"`{name(last)}`",
            bos_id=first, eos_id=last, most=self.encoder.max_answer_tokens,
        )  # fmt: skip
        write_text(folder / "README.md", page)
        return [] if released else [f"the image tower has group norm, which no layout of others has: {image} is ours"]


def open_trained(
    folder: Path, values: dict[str, Any], config: CaptionOptions, precision: Precision
) -> TrainedCaptioner:
    """Raises UserError if there are no weights yet, or if they do not fit."""
    model = CaptionModel.from_config(CaptionConfig.from_json(values["model"]))
    load_weights(model, folder, precision)
    encoder = caption_encoder(config, Tokenizer.from_pretrained(folder / "decoder_tokenizer"))
    return TrainedCaptioner(folder, config, model, precision, encoder, ImageProcessor.from_pretrained(folder))
