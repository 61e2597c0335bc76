"""Turns texts into ids and back, with tokenizers loaded from released checkpoints or trained here.

A thin layer over the `tokenizers` library. There are four kinds: WordPiece (BERT, Devlin et al. 2019), byte-level BPE
(GPT-2, Radford et al. 2019; RoBERTa, Liu et al. 2019; CLIP, see `clip_bpe.py`) and, from their tokenizer.json, Unigram
(T5, Raffel et al. 2020) and BPE of characters whose rare ones are bytes (Llama, Touvron et al. 2023).

B batch, T text tokens.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from vqa_scratch.data import clip_bpe, letters
from vqa_scratch.data.wordpiece import learn_wordpieces
from vqa_scratch.errors import UserError, note
from vqa_scratch.storage import is_text, read_object, write_json
from vqa_scratch.weights.hub import locate

FILES: tuple[str, ...] = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
FILES += ("vocab.json", "merges.txt", "vocab.txt", letters.FILE)
ROLES = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")

# The special tokens of the released vocabularies, for checkpoints whose files do not name them.
_KNOWN_ROLES = (
    {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]"},
    {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"},
    clip_bpe.ROLES,
    {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"},
    {"eos": "</s>", "pad": "<pad>", "unk": "<unk>"},
)


def check_text(text: str, empty: str) -> str:
    """The text without surrounding space. Raises UserError if it is not valid, or if nothing is left: with `empty`."""
    if not isinstance(text, str) or not text.strip():
        raise UserError(empty)
    if not is_text(text):
        raise UserError(f"{text!a} is not valid text: it has half of a letter")
    return text.strip()


def check_question(text: str) -> str:
    """`check_text` of a question."""
    return check_text(text, "the question is empty: ask something, for example --question 'what color is the square?'")


class Tokenizer:
    """Text to ids and back.

    backend       -- a `tokenizers.Tokenizer`; its post-processor adds the special tokens (RoBERTa <s> </s>,
                     BERT [CLS] [SEP], T5 </s>, GPT-2 none)
    special       -- the token of each role in ROLES that the vocabulary has
    bos_id, eos_id, pad_id, unk_id, cls_id, sep_id, mask_id
                  -- their ids, or None
    truncated     -- how many texts `encode_batch` has cut so far
    """

    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None
    cls_id: int | None
    sep_id: int | None
    mask_id: int | None

    def __init__(self, backend: tokenizers.Tokenizer, special: dict[str, str]) -> None:
        # Files may ask for a fixed length to cut or pad to; `encode_batch` does both itself.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special = {role: special[role] for role in ROLES if role in special}
        self.truncated = 0
        for role in ROLES:
            token = self.special.get(role)
            index = None if token is None else backend.token_to_id(token)
            if token is not None and index is None:
                raise UserError(
                    f"the {role} token {token!r} is not in the vocabulary of {backend.get_vocab_size()} tokens"
                )
            setattr(self, f"{role}_id", index)
        # Not of the whole backend: the library writes a line for each id up to the largest, which may be anything.
        parts = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer else {}
        self.byte_level = any(part.get("type") == "ByteLevel" for part in parts.get("pretokenizers", [parts]))

    def __len__(self) -> int:
        """How many rows the ids need: one more than the largest, of all tokens and of what is put around a text."""
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        return 1 + max([*vocabulary.values(), *self.backend.encode("").ids], default=-1)

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | Path) -> "Tokenizer":
        """Reads tokenizer.json, else vocab.json + merges.txt (byte-level BPE), vocab.txt (lower-case WordPiece) or
        spm_char.model (letters).

        Raises UserError if the folder has none of them, or if one is broken.
        """
        folder = locate(folder_or_hub_id, FILES, "the tokenizer")
        has = {name: (folder / name).is_file() for name in FILES}
        config = read_object(folder / "tokenizer_config.json") if has["tokenizer_config.json"] else {}
        named = read_object(folder / "special_tokens_map.json") if has["special_tokens_map.json"] else {}
        try:
            if has["tokenizer.json"]:
                backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            elif has["vocab.json"] and has["merges.txt"]:
                backend = _byte_level_bpe(folder, config)
            elif has["vocab.txt"]:
                backend = _bert_wordpiece(folder, config)
            elif has[letters.FILE]:
                backend = letters.letter_tokenizer(folder / letters.FILE)
            else:
                raise UserError(f"{folder} has no tokenizer.json, no vocab.json with merges.txt and no vocab.txt")
            clip_bpe.write_spaces(backend)
            named = _roles_named(folder, config, named)
            extra = read_object(folder / "added_tokens.json") if has["added_tokens.json"] else {}
            _add_missing(folder, backend, config, extra, set(named.values()))
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exception on broken files
            raise UserError(f"the tokenizer in {folder} cannot be read: {error}") from error
        vocabulary = backend.get_vocab(with_added_tokens=True)
        special = dict(next((roles for roles in _KNOWN_ROLES if vocabulary.keys() >= set(roles.values())), {}))
        # configurations also name tokens that their vocabulary lacks
        return cls(backend, special | {role: token for role, token in named.items() if token in vocabulary})

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `transformers` loads as a fast tokenizer."""
        folder = Path(folder)
        write_json(folder / "tokenizer.json", json.loads(self.backend.to_str()))
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        config |= {f"{role}_token": token for role, token in self.special.items()}
        config["clean_up_tokenization_spaces"] = False
        write_json(folder / "tokenizer_config.json", config, compact=True)

    def check_fits(self, rows: int, model: object) -> None:
        """Raise UserError if an embedding table of `model`, of so many rows, has none for the largest id."""
        if len(self) > rows:
            raise UserError(f"the tokenizer has ids up to {len(self) - 1}, {model} has rows for {rows}")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of one text, uncut."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def unknown(self, text: str) -> list[str]:
        """The parts of a text that the vocabulary has no token for, in order; bytes are never unknown."""
        if self.byte_level or self.unk_id is None:
            return []
        encoding = self.backend.encode(text, add_special_tokens=False)
        places = zip(encoding.ids, encoding.offsets, strict=True)
        return [text[start:end] for index, (start, end) in places if index == self.unk_id]

    def encode_batch(self, texts: Sequence[str], max_length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """ids (B, T) int64 and mask (B, T) bool, padded on the right to the longest text.

        A text longer than `max_length` ids loses its end, but keeps the special tokens around it; `truncated` counts
        such texts. The mask follows from the lengths, so a real token with the padding id stays visible.
        Raises ValueError for no texts, UserError for a `max_length` with no room for a token beside the special ones.
        """
        added = self.backend.num_special_tokens_to_add(False)
        if isinstance(texts, str) or not texts:
            raise ValueError("texts must be a non-empty sequence of strings")
        if max_length is not None and max_length <= added:
            raise UserError(f"max_length={max_length} leaves no room beside {added} special tokens")
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        if max_length is not None:
            for encoding in encodings:
                if len(encoding) > max_length - added:
                    encoding.truncate(max_length - added)
                    self.truncated += 1
        rows = [self.backend.post_process(encoding).ids for encoding in encodings]
        lengths = torch.tensor([len(row) for row in rows])
        width, pad = max(1, int(lengths.max())), self.pad_id or 0
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        return ids, torch.arange(width) < lengths[:, None]

    def decode(self, ids: Sequence[int] | torch.Tensor, *, skip_special_tokens: bool = True) -> str:
        """The text of one row of ids."""
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)


