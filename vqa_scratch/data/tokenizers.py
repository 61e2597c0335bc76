"""Turns questions and answers into ids: the tokenizers of a run, and the limits on the lengths."""

from collections.abc import Hashable, Iterable
from typing import TypeVar

import numpy as np

from vqa_scratch.data.text import Tokenizer, answer_ids

H = TypeVar("H", bound=Hashable)


def distinct(items: Iterable[H]) -> tuple[list[H], np.ndarray]:
    """(each different item once, which of them each item is)."""
    numbers: dict[H, int] = {}
    which = np.array([numbers.setdefault(item, len(numbers)) for item in items])
    return list(numbers), which


class Tokenizers:
    """One tokenizer for the text encoder and one for the decoder; None where a system lacks one of these.

    With `question_prompt` the decoder reads the question's tokens before BOS. `cut` counts the questions and answers
    that were longer than their limit.
    """

    def __init__(
        self,
        text: Tokenizer | None,
        decoder: Tokenizer | None,
        *,
        max_question_tokens: int,
        max_answer_tokens: int = 0,
        question_prompt: bool = False,
    ) -> None:
        self.text, self.question_prompt = text, question_prompt
        both = {"text": text, "decoder": decoder}
        self.by_name = {name: tokenizer for name, tokenizer in both.items() if tokenizer is not None}
        self.max_question_tokens, self.max_answer_tokens = max_question_tokens, max_answer_tokens
        self.cut = {"questions": 0, "answers": 0}

    @property
    def decoder(self) -> Tokenizer:
        """The tokenizer of the decoder. Raises KeyError if there is none."""
        return self.by_name["decoder"]

    def question(self, text: str) -> list[int]:
        """Ids for the text encoder; a question that is cut keeps its special tokens. Empty without a text encoder."""
        if self.text is None:
            return []
        ids = self.text.encode(text)
        if len(ids) > self.max_question_tokens:
            self.cut["questions"] += 1
            ids = self.text.encode_batch([text], max_length=self.max_question_tokens)[0][0].tolist()
        return ids

    def prompt(self, text: str) -> list[int]:
        """Ids that the decoder reads before BOS: the question, or nothing."""
        ids = self._whole_prompt(text)
        if self.text is None and len(ids) > self.max_question_tokens:
            self.cut["questions"] += 1
        return ids[: self.max_question_tokens]

    def _whole_prompt(self, text: str) -> list[int]:
        if not self.question_prompt or not text:
            return []
        return self.decoder.encode(f" {text}" if self.decoder.byte_level else text, add_special_tokens=False)

    def answer(self, text: str) -> list[int]:
        """BOS, the answer, EOS. An answer that is cut keeps its EOS."""
        ids = answer_ids(self.decoder, text)
        if len(ids) - 1 > self.max_answer_tokens:
            self.cut["answers"] += 1
            ids = ids[: self.max_answer_tokens] + ids[-1:]
        return ids

    @property
    def start_id(self) -> int:
        """The token an answer starts from, BOS."""
        return answer_ids(self.decoder, "yes")[0]

    @property
    def end_id(self) -> int:
        """The token that ends an answer, EOS."""
        return answer_ids(self.decoder, "yes")[-1]

    def cuts(self, question: str) -> bool:
        """Whether the limit cuts this question."""
        limit = self.max_question_tokens
        too_long = self.text is not None and len(self.text.encode(question)) > limit
        return too_long or len(self._whole_prompt(question)) > limit

    def notes_on_all(self, questions: Iterable[str]) -> list[str]:
        """The same for many questions: how many are cut."""
        cut = sum(map(self.cuts, questions))
        limit = self.max_question_tokens
        return [f"{cut:,} questions are longer than {limit} tokens; only their beginning is read"] if cut else []

    def notes_on(self, question: str, what: str = "question") -> list[str]:
        """Notes for the user: whether the question, or `what` it is, is cut or has unknown parts."""
        notes = []
        if self.cuts(question):
            limit = self.max_question_tokens
            notes.append(f"the {what} is longer than {limit} tokens; only its beginning was read")
        unknown = [] if self.text is None else list(dict.fromkeys(self.text.unknown(question)))
        if unknown:
            shown = ", ".join(part if len(part) <= 20 else f"{part[:20]}..." for part in unknown[:5])
            shown += ", ..." if len(unknown) > 5 else ""
            notes.append(f"the text encoder has no tokens for {shown}, and reads one and the same token in their place")
        return notes
