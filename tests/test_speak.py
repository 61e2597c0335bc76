"""`speak`: what a text becomes, the file it writes, and what it does not take; a recogniser's words."""

import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from run_helpers import command
from safetensors.torch import save_file
from speecht5_helpers import recognizer, vocoder, voice
from transformers.utils import sentencepiece_model_pb2_new as pb2

from vqa_scratch.command_line import run_program
from vqa_scratch.data.spelled import spell_numbers
from vqa_scratch.data.text import Tokenizer
from vqa_scratch.errors import UserError, note
from vqa_scratch.speech import SpeechWriter, Voice, read_speaker, vocoder_near

ALPHABET = "▁etaoinsrhldcumfpgwy.,"
CPU = torch.device("cpu")


def spm(path: Path, *, letters: str = ALPHABET, more: tuple[str, ...] = ()) -> Path:
    """A SentencePiece model of letters, in SpeechT5's order."""
    model = pb2.ModelProto()
    for text, kind in (("<s>", 3), ("<pad>", 3), ("</s>", 3), ("<unk>", 2), *((letter, 1) for letter in letters)):
        model.pieces.add(piece=text, score=-1.0, type=kind)
    for text in more:
        model.pieces.add(piece=text, score=-1.0, type=1)
    model.trainer_spec.model_type = 4
    model.normalizer_spec.name = "identity"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A voice with a vocoder inside, and files of speakers beside."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("speak") / "tts"
    voice(root)
    vocoder(root / "vocoder")
    spm(root / "spm_char.model")
    vector = torch.nn.functional.normalize(torch.randn(1, 8))
    np.save(root / "one.npy", vector.numpy())
    np.save(root / "flat.npy", vector[0].numpy().astype(np.float64))
    save_file({"x": vector}, root / "one.safetensors")
    return root


# ------------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("0", "zero"),
        ("7 of 13", "seven of thirteen"),
        ("20, 42 and 100", "twenty, forty two and one hundred"),
        ("1,234,567", "one million two hundred thirty four thousand five hundred sixty seven"),
        ("1000001", "one million one"),
        ("3.14", "three point one four"),
        ("007", "zero zero seven"),
        ("1" * 16, " ".join(["one"] * 16)),
        ("-5 and 3-4", "minus five and three-four"),
        ("$1, $4.50 and £20", "one dollar, four point five zero dollars and twenty pounds"),
        ("99%", "ninety nine percent"),
        ("1st 2nd 3rd 12th 20th 101st", "first second third twelfth twentieth one hundred first"),
        ("B2B mp3", "B two B mp three"),
        ("1,2345", "one,two thousand three hundred forty five"),
        ("1.2.3", "one point two.three"),
        ("no number", "no number"),
    ],
)
def test_numbers(text, spelled):
    assert spell_numbers(text) == spelled


def test_letters(folder):
    tokenizer = Tokenizer.from_pretrained(folder)
    place = {letter: number for number, letter in enumerate(ALPHABET, 4)}
    assert tokenizer.encode("a  cat\n") == [place[c] for c in "▁a▁cat"] + [2]
    assert tokenizer.unknown("the Zoo, Öl") == ["Z", "Ö"]
    assert tokenizer.decode(tokenizer.encode("the cat, wet.")) == "the cat, wet."
    ids, mask = tokenizer.encode_batch(["a cat", "a"])
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 3)
    assert ids[1].tolist() == [4, place["a"], 2, 1, 1, 1, 1] and mask.sum() == 10