def answer_ids(tokenizer: Tokenizer, answer: str) -> list[int]:
    """[BOS] + the tokens of the answer + [EOS], for a decoder.

    Byte-level BPE writes a word after a space as one token and at the start of a text as several (" tennis" against
    "ten" + "nis"), so there the answer gets a leading space. Without BOS an answer starts with CLS, or with the padding
    token as in T5; without EOS it ends with SEP.
    Raises UserError if the vocabulary has nothing to start or to end with.
    """
    starts = [i for i in (tokenizer.bos_id, tokenizer.cls_id, tokenizer.pad_id) if i is not None]
    ends = [i for i in (tokenizer.eos_id, tokenizer.sep_id) if i is not None]
    if not starts or not ends:
        raise UserError(f"the vocabulary has no token to start or end an answer with: {tokenizer.special}")
    text = " " + answer.strip() if tokenizer.byte_level else answer.strip()
    return [starts[0], *tokenizer.encode(text, add_special_tokens=False), ends[0]]


# ---------------------------------------------------------------------------------------------- reading


def _roles_named(folder: Path, config: dict[str, Any], named: dict[str, Any]) -> dict[str, str]:
    """{role: token} by tokenizer_config.json and special_tokens_map.json, with a note where they disagree.

    As in `transformers`, the map is that of older tokenizers: it counts unless the config lists added tokens itself.
    """
    first, second = ("tokenizer_config.json", config), ("special_tokens_map.json", named)
    order = [first] if "added_tokens_decoder" in config else [second, first]
    result: dict[str, str] = {}
    for role in ROLES:
        found = {}
        for name, values in (first, second):
            token = values.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[name] = token
        counts = next((name for name, _ in order if name in found), None)
        if counts is not None:
            result[role] = found[counts]
        if len(set(found.values())) > 1:
            tokens = " and ".join(f"{token!r} by {name}" for name, token in found.items())
            note(f"the {role} token in {folder} is {tokens}; {counts} counts")
    return result


