"""Answers questions without training: a released BLIP-2, LLaVA, Fuyu or Idefics with its tokenizer and preprocessing.

Each class writes the prompt that its family was trained with or is asked with; the answer is the likeliest token at
each step, up to an end token of the checkpoint. Of BLIP-2 the prompt is that of Li et al. 2023 (arXiv 2301.12597,
section 4.1), of LLaVA the checkpoint's chat template, else version 1.5's, of Fuyu the one on the page of its release,
of Idefics the one in the documentation of `transformers`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from vqa_scratch.data.answers import Answer
from vqa_scratch.data.chat_template import ask_in_chat, read_template
from vqa_scratch.data.fuyu_images import FuyuImageProcessor
from vqa_scratch.data.image_files import load_image
from vqa_scratch.data.images import JOINT_CONFIG_NAME, ImageProcessor
from vqa_scratch.data.text import Tokenizer, check_question
from vqa_scratch.errors import UserError
from vqa_scratch.generate import Conditioning, GenerationOptions, generate
from vqa_scratch.generation_options import end_ids
from vqa_scratch.language_model import refuse_list
from vqa_scratch.models import Blip2, Fuyu, Idefics, Llava
from vqa_scratch.models.image_text import JoinedModel
from vqa_scratch.storage import read_object, typed
from vqa_scratch.study.opened import Opened, run_name, special_tokens, token_label, written
from vqa_scratch.study.subject import Blip2Subject, IdeficsSubject, PlacedSubject, fuyu_subject, llava_subject
from vqa_scratch.systems.writing import answers_of
from vqa_scratch.training.precision import DTYPES, formats
from vqa_scratch.weights.files import CONFIG, read_config, resolve_folder
from vqa_scratch.weights.hub import locate

MAX_ANSWER_TOKENS = 20
INSTRUCTION = "Instruction: Provide an answer to the question. Use the image to answer."  # of an Idefics


@dataclass
class ZeroShot(ABC):
    """A released model, ready to answer: in eval mode on `device`, with its tokenizer and its image preprocessing."""

    writes: ClassVar[bool] = True
    example: ClassVar[str] = "what is in the picture?"
    asked: ClassVar[str] = "question"  # what `subject` takes beside the image
    model_class: ClassVar[type[JoinedModel]]
    processor_class: ClassVar[type[ImageProcessor]] = ImageProcessor

    source: str
    model: JoinedModel
    tokenizer: Tokenizer
    processor: ImageProcessor
    device: torch.device

    @abstractmethod
    def check(self) -> None:
        """Raise UserError if the parts of the checkpoint do not fit each other."""

    @abstractmethod
    def prompt(self, question: str) -> list[int]:
        """The tokens of the prompt without those of the image, or with one for all of them."""

    @abstractmethod
    def read(self, prompt: list[int], pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Ids (1, T) of a prompt with its image (1, 3, H, W), and what else `generate` needs of them."""

    @property
    def image_token(self) -> int | None:
        """The token of an image's places."""
        return self.model.config.image_token

    @property
    def own_options(self) -> dict[str, Any]:
        """The model's own fields of `GenerationOptions`: how long an answer is, what ends it, what it never holds."""
        end = self.model.language.config.eos_id
        return {"max_new_tokens": MAX_ANSWER_TOKENS, "eos_id": self.tokenizer.eos_id if end is None else end}

    @abstractmethod
    def studied(self, prompt: list[int], pixels: Tensor) -> Blip2Subject | PlacedSubject | IdeficsSubject:
        """What study looks at: the model with a prompt and its image."""

    def prepared(self, image: Image.Image, question: str | None) -> tuple[list[int], Tensor]:
        """The prompt and the image (1, 3, H, W). Raises UserError for a missing or an empty question."""
        if question is None:
            raise UserError(f"{self.source} answers questions: give it --question")
        prompt = self.prompt(check_question(question))
        return prompt, self.processor(image)[None].to(self.device)

    def check_room(self, prompt: list[int], places: int, new_tokens: int) -> None:
        """Raise UserError if a prompt with `places` for an image leaves no room for `new_tokens`."""
        room = self.model.language.config.max_positions - places - new_tokens
        if room < 1:
            raise UserError(f"max_new_tokens {new_tokens} is too much: it leaves no position for the question")
        if len(prompt) > room:
            raise UserError(f"the question is too long: its prompt has {len(prompt)} tokens, and {room} have room")

    def words(self, text: str) -> list[int]:
        """The tokens of a text without special ones. Raises UserError if it holds the token of an image's places."""
        ids, place = self.tokenizer.encode(text, add_special_tokens=False), self.image_token
        if place is not None and place in ids:
            token = self.tokenizer.backend.id_to_token(place)
            raise UserError(f"the question holds {token}, which stands for the image; ask without it")
        return ids

    @torch.no_grad()
    def ask(
        self, image: str | Path, question: str | None, top: int | None = None, decoding: Mapping[str, Any] | None = None
    ) -> tuple[list[Answer], list[str]]:
        """([the answer], [notes for the user, always none]) to one question about one image file.

        `decoding` are fields of `GenerationOptions`; without it decoding is greedy. Raises UserError on an unreadable
        image, a missing, empty or too long question, contradicting options, and a `top`, since there is no list of
        answers to rank.
        """
        refuse_list(self.source, top)
        options = GenerationOptions(**self.own_options | dict(decoding or {}))
        prompt, pixels = self.prepared(load_image(image), question)
        ids, given = self.read(prompt, pixels)
        self.check_room(prompt, ids.shape[1] - len(prompt), options.max_new_tokens)
        return answers_of(generate(self.model.language, ids, **given, options=options), self.tokenizer, options), []

    @torch.no_grad()
    def subject(self, image: Image.Image, question: str | None) -> Opened:
        """One question about one image, for study; UserError as in `ask`. Shown are the pixels that reach the model."""
        prompt, pixels = self.prepared(image, question)
        subject = self.studied(prompt, pixels)
        self.check_room(prompt, subject.prefix + len(subject.prompt) - len(prompt), MAX_ANSWER_TOKENS)
        subject.decide_by(self.own_options)
        shown = Image.fromarray(self.processor.to_uint8(image))
        answer = written(self.tokenizer, subject.prompt)
        return Opened(run_name(Path(self.source)), subject, (question or "").strip(), shown, **answer)

    def labelled(self, ids: list[int]) -> tuple[list[int], list[str], tuple[int, ...]]:
        """A prompt with the places of its image, for study: ids, their labels, which are separators.

        Raises UserError if it ends with the image.
        """
        if ids[-1] == self.image_token:
            raise UserError(f"the prompt of {self.source} ends with its image; study needs a word that reads it")
        return ids, [token_label(self.tokenizer, index) for index in ids], special_tokens(self.tokenizer, ids)


