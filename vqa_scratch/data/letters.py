"""The tokenizer of letters in a file of SentencePiece (Kudo and Richardson 2018), such as SpeechT5's spm_char.model.

The file is a protocol buffer, of which few fields are needed. Every piece is a letter, so there is one way to cut a text.
"""

from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from vqa_scratch.errors import UserError

FILE = "spm_char.model"
_UNKNOWN, _CONTROL = 2, 3  # types of pieces
_WORD = "▁"  # stands for a space


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, where it ends) of an integer of 7 bits a byte, the lowest first."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a message. Raises IndexError or ValueError if it is none."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"wire type {kind}")
        size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if at + size > len(data):
            raise IndexError("cut short")
        yield key >> 3, data[at : at + size]
        at += size


def letter_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of the file; `</s>` comes after each text. Raises UserError if it is not one of letters."""
    try:
        pieces, charsmap = [], b""
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece = dict(_fields(value))
                pieces.append((piece[1].decode(), piece.get(3, 1)))
            elif number == 3:
                charsmap = dict(_fields(value)).get(2, b"")
        unknown = [kind for _, kind in pieces].index(_UNKNOWN)
    except (OSError, IndexError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a whole SentencePiece model ({error}); copy or download it again") from None
    longer = [text for text, kind in pieces if kind == 1 and len(text) != 1]
    special = [text for text, kind in pieces if kind in (_UNKNOWN, _CONTROL)]
    if longer or "</s>" not in special:
        raise UserError(f"{path} is not a model of single letters with </s>" + (f": {longer[0]!r}" if longer else ""))
    backend = tokenizers.Tokenizer(models.Unigram([(text, 0.0) for text, _ in pieces], unknown, False))
    parts = [normalizers.Precompiled(charsmap)] if charsmap else []
    spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([*parts, spaces, normalizers.Strip()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_WORD, prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(replacement=_WORD, prepend_scheme="always", split=False)
    backend.add_special_tokens(special)
    end = ("</s>", backend.token_to_id("</s>"))
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    return backend
