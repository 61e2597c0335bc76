"""Questions asked aloud: what is heard is printed and answered, and measured beside what is typed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from run_helpers import command, make_run, picture
from voice_helpers import make_voice_run

from bench import spoken as bench
from vqa_scratch import systems
from vqa_scratch.audio.reading import write_wav
from vqa_scratch.data.answers import Answer
from vqa_scratch.data.spoken import draw
from vqa_scratch.data.voices import Speaker, speak
from vqa_scratch.data.vqa_v2 import read_vqa
from vqa_scratch.errors import UserError
from vqa_scratch.systems.vqa import VQASystem


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> tuple[Path, Path, Path]:
    """(a run that answers, one that hears, a question)."""
    folder = tmp_path_factory.mktemp("runs")
    rng, question = np.random.default_rng(3), folder / "question.wav"
    write_wav(question, torch.from_numpy(speak("what color is the circle?", Speaker.draw(rng), rng).wave))
    return make_run(data, folder / "vqa"), make_voice_run(folder / "voice"), question


def test_what_is_heard_is_printed_and_answered(runs, data, capsys, monkeypatch):
    answering, hearing, question = runs
    words = "what is is the circle?"
    monkeypatch.setattr("vqa_scratch.transcription.window.Window.hear", lambda window, options: heard(window, words))
    command("ask", answering, "--image", picture(data), "--voice", question, "--voice-model", hearing)
    said, answer = capsys.readouterr().out.splitlines()
    (expected, *_), _ = systems.load(answering).ask(picture(data), words)
    assert said == f"heard: {words}" and answer.startswith(f"{expected.text or '(nothing)'}  (")
    systems.load(hearing).export(hearing.parent / "released")
    command(
        "ask", answering, "--image", picture(data), "--voice", question, "--voice-model", hearing.parent / "released"
    )
    assert capsys.readouterr().out.splitlines()[0] == said


def heard(window, words: str):
    from vqa_scratch.transcription.window import Try

    return Try(window.vocabulary.encode(f" {words}"), words, 0.0, -0.1, 0.0)


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--voice", "QUESTION"], "give --voice-model"),
        (["--voice-model", "HEARING"], "--voice-model hears --voice, a sound file: give both"),
        (
            ["--voice", "QUESTION", "--question", "what?"],
            "--question is typed, --voice spoken",
        ),
        (["--voice", "TEXT", "--voice-model", "HEARING"], "text.wav: no WAV, FLAC, OGG, MP3 or AIFF"),
        (["--voice", "SILENCE", "--voice-model", "HEARING"], "hears no words in .*silence.wav"),
        (["--voice", "QUESTION", "--voice-model", "ANSWERING"], "is a run of preset shapes, which hears nothing"),
    ],
)
def test_what_cannot_be_heard_is_one_line(runs, data, flags, fault):
    answering, hearing, question = runs
    text, silence = question.with_name("text.wav"), question.with_name("silence.wav")
    text.write_text("what color is the circle?")
    write_wav(silence, torch.zeros(16_000))
    names = {"QUESTION": question, "HEARING": hearing, "TEXT": text, "SILENCE": silence, "ANSWERING": answering}
    with pytest.raises(UserError, match=fault):
        command("ask", answering, "--image", picture(data), *(names.get(part, part) for part in flags))


def test_spoken_questions_beside_typed_ones(runs, data, monkeypatch):
    """Heard perfectly, they are answered as typed ones; where nothing is heard no word is right, and no answer."""
    answering, hearing, _ = runs

    def heard_by(voice, samples, kind, seed):
        return [sample.question if kind == "clean" else "" for sample in samples]

    def answer(self, samples, **shown):
        return {s.question_id: Answer(s.answer if len(s.question) > 1 else "?", 1.0, 1) for s in samples}

    monkeypatch.setattr(bench, "built_in", lambda options: data)
    monkeypatch.setattr(bench, "heard_by", heard_by)
    monkeypatch.setattr(VQASystem, "answer", answer)
    section = bench.run(answering, hearing, answering, 6, 0, "the command")
    rows = [bench.results.cells_of(line) for line in section.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == [
        "typed",
        "spoken, clean",
        "spoken, noise and echo",
        "spoken, clean, no transcript",
    ]
    assert rows[1][2:] == ["1.0000", "at least 0.98", "0.0000"] and rows[2][2:] == ["0.0000", "", "1.0000"]
    assert rows[3][2:] == ["1.0000", "at least 0.93", ""]
    monkeypatch.undo()
    long = ["is there a small circle " * 4 + "?"]
    monkeypatch.setattr(bench, "draw", lambda texts, *seed, unseen: draw(texts[:2] + 3 * long, *seed, unseen=unseen))
    texts = bench.heard_by(systems.load(hearing), read_vqa(data, "test").samples[:5], "clean", 0)
    assert len(texts) == 5 and all(isinstance(text, str) for text in texts), "of a long one the first window"