class AskedBlip2(ZeroShot):
    """The image, the start token, and the question in the words of the paper."""

    model_class = Blip2
    model: Blip2

    def check(self) -> None:
        sizes = self.model.config
        if sizes.language.bos_id >= sizes.language.vocab_size:
            raise UserError(f"{self.source} has a start token beyond its vocabulary")
        check_tower(self)
        joint = resolve_folder(self.source) / JOINT_CONFIG_NAME
        places = read_object(joint).get("num_query_tokens") if joint.is_file() else None  # absent in older files
        if places not in (None, sizes.queries):
            raise UserError(f"{joint} gives an image {places} tokens, the model of {self.source} {sizes.queries}")

    def prompt(self, question: str) -> list[int]:
        return [self.model.config.language.bos_id, *self.words(f"Question: {question} Answer:")]

    def read(self, prompt: list[int], pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        image = self.model.encode_image(pixels)
        ids = torch.tensor([prompt[:1] * image.shape[1] + prompt], device=self.device)
        words = self.model.language.embed(ids[:, image.shape[1] :])
        return ids, {"embeddings": torch.cat([image, words], 1)}

    def studied(self, prompt: list[int], pixels: Tensor) -> Blip2Subject:
        return Blip2Subject(self.model, pixels, prompt, MAX_ANSWER_TOKENS)


class AskedLlava(ZeroShot):
    """The checkpoint's chat template, or the prompt of version 1.5; the image is where they put its token."""

    model_class = Llava
    model: Llava

    def check(self) -> None:
        check_tower(self)
        self.template, place = read_template(self.source), self.model.config.image_token
        self.place = self.tokenizer.backend.id_to_token(place)
        if self.place is None:
            raise UserError(f"{self.source} gives an image the token {place}, which its tokenizer does not have")
        self.prompt(self.example)

    def prompt(self, question: str) -> list[int]:
        self.words(question)
        text, special = f"USER: {self.place}\n{question} ASSISTANT:", self.tokenizer.special
        if self.template is not None:
            text = ask_in_chat(self.template, question, special)
        starts = "bos" in special and text.startswith(special["bos"])  # some templates write the start token
        ids = self.tokenizer.encode(text, add_special_tokens=not starts)
        if (places := ids.count(self.model.config.image_token)) != 1:
            raise UserError(f"the prompt of {self.source} has {self.place} {places} times; it must hold one image")
        return ids

    def read(self, prompt: list[int], pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        image, place = self.model.encode_image(pixels), prompt.index(self.model.config.image_token)
        places = prompt[place : place + 1] * image.shape[1]
        ids = torch.tensor([prompt[:place] + places + prompt[place + 1 :]], device=self.device)
        return ids, {"embeddings": self.model.place(ids, image)}

    def studied(self, prompt: list[int], pixels: Tensor) -> PlacedSubject:
        ids = self.read(prompt, pixels)[0][0].tolist()
        return llava_subject(self.model, pixels, *self.labelled(ids), MAX_ANSWER_TOKENS)


class AskedFuyu(ZeroShot):
    """The rows of the image, the start token, the question on a line, and the token that begins an answer."""

    model_class, processor_class = Fuyu, FuyuImageProcessor
    model: Fuyu
    processor: FuyuImageProcessor

    def check(self) -> None:
        sizes = self.model.config
        if (sizes.patch_size, sizes.channels) != (self.processor.patch_size, 3):
            cut = f"{self.processor.patch_size} x {self.processor.patch_size} x 3"
            wanted = f"{sizes.patch_size} x {sizes.patch_size} x {sizes.channels}"
            raise UserError(f"the images of {self.source} are cut into patches of {cut}, its model reads {wanted}")
        numbers = {name: self.tokenizer.backend.token_to_id(name) for name in ("|NEWLINE|", "<s>", "<0x04>")}
        if missing := [name for name, number in numbers.items() if number is None]:
            raise UserError(f"the tokenizer of {self.source} has no {', '.join(missing)}, as that of a Fuyu has")
        self.newline, self.start, self.answer = (number for number in numbers.values() if number is not None)

    def prompt(self, question: str) -> list[int]:
        return [self.start, *self.words(f"{question}\n"), self.answer]

    def read(self, prompt: list[int], pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        ids = torch.tensor(
            [self.model.rows(pixels.shape[2], pixels.shape[3], self.newline) + prompt], device=self.device
        )
        return ids, {"embeddings": self.model.embed(ids, self.model.patches(pixels))}

    def studied(self, prompt: list[int], pixels: Tensor) -> PlacedSubject:
        rows = self.model.rows(pixels.shape[2], pixels.shape[3], self.newline)
        return fuyu_subject(self.model, pixels, *self.labelled([*rows, *prompt]), MAX_ANSWER_TOKENS)


class AskedIdefics(ZeroShot):
    """The image between two tokens of its own, and an instruction with the question; or, of a model that was tuned on
    dialogues, a turn of the user."""

    model_class = Idefics
    model: Idefics

    def check(self) -> None:
        check_tower(self)
        numbers = {name: self.tokenizer.backend.token_to_id(name) for name in ("<image>", "<fake_token_around_image>")}
        if missing := [name for name, number in numbers.items() if number is None]:
            raise UserError(f"the tokenizer of {self.source} has no {', '.join(missing)}, as that of an Idefics has")
        if "bos" not in self.tokenizer.special:
            raise UserError(f"the tokenizer of {self.source} names no start token")
        self.place, self.turn = numbers["<image>"], self.tokenizer.backend.token_to_id("<end_of_utterance>")
        self.barred = tuple(number for number in numbers.values() if number is not None)

    @property
    def image_token(self) -> int | None:
        return self.place

    @property
    def own_options(self) -> dict[str, Any]:
        usual = super().own_options | {"suppress_tokens": self.barred}
        return usual if self.turn is None else usual | {"eos_id": (*end_ids(usual["eos_id"]), self.turn)}

    def prompt(self, question: str) -> list[int]:
        self.words(question)
        image = "<fake_token_around_image><image><fake_token_around_image>"
        text = f"{INSTRUCTION}\n{image}Question: {question} Answer:"
        if self.turn is not None:
            text = f"User:{image}{question}<end_of_utterance>\nAssistant:"
        return self.tokenizer.encode(self.tokenizer.special["bos"] + text, add_special_tokens=False)

    def read(self, prompt: list[int], pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        assert self.place is not None, "checked"
        ids = torch.tensor([prompt], device=self.device)
        states = self.model.encode_image(pixels[None])
        memory = self.model.memory(states, self.model.image_mask(ids, self.place, [1]))
        return ids, {"given": Conditioning([memory])}

    def studied(self, prompt: list[int], pixels: Tensor) -> IdeficsSubject:
        assert self.place is not None, "checked"
        return IdeficsSubject(self.model, pixels, prompt, self.place, MAX_ANSWER_TOKENS)


FAMILIES: dict[str, type[ZeroShot]] = {  # by model_type
    "blip-2": AskedBlip2,
    "llava": AskedLlava,
    "fuyu": AskedFuyu,
    "idefics": AskedIdefics,
}


def check_tower(opened: "AskedBlip2 | AskedLlava | AskedIdefics") -> None:
    """Raise UserError if the images do not fit an image encoder that is a ViT."""
    sizes, processor = opened.model.vision.config, opened.processor
    if sizes.channels != 3:
        raise UserError(f"{opened.source} does not read colours")
    if processor.output_size is None or any(side % sizes.patch_size for side in processor.output_size):
        wanted = f"patches of {sizes.patch_size}: size {processor.size}"
        raise UserError(f"the images of {opened.source} do not divide into {wanted}")


def open_zero_shot(source: str, device: torch.device, precision: str = "fp32") -> ZeroShot:
    """Open a checkpoint of one of the `FAMILIES`: a folder, or a Hub id to download.

    `precision` of the weights is fp32, bf16, fp16 or auto. Raises UserError, one line, if the checkpoint is incomplete,
    of another kind, or if its parts do not fit each other.
    """
    (found,) = typed(f"{source}: {CONFIG}", read_config(locate(source, [CONFIG], CONFIG)), {"model_type": str | None})
    if found not in FAMILIES:
        raise UserError(f"{source} holds a model of type {found!r}, expected {', '.join(FAMILIES)}")
    family = FAMILIES[found]
    tokenizer, processor = Tokenizer.from_pretrained(source), family.processor_class.from_pretrained(source)
    kind = formats(precision, device)[-1]
    model = family.model_class.from_pretrained(source, dtype=DTYPES[kind], device=device)
    tokenizer.check_fits(model.language.config.vocab_size, source)
    opened = family(source, model, tokenizer, processor, device)
    opened.check()
    return opened