def _add_missing(
    folder: Path, backend: tokenizers.Tokenizer, config: dict[str, Any], extra: dict[str, Any], special: set[str]
) -> None:
    """Add the tokens that tokenizer_config.json lists, or else the older added_tokens.json, and the vocabulary lacks.

    As in `transformers` they get the next ids, and tokens that it has keep theirs; a note says where others are listed.
    """
    name, listed = "added_tokens.json", [(int(index), {"content": token}) for token, index in extra.items()]
    if "added_tokens_decoder" in config:
        name, listed = "tokenizer_config.json", [(int(i), t) for i, t in config["added_tokens_decoder"].items()]
    for index, entry in sorted(listed, key=lambda item: item[0]):
        token = entry["content"]
        if backend.token_to_id(token) is None:
            kind = {key: entry[key] for key in ("lstrip", "rstrip", "single_word", "normalized") if key in entry}
            backend.add_tokens([tokenizers.AddedToken(token, special=entry.get("special", token in special), **kind)])
        if backend.token_to_id(token) != index:
            own = backend.token_to_id(token)
            note(f"{token!r} in {folder} has id {index} by {name}, {own} by the vocabulary, which counts")


# ---------------------------------------------------------------------------------------------- building


def _around(backend: tokenizers.Tokenizer, first: str | None, last: str | None) -> processors.TemplateProcessing:
    """A post-processor that puts the given tokens before and after a text."""
    template = " ".join(part for part in (first, "$A", last) if part)
    tokens = [(token, backend.token_to_id(token)) for token in (first, last) if token]
    return processors.TemplateProcessing(single=template, special_tokens=tokens)


def _byte_level_bpe(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """GPT-2's, RoBERTa's and CLIP's tokenizer from vocab.json and merges.txt."""
    if clip_bpe.START in read_object(folder / "vocab.json"):
        return clip_bpe.clip_bpe(folder / "vocab.json", folder / "merges.txt")
    model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    backend.decoder = decoders.ByteLevel()
    vocabulary = backend.get_vocab()
    if all(token in vocabulary for token in _KNOWN_ROLES[1].values()):
        mask = tokenizers.AddedToken("<mask>", lstrip=True, special=True)  # includes the space before it
        backend.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", mask])
        backend.post_processor = _around(backend, "<s>", "</s>")
    elif "<|endoftext|>" in vocabulary:
        backend.add_special_tokens(["<|endoftext|>"])
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    else:
        raise UserError(f"{folder / 'vocab.json'} is neither GPT-2's (<|endoftext|>) nor RoBERTa's (<s>, </s>, ...)")
    return backend


def _wordpiece_parts(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=bool(config.get("do_lower_case", True)),
        strip_accents=config.get("strip_accents"),  # None: with lower case only
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")


def _bert_wordpiece(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """BERT's and DistilBERT's tokenizer from vocab.txt."""
    model = models.WordPiece.from_file(str(folder / "vocab.txt"), unk_token="[UNK]", max_input_chars_per_word=100)
    backend = tokenizers.Tokenizer(model)
    _wordpiece_parts(backend, config)
    missing = [token for token in _KNOWN_ROLES[0].values() if backend.token_to_id(token) is None]
    if missing:
        raise UserError(f"{folder / 'vocab.txt'} is not a BERT vocabulary: it has no {', '.join(missing)}")
    backend.add_special_tokens(list(_KNOWN_ROLES[0].values()))
    backend.post_processor = _around(backend, "[CLS]", "[SEP]")
    return backend


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A lower-case WordPiece vocabulary of about `vocab_size` tokens learned from texts, used as BERT's is.

    It has fewer if the texts have no more to learn, and more if their letters alone, in two forms each, are more: those
    of Chinese are thousands.
    """
    special = _KNOWN_ROLES[0]
    order = [special[role] for role in ("pad", "unk", "cls", "sep", "mask")]
    backend = tokenizers.Tokenizer(models.WordPiece())
    _wordpiece_parts(backend, {})
    words: Counter[str] = Counter()
    for text, count in Counter(texts).items():
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text)):
            words[word] += count
    pieces = order + learn_wordpieces(words, vocab_size - len(order))
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend.model = models.WordPiece(vocabulary, unk_token=special["unk"], max_input_chars_per_word=100)
    backend.add_special_tokens(order)
    backend.post_processor = _around(backend, special["cls"], special["sep"])
    return Tokenizer(backend, special)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE vocabulary of at most `vocab_size` tokens learned from texts, used as GPT-2's is.

    Every byte is a token (so nothing is unknown), and BOS, EOS and padding are three tokens of their own. Texts that
    will be used after a space, such as answers, should be given with it. Raises UserError below 256 + 3 tokens.
    """
    special = {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}
    if vocab_size < 256 + len(special):
        raise UserError(f"a vocabulary of byte-level BPE has at least {256 + len(special)} tokens, not {vocab_size}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[special["pad"], special["bos"], special["eos"]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return Tokenizer(backend, special)
