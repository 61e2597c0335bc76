"""The special tokens of a Whisper: languages, tasks and times; which tokens are no speech; where a word begins."""

import string
from collections.abc import Sequence

from vqa_scratch.data.text import Tokenizer
from vqa_scratch.errors import UserError, some

SPECIAL = {
    "end": "<|endoftext|>",
    "start": "<|startoftranscript|>",
    "translate": "<|translate|>",
    "transcribe": "<|transcribe|>",
    "language_model": "<|startoflm|>",
    "previous": "<|startofprev|>",
    "silence": "<|nospeech|>",
    "no_times": "<|notimestamps|>",  # the times follow it, in a step of 0.02 s; old files do not list them
}
_OLD_SILENCE = "<|nocaptions|>"
# What subtitles have besides words, if it is one token, with a space before it or without; notes are several tokens.
_MARKS = list('"#()*+/:;<=>@[\\]^_`{|}~「」『』')
_MARKS += "<< >> <<< >>> -- --- -( -[ (' (\" (( )) ((( ))) [[ ]] {{ }} ♪♪ ♪♪♪".split()
_NOTES = "♩♪♫♬♭♮♯"
_WITHOUT_SPACES = {"zh", "ja", "th", "lo", "my", "yue"}


class SpeechVocabulary:
    """A tokenizer with the ids of `SPECIAL` as attributes, and `languages` {code: id}."""

    end: int
    start: int
    translate: int
    transcribe: int
    language_model: int
    previous: int
    silence: int
    no_times: int

    def __init__(self, tokenizer: Tokenizer, multilingual: bool, source: str) -> None:
        """Raises UserError, naming `source`, if the tokenizer lacks one of them."""
        number = tokenizer.backend.token_to_id
        found = {role: number(token) for role, token in SPECIAL.items()}
        found["silence"] = number(_OLD_SILENCE) if found["silence"] is None else found["silence"]
        if missing := [SPECIAL[role] for role, index in found.items() if index is None]:
            raise UserError(f"the tokenizer of {source} has no {some(missing)}, as that of a Whisper has")
        self.__dict__ |= found
        self.tokenizer, self.multilingual, self.first_time = tokenizer, multilingual, self.no_times + 1
        between = range(self.start + 1, min(self.translate, self.transcribe))
        names = ((index, tokenizer.backend.id_to_token(index)) for index in between)
        self.languages = {name[2:-2]: index for index, name in names if name is not None}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def text(self, ids: Sequence[int]) -> str:
        """The words among the ids, without special tokens and times."""
        return self.tokenizer.decode([index for index in ids if index < self.end])

    def prompt(self, language: str | None, task: str) -> list[int]:
        """What the decoder starts from; a model of English alone has neither language nor task."""
        return [self.start] + ([self.languages[language or "en"], getattr(self, task)] if self.multilingual else [])

    def no_speech(self) -> tuple[int, ...]:
        """The tokens that are never written: symbols, and special tokens that have their place in the prompt."""
        ids = {self.encode(" -")[0], self.encode(" '")[0]}  # within a word both may come
        for mark in (*_MARKS, *_NOTES):
            for tokens in (self.encode(mark), self.encode(f" {mark}")):
                if len(tokens) == 1 or mark in _NOTES:
                    ids.add(tokens[0])
        ids |= {self.start, self.translate, self.transcribe, self.language_model, self.previous, self.silence}
        return tuple(sorted(ids))

    def words(self, ids: list[int], language: str | None) -> list[tuple[str, int]]:
        """The words that text ids are, each with its number of tokens; punctuation is a word of its own.

        A letter may be several tokens, a word several letters; where words have no spaces a letter is a word.
        """
        whole, at = self.text(ids), 0
        words: list[tuple[str, int]] = []
        pending: list[int] = []
        for index in ids:
            pending.append(index)
            piece = self.text(pending)
            if "\ufffd" in piece and not whole.startswith(piece, at):  # half a letter
                continue
            alone = language in _WITHOUT_SPACES or piece.startswith(" ") or piece.strip() in string.punctuation
            before, count = ("", 0) if alone or not words else words.pop()
            words.append((before + piece, count + len(pending)))
            at, pending = at + len(piece), []
        return words
