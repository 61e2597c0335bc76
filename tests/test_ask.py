"""`ask` on a run folder: answers, decoding, candidates, and what it refuses."""

import contextlib
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_helpers import by_hand, command, make_run, picture

from vqa_scratch import systems
from vqa_scratch.errors import UserError


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    return make_run(data, tmp_path_factory.mktemp("conv") / "run", question_prompt=True)


def test_ask(run, data, capsys):
    """The answer and probability of a decoding written out here."""
    for question in ("what color is the square?", "how many objects are there?"):
        command("ask", run, "--image", picture(data), "--question", f"  {question} ")
        text, probability = by_hand(run, picture(data), question)
        assert capsys.readouterr().out == f"{text or '(nothing)'}  (probability {probability:.3f})\n"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "P", "CMYK", "I;16", "YCbCr"])
@pytest.mark.parametrize("size", [(1, 1), (3, 500)])
def test_ask_takes_any_image(run, tmp_path, mode, size, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    suffix = {"CMYK": "tiff", "YCbCr": "tiff"}.get(mode, "png")
    image.save(tmp_path / f"image.{suffix}")
    command("ask", run, "--image", tmp_path / f"image.{suffix}", "--question", "is there a circle?")
    assert "(probability 0." in capsys.readouterr().out


@pytest.mark.parametrize("question", ["", "   ", "\n"])
def test_ask_nothing(run, data, question):
    with pytest.raises(UserError, match="the question is empty"):
        command("ask", run, "--image", picture(data), "--question", question)


def answers_of(capsys) -> tuple[list[str], str]:
    printed = capsys.readouterr()
    return printed.out.splitlines(), printed.err


def test_a_prompt_from_a_pipe(run, data, tmp_path, capsys, monkeypatch):
    """One answer a line, as for --question; a bad line is said and skipped; `image` changes the image."""
    other = tmp_path / "an other.png"
    Image.new("RGB", (64, 64), (200, 30, 30)).save(other)
    first, second = "what color is the square?", "how many objects are there?"
    expected = []
    for image, question in ((picture(data), first), (picture(data), second), (other, first)):
        command("ask", run, "--image", image, "--question", question)
        expected += answers_of(capsys)[0]
    lines = [first, f"image {tmp_path}/none.png", second, f"image '{other}'", first, "", "never read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    command("ask", run, "--image", picture(data))
    said, errors = answers_of(capsys)
    assert said == expected
    assert errors.count("\n") == 1 and "none.png not found" in errors


@pytest.mark.parametrize("text", ["", "\n"])
def test_a_pipe_without_a_question(run, data, text, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    with pytest.raises(UserError, match="give --question, or one a line on stdin"):
        command("ask", run, "--image", picture(data))


def test_a_prompt_of_bytes_that_are_no_text(run, data, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"is there \xff?\n"), "utf-8"))
    with pytest.raises(UserError, match="the questions on stdin are not utf-8 text"):
        command("ask", run, "--image", picture(data))
    monkeypatch.setattr("sys.stdin", io.StringIO("image ~nobody/x.png\nimage\nimage a\0b\n"))
    command("ask", run, "--image", picture(data))
    said, errors = answers_of(capsys)
    assert said == [] and errors.count("\n") == 3 and all(len(line) < 300 for line in errors.splitlines())


def test_a_prompt_needs_an_image_to_begin_with(run, tmp_path):
    with pytest.raises(UserError, match="none.png not found"):
        command("ask", run, "--image", tmp_path / "none.png")


def test_a_prompt_at_a_terminal(run, data):
    """A greeting that names the file by its base name, an answer, and an end by an empty line."""
    program = [sys.executable, "-m", "vqa_scratch", "ask", str(run), "--image", str(picture(data))]
    ours, theirs = pty.openpty()
    with subprocess.Popen(program, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True) as process:
        os.close(theirs)
        os.write(ours, b"is there a circle?\n\n")
        shown = b""
        with contextlib.suppress(OSError):  # how Linux tells the end of a terminal
            while select.select([ours], [], [], 60)[0] and (part := os.read(ours, 1000)):
                shown += part
        assert process.wait(60) == 0
    os.close(ours)
    shown = shown.decode()
    assert f"about {picture(data).name}" in shown and str(picture(data).parent) not in shown
    assert shown.count("(probability ") == 1


def test_a_run_takes_text_or_a_path(run, data):
    opened = systems.load(run)
    assert opened.ask(str(picture(data)), "is there a circle?") == opened.ask(picture(data), "is there a circle?")


def test_ask_for_the_best_of_the_training_answers(run, data, capsys):
    command("ask", run, "--image", picture(data), "--question", "is there a circle?", "--top", "3")
    lines = capsys.readouterr().out.splitlines()
    answers, chances = zip(*(line[:-1].split("  (probability ") for line in lines), strict=True)
    assert len(lines) == 3 and set(answers) <= set(json.loads((run / "answers.json").read_text()))
    assert list(chances) == sorted(chances, reverse=True)


def test_ask_with_another_decoding(run, data, capsys):
    """Beams find an answer at least as likely; a seed repeats what it drew."""
    asked = ("ask", run, "--image", picture(data), "--question", "how many circles are there?")
    said = []
    for flags in (
        (),
        ("--num-beams", 3, "--length-penalty", 0),
        *[("--do-sample", "--temperature", 2, "--seed", 5)] * 2,
    ):
        command(*asked, *flags)
        said.append(capsys.readouterr().out)
    chance = [float(line.rsplit(" ", 1)[1].strip(")\n")) for line in said]
    assert chance[1] >= chance[0] and said[2] == said[3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", 0.5], "temperature has an effect on sampling only"),
        (["--top-p", 0.5], "top_p has an effect on sampling only"),
        (["--do-sample", "--num-beams", 2], "beams and sampling exclude each other"),
        (["--num-beams", 10_000], "10000 beams, but the vocabulary has"),
        (["--early-stopping"], "early_stopping has an effect on beams only"),
        (["--min-new-tokens", 99], "min_new_tokens 99 is above max_new_tokens"),
        (["--top", 2, "--num-beams", 2], "leave out --num-beams"),
        (["--max-new-tokens", 100_000], "max_new_tokens 100000 is too much: the decoder has 64 positions"),
        (["--tempreature", 1], "did you mean --temperature?"),
    ],
)
def test_ask_with_contradictions(run, data, flags, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        command("ask", run, "--image", picture(data), "--question", "is there a circle?", *flags)
    assert "\n" not in str(caught.value)


def test_ask_for_as_many_tokens_as_there_are_positions(run, data, capsys):
    """The number that the error names is the most that works."""
    asked = ("ask", run, "--image", picture(data), "--question", "is there a circle?", "--max-new-tokens")
    with pytest.raises(UserError) as caught:
        command(*asked, 64)
    most = int(re.search(r"leaves (\d+) behind", str(caught.value))[1])
    command(*asked, most)
    with pytest.raises(UserError):
        command(*asked, most + 1)


def test_ask_ten_thousand_words(run, data, capsys):
    """It is cut, and a note says so; what is left decides the answer."""
    words = "is there a red circle or " * 1_667
    command("ask", run, "--image", picture(data), "--question", words)
    printed = capsys.readouterr()
    assert len(words.split()) > 10_000
    assert printed.err == "note: the question is longer than 32 tokens; only its beginning was read\n"
    command("ask", run, "--image", picture(data), "--question", words[:2_000])
    assert capsys.readouterr().out == printed.out


def test_ask_in_unknown_characters(run, data, capsys):
    command("ask", run, "--image", picture(data), "--question", "is there a \N{SNOWMAN}?")
    assert capsys.readouterr().err.startswith("note: the text encoder has no tokens for \N{SNOWMAN}, ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"no image at all", "is not an image"),
        (b"half", "is damaged or truncated"),
        (None, "there is no such image"),
        (b"huge", "over the limit"),
    ],
)
def test_ask_about_a_bad_image(run, data, tmp_path, content, message, monkeypatch):
    path = tmp_path / "bad.png"
    if content == b"half":
        content = picture(data).read_bytes()[:300]
    if content == b"huge":
        content = picture(data).read_bytes()
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        command("ask", run, "--image", path, "--question", "what is it?")
    assert "\n" not in str(caught.value) and "bad.png" in str(caught.value)
