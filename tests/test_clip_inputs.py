"""What a CLIP reads: its tokenizer against the reference's on hostile texts, and photos that lie on their side."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers
from transformers.image_utils import load_image as reference_load
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vqa_scratch.data.images import ImageProcessor, load_image
from vqa_scratch.data.text import Tokenizer

LEARNED = ["a photo of a red square.", "it's the cat's café", "don't they'll we've 1234", "hello world"] * 5
HOSTILE = [
    "hello world",
    "a photo of a cat.",
    "",
    " ",
    "\t two \n\n lines\u00a0and\u2003wide\u200bspaces ",
    "Café cafe\u0301 ÅNGSTRÖM naïve ﬁ İstanbul ß ẞ Σίσυφος",
    "don't CAN'T they'll we've I'm it's she'd you're o'clock '' 's 'tis rock'n'roll’s",
    "2024-11-29 3.14159 1,000,000 ½ ² Ⅷ ٣ a1b2",
    "日本語の写真 中文 한국어 ไทย עברית العربية",
    "🙂 👩‍👩‍👧‍👦 🇩🇪 ✈️ 🏽",
    "&lt;b&gt;caf&eacute;&amp;amp;&#39;</b> <br/> <a href='x'>y</a>",
    "<|startoftext|> in <|endoftext|> the <|ENDOFTEXT|> text<|endoftext|>",
    "</w> a</w>b </w",
    "a!?!,,--__**//\\\\ (b) [c] {d} #e @f $g %h ^i &j",
    "nul \x00 bell \x07 del \x7f \ufeffbom \ufffd",
    "e\u0301\u0301\u0301 a\u0300\u0316 \u0301alone",
    "x" * 400,
    "a " * 200,
    "one two three four " * 30,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """vocab.json and merges.txt as OpenAI's: 256 bytes, the same with "</w>", merges, start and end token."""
    folder = tmp_path_factory.mktemp("clip")
    backend = Backend(models.BPE(end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator([word for text in LEARNED for word in text.lower().split()], trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    pieces = list(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    return transformers.CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))


@pytest.mark.parametrize("files", ["vocab.json and merges.txt", "tokenizer.json", "saved by us"])
def test_tokenizer_equals_the_reference(tmp_path, folder, reference, files):
    source = folder
    if files == "tokenizer.json":
        reference.save_pretrained(tmp_path)
        source = tmp_path
    if files == "saved by us":
        Tokenizer.from_pretrained(folder).save(tmp_path)
        source = tmp_path
    ours = Tokenizer.from_pretrained(source)
    for text in HOSTILE:
        ids = ours.encode(text)
        assert ids == reference(text)["input_ids"], text
        assert (ids[0], ids[-1]) == (ours.bos_id, ours.eos_id)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip), text
    assert ours.pad_id == ours.eos_id == ours.unk_id == reference.pad_token_id == len(ours) - 1
    assert ours.bos_id == reference.bos_token_id and ours.byte_level
    expected = reference(HOSTILE, padding=True, truncation=True, max_length=77, return_tensors="pt")
    ids, mask = ours.encode_batch(HOSTILE, max_length=77)
    assert torch.equal(ids, expected["input_ids"]) and torch.equal(mask, expected["attention_mask"].bool())
    assert ids.shape[1] == 77 and (ids[-1, -1], ids[-2, -1], ids[-3, -1]) == (ours.eos_id,) * 3 and ours.truncated == 3
    assert ours.encode("Hello   WORLD") == ours.encode("hello world")


def test_what_we_save_opens_in_the_reference(tmp_path, folder, reference):
    Tokenizer.from_pretrained(folder).save(tmp_path)
    for opened in (
        transformers.AutoTokenizer.from_pretrained(tmp_path),
        transformers.CLIPTokenizer.from_pretrained(tmp_path),
    ):
        for text in HOSTILE:
            ids = reference(text)["input_ids"]
            assert opened(text)["input_ids"] == ids, text
            assert opened.decode(ids, skip_special_tokens=True) == reference.decode(ids, skip_special_tokens=True)


def test_a_photo_is_turned_as_the_reference_turns_it(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (61, 97, 3), dtype=np.uint8)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
        theirs = CLIPImageProcessorPil()
        ours = ImageProcessor.from_hf(theirs.to_dict())(load_image(tmp_path / "a.jpg"))
        expected = theirs(reference_load(str(tmp_path / "a.jpg")))["pixel_values"][0]
        assert np.array_equal(ours.numpy(), np.asarray(expected, dtype=np.float32)), orientation
