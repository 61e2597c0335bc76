"""The study of a sound: one window of a small Whisper, the weights that ran, and the page along its time."""

import json
import re

import numpy as np
import pytest
import torch
from run_helpers import command
from speech_helpers import FRAMES, reference
from voice_helpers import tiny_options, tiny_system

from vqa_scratch.audio.reading import write_wav
from vqa_scratch.errors import UserError
from vqa_scratch.study.analysis import relevancy, rollout
from vqa_scratch.study.record import take_apart
from vqa_scratch.study.report import study_data
from vqa_scratch.transcription import open_transcriber
from vqa_scratch.transcription.studied import heard_in, posteriors
from vqa_scratch.transcription.window import Window

SECONDS = 0.7  # of a window of one


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("sound")
    reference(root / "whisper", multilingual=True)
    wave = torch.randn(round(16_000 * SECONDS), generator=torch.Generator().manual_seed(4)) * 0.1
    for name, samples in (("noise", wave), ("long", wave.repeat(2)), ("silence", torch.zeros(8_000))):
        write_wav(root / f"{name}.wav", samples)
    return root


@pytest.fixture(scope="module")
def opened(root):
    return heard_in(open_transcriber(str(root / "whisper"), torch.device("cpu")), root / "noise.wav")


def test_what_is_studied_is_what_is_transcribed(root, opened):
    """The same tokens, without times; the states behind the sound are sinks; maps are whole."""
    heard = open_transcriber(str(root / "whisper"), torch.device("cpu"))
    words, subject = heard.vocabulary, opened.subject
    window = Window(heard.model.decoder, words, heard.model.encode(subject.features), subject.prompt)
    greedy = window.attempt(heard.options(subject.max_new_tokens, times=False))
    study = take_apart(opened)
    assert [token.id for token in study.tokens if token.id != words.end] == greedy.ids and greedy.ids
    (source,) = subject.sources
    assert len(source) == FRAMES // 2 and source.sinks == tuple(range(35, FRAMES // 2))
    assert study.certificate.worst <= 1e-5 and study.certificate.attentions == 3 + 2 * 2
    ids = [token.id for token in study.tokens]
    flow = rollout(opened.subject, study.trace)
    whole = flow.sources.sum(1) + flow.decoder.sum(1)
    torch.testing.assert_close(whole, torch.ones_like(whole), atol=1e-5, rtol=0)
    assert relevancy(opened.subject, ids[:1]).sources[len(opened.prompt) - 1].max() > 0


def test_the_page_has_the_sound_and_its_words(root, capsys):
    command("study", "--model", root / "whisper", "--voice", root / "noise.wav", "--out", root / "out")
    assert "certificate: |sum P - 1|" in capsys.readouterr().out
    summary = json.loads((root / "out" / "summary.json").read_text())
    assert max(summary["certificate"][k] for k in ("mass", "output", "softmax")) <= 1e-5
    page = (root / "out" / "report.html").read_text(encoding="utf-8")
    (data,) = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    sound = data["sound"]
    assert sound["seconds"] == pytest.approx(SECONDS) and sound["mel"]["shape"] == [8, 70]
    assert "".join(word for word, *_ in sound["words"]) == summary["answer"].replace(" ", "")
    times = np.array([word[1:3] for word in sound["words"]])
    assert (np.diff(times.ravel()) >= 0).all() and times.max() <= SECONDS


def test_bad_input(root):
    def refused(line: str, *more: object) -> None:
        with pytest.raises(UserError, match=line) as error:
            command("study", "--out", root / "bad", *more)
        assert "\n" not in str(error.value)

    model = ("--model", root / "whisper")
    refused("1.4 s long; a study is of one window, 1 s: cut it", *model, "--voice", root / "long.wav")
    refused("silent from beginning to end", *model, "--voice", root / "silence.wav")
    refused("there is no such sound file", *model, "--voice", root / "none.wav")
    refused("--voice FILE is all that RUN, or a --model, hears", "--voice", root / "noise.wav")
    refused("give one of them, and nothing else", *model, "--voice", root / "noise.wav", "--question", "why?")
    refused("leave out --image, --voice", *model, "--voice", root / "noise.wav", "--pointing", root)
    assert not (root / "bad").exists()


def test_a_run_that_hears_shows_what_ctc_hears(tmp_path):
    """Chances of the letters that are ever likely, at the states of the sound, as its head gives them."""
    wave = torch.randn(8_000, generator=torch.Generator().manual_seed(1)) * 0.1
    write_wav(tmp_path / "a.wav", wave)
    opened = heard_in(tiny_system(tiny_options(tmp_path)).transcriber(), tmp_path / "a.wav")
    opened.subject.max_new_tokens = 3
    study = take_apart(opened)
    assert study.certificate.worst <= 1e-5
    sound = study_data(study)["sound"]
    assert sound["posteriors"]["shape"] == [len(sound["symbols"]), 25]
    chances = posteriors(torch.tensor([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0]]), "ab")
    assert chances["symbols"] == ["blank", "a"] and chances["posteriors"]["shape"] == [2, 2]