def test_letters_as_sentencepiece_cuts_them(tmp_path):
    """A model that it trained, with its normaliser of Unicode."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("the cat is wet, and the rats are not.\n" * 40 + "ﬁne thing\n" * 9)
    sizes = {"model_type": "char", "vocab_size": 24, "pad_id": 1, "eos_id": 2, "unk_id": 3, "bos_id": 0}
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "spm_char"), hard_vocab_limit=False, **sizes
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm_char.model"))
    ours = Tokenizer.from_pretrained(tmp_path)
    for text in ("the cat", "  two   spaces ", "ﬁ　wide ｔ", "Zoo zzz!", "a\tb"):
        assert ours.encode(text) == [*theirs.encode(text), 2], text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a SentencePiece model of single letters"),
        (b"\x0a\xff\xff", "not a whole SentencePiece model"),
        (b"hello", "not a whole SentencePiece model"),
        (b"\xff" * 9, "not a whole SentencePiece model"),
    ],
)
def test_broken_letters(tmp_path, content, message):
    (tmp_path / "spm_char.model").write_bytes(content)
    with pytest.raises(UserError, match=message):
        Tokenizer.from_pretrained(tmp_path)


def test_pieces_of_several_letters_are_refused(tmp_path):
    spm(tmp_path / "spm_char.model", more=("the",))
    with pytest.raises(UserError, match="single letters"):
        Tokenizer.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------ speaking


def test_a_wave_is_written(folder, tmp_path, capsys):
    """16 kHz, 16 bits, mono, 8 samples a frame; one seed gives one file, however the speaker is stored."""
    note.cache_clear()
    for name, speaker, seed in (("a", "one.npy", 3), ("b", "one.safetensors", 3), ("c", "flat.npy", 4)):
        options = ("--model", folder, "--speaker", folder / speaker, "--seed", seed, "--out", tmp_path / f"{name}.wav")
        command("speak", "1 cat, ä rat.", *options)
    said = capsys.readouterr()
    assert said.out.count("s of speech written to") == 3
    assert "numbers are read as words: one cat, ä rat." in said.err and "does not know 'ä'" in said.err
    first, again, other = ((tmp_path / f"{name}.wav").read_bytes() for name in "abc")
    assert first == again != other
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert file.getparams()[:3] == (1, 2, 16_000) and file.getnframes() % 16 == 0 and file.getnframes() > 0


def failure(capsys, folder: Path, *argv: object) -> str:
    with pytest.raises(SystemExit) as stop:
        run_program(lambda: command("speak", *argv))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


def test_bad_input(folder, tmp_path, capsys):
    np.save(tmp_path / "short.npy", np.ones(7, np.float32))
    np.save(tmp_path / "nan.npy", np.full((1, 8), np.nan))
    np.save(tmp_path / "objects.npy", np.array([{}]))
    (tmp_path / "text.npy").write_text("hello")
    save_file({"a": torch.ones(8), "b": torch.ones(8)}, tmp_path / "two.safetensors")
    (tmp_path / "there.wav").write_bytes(b"")
    usual = {"--model": folder, "--speaker": folder / "one.npy", "--out": tmp_path / "a.wav"}
    for text, change, message in (
        ("the cat", {"--speaker": None}, "a speaker embedding of 8 numbers: give --speaker FILE"),
        ("the cat", {"--speaker": tmp_path / "short.npy"}, "is (7,); this model takes 8 numbers"),
        ("the cat", {"--speaker": tmp_path / "nan.npy"}, "holds NaN or infinite numbers"),
        ("the cat", {"--speaker": tmp_path / "text.npy"}, "must be a .npy or .safetensors file of one array"),
        ("the cat", {"--speaker": tmp_path / "objects.npy"}, "must be a .npy or .safetensors file of one array"),
        ("the cat", {"--speaker": tmp_path / "two.safetensors"}, "must be a .npy or .safetensors file of one array"),
        ("the cat", {"--speaker": tmp_path / "none.npy"}, "cannot read"),
        (" ", {}, "the text is empty: give what to say"),
        ("ÄÖÜ", {}, "holds no letter that this voice knows"),
        ("the cat " * 9, {}, "the text is 73 letters long, the model reads 40: give it in sentences"),
        ("the cat", {"--out": tmp_path / "there.wav"}, "exists already; give a new file"),
        ("the cat", {"--out": tmp_path}, "is a folder; give a new file"),
        ("the cat", {"--out": folder / "one.npy" / "a.wav"}, "is a file"),
        ("the cat", {"--model": tmp_path / "nowhere"}, "no folder"),
        ("the cat", {"--vocoder": folder}, "expected speecht5_hifigan, hifigan"),
    ):
        options = [part for pair in (usual | change).items() if pair[1] is not None for part in pair]
        assert message in failure(capsys, folder, text, *options), message
    assert not (tmp_path / "a.wav").exists()


def test_a_vocoder_of_other_mels_and_several(folder, tmp_path):
    vocoder(tmp_path / "other", model_in_dim=10)
    with pytest.raises(UserError, match="is for 10 mels at 16,000 Hz; .* gives 12 at 16,000 Hz"):
        Voice.open(folder, tmp_path / "other", CPU)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "tts").mkdir()
    assert vocoder_near(tmp_path / "tts") == tmp_path / "other"
    vocoder(tmp_path / "tts" / "inside")
    with pytest.raises(UserError, match="several vocoders"):
        vocoder_near(tmp_path / "tts")


def test_griffin_lim_where_there_is_no_vocoder(folder, tmp_path, capsys):
    note.cache_clear()
    voice(tmp_path / "tts", num_mel_bins=80)
    spm(tmp_path / "tts" / "spm_char.model")
    opened = Voice.open(tmp_path / "tts", None, CPU)
    assert "Griffin-Lim guesses the phases" in capsys.readouterr().err
    speaker = read_speaker(folder / "one.npy", 8)
    sound = opened.speak("a cat", speaker, 1)
    assert len(sound) % 512 == 0 and torch.equal(sound, opened.speak("a cat", speaker, 1))
    shutil.copytree(folder, tmp_path / "alone" / "tts", ignore=shutil.ignore_patterns("vocoder"))
    with pytest.raises(UserError, match="gives 12 mels, Griffin-Lim reads 80: give a --vocoder"):
        Voice.open(tmp_path / "alone" / "tts", None, CPU)


def test_a_speaker_of_another_length_is_noted(tmp_path, capsys):
    note.cache_clear()
    np.save(tmp_path / "long.npy", np.full(8, 2.0))
    read_speaker(tmp_path / "long.npy", 8)
    assert "has length 5.66, not 1: is it an x-vector?" in capsys.readouterr().err


def test_a_recogniser_writes(tmp_path):
    """The greedy tokens of `transformers`, decoded; and sound that it cannot take."""
    torch.manual_seed(2)
    theirs = recognizer(tmp_path)
    spm(tmp_path / "spm_char.model")
    writer, sound = SpeechWriter.open(tmp_path, CPU), torch.randn(500)
    ids = theirs.generate(sound[None], max_new_tokens=39, do_sample=False, num_beams=1)[0]
    assert writer.transcribe(sound) == writer.tokenizer.decode(ids.tolist()).strip() != ""
    with pytest.raises(UserError, match="cannot hear 0.00 s of sound: .*states"):
        writer.transcribe(torch.zeros(1))
