"""The tokenizer of letters in a file of SentencePiece (Kudo and Richardson 2018), such as SpeechT5's spm_char.model.

Of the file, a protocol buffer, three fields are needed. Every piece is a letter, so a text can be cut in one way only.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from vqa_scratch.errors import UserError

FILE = "spm_char.model"
WORD = "▁"  # stands for a space
_LETTER, _UNKNOWN, _CONTROL = 1, 2, 3  # types of pieces


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, where it ends) of an integer of 7 bits a byte, the lowest first."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, an integer or bytes) of each field of a message. Raises LookupError for what is none."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        size, at = _varint(data, at) if key & 7 in (0, 2) else ({1: 8, 5: 4}[key & 7], at)
        if key & 7 == 0:
            yield key >> 3, size
            continue
        if at + size > len(data):
            raise IndexError("cut short")
        yield key >> 3, data[at : at + size]
        at += size


def letter_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of the file; `</s>` comes after each text. Raises UserError if it is not one of letters."""
    try:
        whole = list(_fields(path.read_bytes()))
        pieces = [
            (piece[1].decode(), piece.get(3, _LETTER)) for piece in (dict(_fields(v)) for n, v in whole if n == 1)
        ]
        charsmap = next((dict(_fields(value)).get(2, b"") for number, value in whole if number == 3), b"")
    except (OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a whole SentencePiece model ({error}); copy or download it again") from None
    special, kinds = [text for text, kind in pieces if kind in (_UNKNOWN, _CONTROL)], [kind for _, kind in pieces]
    if _UNKNOWN not in kinds or "</s>" not in special or any(len(t) != 1 for t, kind in pieces if kind == _LETTER):
        raise UserError(f"{path} is not a SentencePiece model of single letters that has an unknown one and </s>")
    backend = of_letters([text for text, _ in pieces], special, kinds.index(_UNKNOWN))
    if charsmap:
        backend.normalizer = normalizers.Sequence([normalizers.Precompiled(charsmap), backend.normalizer])
    return backend


def of_letters(pieces: list[str], special: list[str], unknown: int) -> tokenizers.Tokenizer:
    """A tokenizer whose tokens are single letters, in this order, with the `special` ones and the `unknown` one, by its
    place, among them; `</s>` comes after each text."""
    backend = tokenizers.Tokenizer(models.Unigram([(text, 0.0) for text in pieces], unknown, False))
    backend.normalizer = normalizers.Sequence([normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Strip()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(WORD, "always", False)
    backend.decoder = decoders.Metaspace(WORD, "always", False)
    backend.add_special_tokens(special)
    end = ("</s>", backend.token_to_id("</s>"))
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    return backend
