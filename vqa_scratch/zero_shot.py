"""Answers questions without training: a released BLIP-2 checkpoint with its tokenizer and preprocessing.

The prompt is the one its authors use for questions, "Question: {} Answer:" (Li et al. 2023, arXiv 2301.12597, section
4.1), after the image and the start token. The answer ends at an end token of the checkpoint, a line break in the
released ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from vqa_scratch.data.answers import Answer
from vqa_scratch.data.image_files import load_image
from vqa_scratch.data.images import JOINT_CONFIG_NAME, ImageProcessor
from vqa_scratch.data.text import Tokenizer, check_question
from vqa_scratch.errors import UserError
from vqa_scratch.generate import GenerationOptions, generate
from vqa_scratch.generation_options import end_ids
from vqa_scratch.models.blip2 import Blip2
from vqa_scratch.storage import read_object
from vqa_scratch.training.precision import DTYPES, pick_precision
from vqa_scratch.weights.files import resolve_folder

PROMPT = "Question: {} Answer:"
MAX_ANSWER_TOKENS = 20


@dataclass
class ZeroShot:
    """A BLIP-2, ready to answer: the model in eval mode on `device`, its tokenizer and its image preprocessing."""

    writes: ClassVar[bool] = True
    example: ClassVar[str] = "what is in the picture?"

    source: str
    model: Blip2
    tokenizer: Tokenizer
    processor: ImageProcessor
    device: torch.device

    def prompt_ids(self, question: str, new_tokens: int = MAX_ANSWER_TOKENS) -> list[int]:
        """The start token and the prompt. Raises UserError on an empty question, or one that leaves no room for
        `new_tokens`."""
        sizes = self.model.config
        words = self.tokenizer.encode(PROMPT.format(check_question(question)), add_special_tokens=False)
        ids = [sizes.language.bos_id, *words]
        room = sizes.language.max_positions - sizes.queries - new_tokens
        if room < 1:
            raise UserError(f"max_new_tokens {new_tokens} is too much: it leaves no position for the question")
        if len(ids) > room:
            raise UserError(f"the question is too long: its prompt has {len(ids)} tokens, and {room} have room")
        if sizes.image_token in ids:
            token = self.tokenizer.backend.id_to_token(sizes.image_token)
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
        if question is None:
            raise UserError(f"{self.source} answers questions: give it --question")
        if top is not None:
            raise UserError(f"{self.source} writes one answer and ranks no list of them: leave out --top")
        limits = {"max_new_tokens": MAX_ANSWER_TOKENS, "eos_id": self.model.config.language.eos_id}
        options = GenerationOptions(**limits | dict(decoding or {}))
        ids = torch.tensor([self.prompt_ids(question, options.max_new_tokens)], device=self.device)
        pixels = self.processor(load_image(image))[None].to(self.device)
        made = generate(self.model.language, ids, options=options, prefix=self.model.encode_image(pixels))
        length = int(made.lengths)
        said = made.ids[0, :length].tolist()
        text = self.tokenizer.decode(said).strip()
        return [Answer(text, float(made.likely()), length, said[-1] in end_ids(options.eos_id))], []


def open_zero_shot(source: str, device: torch.device, precision: str = "fp32") -> ZeroShot:
    """Open a BLIP-2 checkpoint: a folder, or a Hub id to download.

    `precision` of the weights is fp32, bf16, fp16 or auto. Raises UserError, one line, if the checkpoint is incomplete,
    not a BLIP-2 with an OPT, or if its parts do not fit each other.
    """
    tokenizer, processor = Tokenizer.from_pretrained(source), ImageProcessor.from_pretrained(source)
    kind, _ = pick_precision(precision, device)
    model = Blip2.from_pretrained(source, dtype=DTYPES[kind], device=device)
    sizes = model.config
    tokenizer.check_fits(sizes.language.vocab_size, source)
    if sizes.language.bos_id >= sizes.language.vocab_size or sizes.vision.channels != 3:
        raise UserError(f"{source} has a start token beyond its vocabulary, or does not read colours")
    patch = sizes.vision.patch_size
    if processor.output_size is None or any(side % patch for side in processor.output_size):
        raise UserError(f"the images of {source} do not divide into patches of {patch}: size {processor.size}")
    joint = resolve_folder(source) / JOINT_CONFIG_NAME
    places = read_object(joint).get("num_query_tokens") if joint.is_file() else None  # absent in older files
    if places not in (None, sizes.queries):
        raise UserError(f"{joint} gives an image {places} tokens, the model of {source} {sizes.queries}")
    return ZeroShot(source, model, tokenizer, processor, device)
