"""A language model alone, ready to answer texts: a T5, GPT-2, OPT, Llama or its like, tuned by rlhf.py or released.

A T5 reads the text after the prefix of its run, and writes. The others go on from it; where the checkpoint has a chat
template, the text is what a user says in it, as in `rlhf.py --preset lm`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from vqa_scratch.data.answers import Answer
from vqa_scratch.data.chat_template import OF_TEXT, read_template, render
from vqa_scratch.data.text import Tokenizer, check_text
from vqa_scratch.errors import UserError
from vqa_scratch.generate import GenerationOptions
from vqa_scratch.models import T5, released
from vqa_scratch.models.hf_config import ReleasedDecoder
from vqa_scratch.storage import typed
from vqa_scratch.study.opened import (
    POLICY,
    Opened,
    config_of,
    run_name,
    special_tokens,
    text_labels,
    token_label,
    written,
)
from vqa_scratch.study.texts import LanguageSubject, T5Subject
from vqa_scratch.systems.writing import answers_of
from vqa_scratch.training.precision import DTYPES, formats
from vqa_scratch.weights.files import CONFIG
from vqa_scratch.weights.hub import locate

TYPES = ("t5", *released.DECODERS)  # model types


@dataclass
class LanguageModel:
    """In eval mode on its device, with its tokenizer."""

    writes: ClassVar[bool] = True
    example: ClassVar[str] = "why is the sky dark at night?"

    source: str
    model: T5 | ReleasedDecoder[Any]
    tokenizer: Tokenizer
    template: str | None  # of a chat
    prefix: str = ""  # before each text that a T5 reads
    longest: int = 512  # tokens of such a text; what is longer loses its end
    max_new_tokens: int = 32

    @property
    def own_options(self) -> dict[str, Any]:
        """The model's own fields of `GenerationOptions`: how long an answer is, and what ends it."""
        end = self.model.config.eos_id
        return {"max_new_tokens": self.max_new_tokens, "eos_id": self.tokenizer.eos_id if end is None else end}

    def subject(self, text: str | None, max_new_tokens: int | None = None) -> Opened:
        """One text, for study or to be answered in at most so many tokens.

        Raises UserError if it is empty, or leaves no room for the answer.
        """
        text = check_text(text or "", "the text is empty: there is nothing to read")
        new, tokenizer, notes = max_new_tokens or self.max_new_tokens, self.tokenizer, []
        subject: T5Subject | LanguageSubject
        if isinstance(self.model, T5):
            text, cut = self.prefix + text, tokenizer.truncated
            ids = tokenizer.encode_batch([text], max_length=self.longest)[0][0].tolist()
            if tokenizer.truncated > cut:
                notes.append(f"the text is longer than {self.longest} tokens; only its beginning was read")
            subject = T5Subject(self.model, ids, text_labels(tokenizer, text, ids), new)
        else:
            ids = tokenizer.encode(text)
            if self.template is not None:
                asked = render(self.template, [{"role": "user", "content": text}], tokenizer.special)
                ids = tokenizer.encode(asked, add_special_tokens=False)
            most = self.model.max_positions
            if len(ids) < 2:
                raise UserError("the text is a single token: give one more word, so that there is something to look at")
            if most is not None and len(ids) + new - 1 > most:
                raise UserError(
                    f"the text has {len(ids)} tokens, and {self.source} has {most} positions, which leaves "
                    f"{max(0, most - len(ids) + 1)} for the answer: max_new_tokens is {new}"
                )
            labels = [token_label(tokenizer, index) for index in ids]
            subject = LanguageSubject(self.model, ids, labels, special_tokens(tokenizer, ids), new)
        subject.decide_by(self.own_options)
        answer = written(tokenizer, subject.prompt)
        return Opened(run_name(Path(self.source)), subject, text, None, **answer, notes=tuple(notes))

    def ask(
        self, image: None, question: str | None, top: int | None = None, decoding: Mapping[str, Any] | None = None
    ) -> tuple[list[Answer], list[str]]:
        """([the answer], notes for the user) to one text; `decoding` are fields of `GenerationOptions`.

        Raises UserError as `subject` does, on contradicting options, and for a `top`, since there is no list to rank.
        """
        refuse_list(self.source, top)
        options = GenerationOptions(**self.own_options | dict(decoding or {}))
        opened = self.subject(question, options.max_new_tokens)
        assert isinstance(opened.subject, T5Subject | LanguageSubject)
        return answers_of(opened.subject.write(options), self.tokenizer, options), list(opened.notes)


def refuse_list(source: str, top: int | None) -> None:
    """Raise UserError for a `top` where answers are written."""
    if top is not None:
        raise UserError(f"{source} writes one answer and ranks no list of them: leave out --top")


def place_of(source: str | Path) -> Path | None:
    """The folder of the language model in a run or a checkpoint; None if there is none."""
    folder = source if isinstance(source, Path) else locate(source, [CONFIG], CONFIG)
    return next((p for p in (folder / POLICY, folder) if config_of(p).get("model_type") in TYPES), None)


def open_language_model(source: str | Path, device: torch.device, precision: str = "fp32") -> LanguageModel | None:
    """The policy that rlhf.py tuned in the folder of a run, or a checkpoint: a folder, or as a text a Hub id.

    None if it holds another kind of model. `precision` of the weights is fp32, bf16, fp16 or auto. Raises UserError,
    one line, if the checkpoint is incomplete, or if its parts do not fit each other.
    """
    if (place := place_of(source)) is None:
        return None
    of_run, run = place.name == POLICY, place.parent
    options, origin = (config_of(run), place) if of_run else ({}, source)  # the weights of a Hub id lie elsewhere
    types = {"prefix": str | None, "max_prompt_tokens": int | None, "max_new_tokens": int | None}
    given = zip(("prefix", "longest", "max_new_tokens"), typed(run / CONFIG, options, types), strict=True)
    model: T5 | ReleasedDecoder[Any]
    t5 = config_of(place)["model_type"] == "t5"
    model = T5.from_pretrained(origin) if t5 else released.decoder(origin, cross_attention=False)
    tokenizer = Tokenizer.from_pretrained(origin)
    tokenizer.check_fits(model.config.vocab_size, source)
    return LanguageModel(
        str(source),
        model.to(device, DTYPES[formats(precision, device)[-1]]),
        tokenizer,
        read_template(origin, OF_TEXT),
        **{name: value for name, value in given if value is not None},
    )
