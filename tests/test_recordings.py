"""A user's own recordings: tables and folders, how they are split, and a line for everything that cannot be used."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from vqa_scratch.audio.reading import write_wav
from vqa_scratch.data.recordings import list_recordings, read_recordings
from vqa_scratch.errors import UserError

WINDOW = 200  # frames, 2 s


def sound(path: Path, seconds: float = 1.0) -> None:
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(round(16_000 * seconds)) * 0.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_wav(path, noise)


def table(folder: Path, rows: list[str], head: str = "audio,text", name: str = "all.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join([head, *rows]) + "\n")
    return folder / name


def test_every_fault_is_a_line(tmp_path, capsys):
    """What is left out is counted by reason, each with its first example; the rest is read."""
    for name, seconds in {"good": 1, "tight": 0.1, "long": 3, "short": 0.005}.items():
        sound(tmp_path / f"{name}.wav", seconds)
    (tmp_path / "text.wav").write_text("what color is the circle?")
    (tmp_path / "empty.wav").write_bytes(b"")
    rows = ["good.wav,What is this?", "good.wav,again", "none.wav,hello", "text.wav,hello", "empty.wav,hello"]
    rows += ["long.wav,hello", "short.wav,a", "tight.wav,a long sentence", "tight.wav,"]
    source = table(tmp_path, [*rows, '"a.wav","na\u00efve"'])
    sound(tmp_path / "a.wav")
    (one,) = read_recordings(source, "all", WINDOW)
    assert (one.name, one.text, one.kind, one.mel.shape) == ("good.wav", "What is this?", "recorded", (100, 80))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "all: kept 1 of 10 recordings, 1 s of sound"
    for reason, example in {
        "2: the recording cannot be read": "text.wav: no WAV, FLAC, OGG, MP3 or AIFF (it begins with b'what col')",
        "2: the recording occurred before": "line 3: good.wav",
        "1: the recording is missing": "line 4: none.wav",
        "1: longer than --window 2 s": "long.wav: 3.0 s",
        "1: the recording is shorter than a frame of 10 ms": "short.wav: 80 samples",
        "1: the transcript is longer than CTC can align with its sound": "5 states of 20 ms, its letters need 15",
        "1: the transcript cannot be spelled": "'\u00ef' in 'na\u00efve' is not in the alphabet",
    }.items():
        (line,) = [line for line in lines if f"left out {reason} " in line]
        assert example in line, line
    assert len(lines) == 2 + 7


def test_nothing_left_is_one_line(tmp_path):
    (tmp_path / "a.wav").write_text("no sound")
    source = table(tmp_path, ["a.wav,hello"])
    with pytest.raises(
        UserError, match="no recording of .*all.csv is left: 1 because the recording cannot be read .a*"
    ):
        read_recordings(source, "all", WINDOW)
    with pytest.raises(
        UserError, match="has no column for the transcript: call one transcript or transcription or text"
    ):
        read_recordings(table(tmp_path / "b", ["a.wav,x"], "audio,label"), "all", WINDOW)
    with pytest.raises(
        UserError, match="holds no recordings of split train: neither a table nor sound files .* with texts"
    ):
        (tmp_path / "c").mkdir()
        read_recordings(tmp_path / "c", "train", WINDOW)
    with pytest.raises(UserError, match="not found: there is no such file or folder"):
        read_recordings(tmp_path / "d", "train", WINDOW)


def names(source: Path, split: str) -> set[str]:
    return {one.name for one in list_recordings(source, split)[1]}


def test_splits(tmp_path):
    """By a column, by files, by folders, by speakers, or a tenth each."""
    rows = [f"{n}.wav,hello,{'dev' if n % 3 == 0 else 'train'}" for n in range(9)]
    named = table(tmp_path / "named", rows, "path,sentence,split")
    assert names(named, "val") == {"0.wav", "3.wav", "6.wav"}
    assert len(names(named, "train")) == 6 and len(names(named, "all")) == 9
    speakers = table(
        tmp_path / "speakers", [f"{n}.wav,hello,{'abcdefghij'[n % 10]}" for n in range(40)], "path,text,speaker"
    )
    parts = [names(speakers, split) for split in ("train", "val", "test")]
    assert list(map(len, parts)) == [32, 4, 4] and len(set.union(*parts)) == 40
    assert all(len({int(name[:-4]) % 10 for name in part}) == size for part, size in zip(parts, (8, 1, 1), strict=True))
    plain = table(tmp_path / "plain", [f"{n}.wav,hello" for n in range(20)])
    assert [len(names(plain, split)) for split in ("train", "val", "test")] == [16, 2, 2]
    table(tmp_path / "files", ["a.wav,hello"], name="train.csv")
    table(tmp_path / "files", ["b.wav,hello"], name="test.csv")
    assert names(tmp_path / "files", "test") == {"b.wav"}


def test_sound_files_beside_texts(tmp_path):
    for name in [*(f"train/speaker{n}/a" for n in range(2)), "test/b"]:
        sound(tmp_path / f"{name}.wav", 0.5)
        (tmp_path / f"{name}.txt").write_text(f"hello {random.Random(name).choice(['there', 'you'])}\n")
    (one,) = read_recordings(tmp_path, "test", WINDOW)
    assert one.name == "test/b.wav" and one.text.startswith("hello ")
    assert len(read_recordings(tmp_path, "train", WINDOW)) == 2
