"""`bench espeak` with a program in the place of espeak-ng: what is recorded for which split, and the table."""

import csv
import os
import wave
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from bench import espeak
from vqa_scratch.data.recordings import read_recordings
from vqa_scratch.data.voices import is_unseen
from vqa_scratch.systems.voice_report import WAYS

PROGRAM = """#!/bin/sh
if [ "$1" = --voices=variant ]; then
    echo "Pty Language       Age/Gender VoiceName          File                 Other Languages"
    for name in a b c d e f g h; do
        echo " 5  variant         --/M      $name               !v/$name              "
    done
else
    while [ "$1" != -w ]; do shift; done
    cp "SILENCE" "$2"
fi
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    path = tmp_path / "bin" / "espeak-ng"
    path.parent.mkdir()
    with wave.open(str(tmp_path / "silence.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(22050)
        file.writeframes(bytes(2 * 22050 * 3))
    path.write_text(PROGRAM.replace("SILENCE", str(tmp_path / "silence.wav")))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")


def test_sentences_and_variants_of_test_are_not_trained_on(program, tmp_path):
    given = ["--out", str(tmp_path / "out"), "--utterances", "30", "--tested", "12"]
    ended = CliRunner().invoke(espeak.command, given)
    assert ended.exit_code == 0 and f"--data {tmp_path / 'out'}" in ended.output
    with (tmp_path / "out" / espeak.TABLE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    splits = {name: [row for row in rows if row["split"] == name] for name in ("train", "val", "test")}
    assert [len(some) for some in splits.values()] == [30, 3, 12]
    for name, some in splits.items():
        assert all(is_unseen(row["text"]) == (name != "train") for row in some)
        assert {row["speaker"].split("+")[1] for row in some} <= ({*"bcdfgh"} if name == "train" else {*"ae"})
    assert len(read_recordings(tmp_path / "out", "test", 400)) == 12


def test_a_row_a_run(program, tmp_path, monkeypatch):
    def load(path):
        errors = {way: 0.5 if path == "drawn" else 0.01 for way in WAYS}
        found = {
            "word_errors": errors,
            "baselines": {"shuffled_audio": dict.fromkeys(WAYS, 0.9)},
            "utterances_heard": 7,
        }
        return SimpleNamespace(
            recognise=lambda folder, split, limit: {"test": found}[split],
            model=SimpleNamespace(parameters=lambda: [SimpleNamespace(numel=lambda: 1234)]),
        )

    monkeypatch.setattr(espeak.systems, "load", load)
    said = espeak.run(tmp_path, {"never": ["drawn"], "trained": ["own"]}, "the command")
    assert "| drawn voices alone | 1,234      | 0.5000 (goal at most 0.25)" in said and "`the command`" in said
    assert "| these recordings   | 1,234      | 0.0100 (goal at most 0.02)" in said and "- 7 recordings" in said


def test_without_the_program(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(espeak.UserError, match="espeak-ng is not installed"):
        espeak.record(tmp_path / "out", 30, 12, 0)
