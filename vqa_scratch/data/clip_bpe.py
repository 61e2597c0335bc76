"""CLIP's tokenizer from its vocab.json and merges.txt: byte-level BPE of lower-case words, marked at their end.

Radford et al. 2021 (2103.00020), section 2.4. A word is a run of letters, a single digit, a run of other signs, or the
end of a contraction; its last piece ends in `</w>`, so space needs no token.
"""

from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

START, END = "<|startoftext|>", "<|endoftext|>"
ROLES = {"bos": START, "eos": END, "pad": END, "unk": END}
_WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clip_bpe(vocabulary: Path, merges: Path) -> tokenizers.Tokenizer:
    """The tokenizer of these two files. It puts the start and the end token around a text."""
    marks = {"end_of_word_suffix": "</w>", "continuing_subword_prefix": "", "unk_token": END}
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocabulary), str(merges), **marks))
    space = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), space, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([START, END])
    ids = backend.get_vocab()
    start, end = ((token, ids[token]) for token in (START, END))
    backend.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    return backend


def write_spaces(backend: tokenizers.Tokenizer) -> None:
    """Let the decoder write a space for the mark at the end of a word, if the vocabulary has one; none at the ends."""
    mark = getattr(backend.model, "end_of_word_suffix", None)
    if mark and isinstance(backend.decoder, decoders.ByteLevel):
        spaces = [decoders.Replace(mark, " "), decoders.Replace(Regex(r"\A\s+|\s+\z"), "")]
        backend.decoder = decoders.Sequence([backend.decoder, *spaces])
