"""The system that hears: its utterances and batches, its loss, its four ways of decoding, and what it leaves."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from run_helpers import command
from voice_helpers import make_voice_run, tiny_options, tiny_system

from vqa_scratch import systems
from vqa_scratch.audio.features import log_mel
from vqa_scratch.audio.reading import read_audio, write_wav
from vqa_scratch.data import spoken
from vqa_scratch.data.spoken import ALPHABET, CLEAN, HARD, drawn_split, letters_of, masked, plain
from vqa_scratch.data.voices import is_unseen
from vqa_scratch.errors import UserError
from vqa_scratch.metrics import word_error_rate
from vqa_scratch.systems.splits import Key
from vqa_scratch.systems.voice_report import WAYS, error_rates
from vqa_scratch.training.precision import Precision
from vqa_scratch.transcription import window
from vqa_scratch.transcription.words import Word, by_letters, spans_of


@pytest.fixture(scope="module")
def drawn():
    return {name: drawn_split(name, 4, 0) for name in ("train", "val", "test")}


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    return tiny_system(tiny_options(tmp_path_factory.mktemp("voice")))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_voice_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def question(run) -> Path:
    """A recording of a drawn voice."""
    rng, path = np.random.default_rng(3), run.parent / "question.wav"
    speech = spoken.speak("what color is the circle?", spoken.Speaker.draw(rng), rng)
    write_wav(path, torch.from_numpy(speech.wave))
    return path


# ------------------------------------------------------------------------------------------------ utterances


def test_drawn_utterances(drawn):
    """Each split has its own; the first ones do not depend on how many are drawn."""
    assert [[one.kind for one in drawn[name]] for name in ("test", "train")] == [[CLEAN, HARD] * 2, ["mixed"] * 4]
    assert all(is_unseen(one.text) == (name != "train") for name, some in drawn.items() for one in some)
    again = drawn_split("val", 2, 0)
    for ours, theirs in zip(drawn["val"][:2], again, strict=True):
        assert (ours.text, ours.words) == (theirs.text, theirs.words) and np.array_equal(ours.mel, theirs.mel)
    assert {one.text for one in drawn["val"]} != {one.text for one in drawn["test"]}
    assert list(spoken.facts(again)) == list(spoken.facts(drawn["val"]))[:2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("What color is the circle?", "what color is the circle"),
        ("Don\u2019t stop - 2 circles!", "don't stop two circles"),
        ('"Left," he said', "left he said"),
    ],
)
def test_what_is_said(text, said):
    assert plain(text) == said and "".join(ALPHABET[label - 1] for label in letters_of(text)) == said


@pytest.mark.parametrize(
    ("text", "fault"), [("na\u00efve", "'\u00ef' in"), ("\u65e5\u672c", "'\u65e5' in"), ("?!", "says nothing")]
)
def test_what_cannot_be_spelled_is_one_line(text, fault):
    with pytest.raises(UserError, match=fault):
        letters_of(text)


@pytest.mark.parametrize(
    ("heard", "errors"),
    [
        ("where is the circle", 0),
        ("where the circle", 1),
        ("where is is the circle", 1),
        ("what is a circle", 2),
        ("", 4),
    ],
)
def test_word_errors(heard, errors):
    """Over all texts together: a long one counts more."""
    assert word_error_rate(["where is the circle", "a"], [heard, "a"]) == pytest.approx(errors / 5)


def test_shuffled_audio_compares_with_another_utterance(drawn):
    utterances = drawn["test"]
    heard = {way: {row: one.text for row, one in enumerate(utterances)} for way in WAYS}
    assert set(error_rates(utterances, heard).values()) == {0.0}
    assert min(error_rates(utterances, heard, other=2).values()) > 0.3
    heard["ctc beam"][1] = ""
    one = len(plain(utterances[1].text).split()) / sum(
        len(plain(u.text).split()) for u in (utterances[1], utterances[3])
    )
    assert error_rates(utterances, heard, HARD)["ctc beam"] == pytest.approx(one)
    assert error_rates(utterances, heard, CLEAN)["ctc beam"] == 0.0


# ------------------------------------------------------------------------------------------------ batches and loss


def test_a_window_is_that_of_whisper(system):
    """An utterance filled up with silence is the log-mel of its samples filled up with zeros, to the precision of fp16;
    but for the last frames of the sound, which see what is behind them."""
    rng = np.random.default_rng(0)
    wave = torch.from_numpy(spoken.speak("where is the circle?", spoken.Speaker.draw(rng), rng).wave)
    utterance = spoken.Utterance(0, "where is the circle?", spoken.mel_of(wave), CLEAN)
    batch = system.listed([utterance]).batch(np.array([0]))
    expected = log_mel(wave, seconds=4.0)
    length = len(utterance.mel)
    off = (batch.features[0] - expected).abs()
    assert off[:, : length - 2].max() < 2e-3 and off[:, length + 2 :].max() < 2e-3
    assert batch.states.tolist() == [-(-length // 2)] and length < 400


@pytest.mark.parametrize(
    ("utterances", "accumulate", "timed"), [(16, 1, 16), (16, 2, 8), (64, 1, 16), (256, 1, 32), (2, 1, 2)]
)
def test_formats_are_timed_on_an_eighth_of_a_step_or_sixteen_samples(
    system, monkeypatch, utterances, accumulate, timed
):
    """Four utterances fit into the caches of a machine on which sixteen are twice as fast in bf16."""
    options, seen, loss = replace(system.options, accumulate=accumulate), [], system.loss
    monkeypatch.setattr(system, "options", options)
    monkeypatch.setattr(system, "epoch", lambda number: [Key(np.resize(np.arange(4), utterances), (0, 0))])
    monkeypatch.setattr(system, "loss", lambda batch: seen.append(batch.counts[0]) or loss(batch))
    system.trial()(Precision("fp32", torch.device("cpu")))
    assert seen == [timed]


def test_masks_depend_on_the_seed_and_the_row_alone(system):
    train = system.spoken["train"]
    (key, *_), rows = system.epoch(0), np.array([3, 1])
    again, alone = system.batch(key), train.batch(rows[1:], 2, (0, 7)).features[0]
    assert torch.equal(system.batch(key).features, again.features)
    assert torch.equal(train.batch(rows, 2, (0, 7)).features[1], alone)
    assert not torch.equal(train.batch(rows, 2, (0, 8)).features[1], alone)
    mel = np.ones((90, 80), np.float16)
    shown = masked(mel, 2, np.random.default_rng(0)) == 0
    assert mel.min() == 1 and 0 < shown.sum() <= 2 * (10 * 90 + 20 * 80)
    assert sorted(row for key in system.epoch(1) for row in key.rows) == list(range(12))


def by_hand(system, batch) -> torch.Tensor:
    """The loss in the functions of torch."""
    whisper = system.model.whisper
    states = whisper.encode(batch.features)
    logits = whisper(batch.features, batch.decoder_input_ids)
    written = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum")
    log_probs = system.model.ctc(states).log_softmax(-1).transpose(0, 1)
    lengths = (batch.letters >= 0).sum(1)
    spelled = F.ctc_loss(log_probs, batch.letters.clamp(min=0), batch.states, lengths, reduction="sum")
    return 0.7 * written + 0.3 * spelled


def test_the_loss_is_that_of_both_heads(system):
    batch = system.spoken["val"].batch(np.arange(4))
    prompt = [system.vocabulary.start, system.vocabulary.no_times]
    assert batch.decoder_input_ids[:, :2].tolist() == [prompt] * 4 and batch.labels[:, 0].tolist() == [-100] * 4
    said = [row[row >= 0].tolist() for row in batch.labels]
    assert [system.vocabulary.text(ids).strip() for ids in said] == [u.text for u in system.spoken["val"].samples]
    assert all(ids[-1] == system.vocabulary.end for ids in said)
    loss, right = system.loss(batch)
    assert loss.item() == pytest.approx(by_hand(system, batch).item(), rel=1e-5) and 0 <= right <= batch.counts[1]
    parts = sum(system.loss(part)[0].item() for part in batch.parts(3))
    assert parts == pytest.approx(loss.item(), rel=1e-5)


def test_a_silent_batch_pays_nothing(system):
    batch = system.spoken["val"].batch(np.arange(2)).silent()
    loss, right = system.loss(batch)
    loss.backward()
    assert batch.counts == (0, 0) and loss.item() == right.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in system.model.parameters())
    system.model.zero_grad(set_to_none=True)


def test_times_of_words_on_a_path():
    """Letters of "a be": the space is of no word; times in states of 20 ms."""
    path = [-1, 0, 0, -1, 1, 2, -1, 3, -1]
    assert spans_of(letters_of("a be"), path) == [
        (0.02, pytest.approx(0.06)),
        (pytest.approx(0.1), pytest.approx(0.16)),
    ]


def test_words_are_timed_by_their_letters():
    """Logits that spell "a be" in nine states; what CTC cannot spell keeps its times."""
    logits = torch.zeros(1, 9, 1 + len(ALPHABET))
    logits[0, range(9), [0, 3, 3, 0, 1, 4, 0, 7, 0]] = 9.0
    words = [(Word(" A", 0.5, 0.6, 0.9), 1), (Word(" be?", 0.6, 0.7, 0.8), 2)]
    (one, _), (two, count) = by_letters(words, logits)
    assert (one.start, one.end, two.start, two.end) == pytest.approx((0.02, 0.06, 0.1, 0.16))
    assert (one.text, two.text, two.probability, count) == (" A", " be?", 0.8, 2)
    for text in (" \u00e9", " 42", " far too long to be said in half a second"):
        told = [(Word(text, 0.5, 0.6, 0.9), 1)]
        assert by_letters(told, logits.repeat(1, 3, 1)) == told


# ------------------------------------------------------------------------------------------------ a run


def test_four_ways_to_hear(run):
    """Their figures stand side by side; greedy decoding is a plain loop over the whole model, or over the frames."""
    opened = systems.load(run)
    figures = opened.recognise(None, "test", None)
    assert list(figures["word_errors"]) == list(WAYS) and set(figures["word_errors_by_kind"]) == {CLEAN, HARD}
    assert figures["utterances_heard"] == 4 and figures["wer"] == figures["word_errors"][WAYS[0]]
    opened.train_on(systems.find("voice").read(opened.options))
    heard = opened.hear(opened.spoken["test"], [np.array([2])], WAYS)
    assert [list(texts) for texts in heard.values()] == [[2]] * 4
    batch, ids = opened.spoken["test"].batch(np.array([2])), list(opened.prompt)
    with torch.no_grad():
        while len(ids) < 2 + 64 and ids[-1] != opened.vocabulary.end:
            scores = opened.model.whisper(batch.features, torch.tensor([ids]))[0, -1]
            scores[list(opened.barred)] = -math.inf
            ids.append(int(scores.argmax()))
        best = opened.model.ctc(opened.model.whisper.encode(batch.features))[0, : int(batch.states)].argmax(-1).tolist()
    assert heard["attention greedy"][2] == opened.vocabulary.text(ids[2:]).strip() != ""
    spelled = [label for label, before in zip(best, [0, *best], strict=False) if label not in (0, before)]
    assert heard["ctc greedy"][2] == "".join(ALPHABET[label - 1] for label in spelled)


@pytest.fixture
def one_try(monkeypatch):
    """What is written first counts, however unlikely: so short a training makes nothing likely."""
    for name, value in {"UNLIKELY": -math.inf, "REPETITIVE": math.inf, "SILENT": 1.0}.items():
        monkeypatch.setattr(window, name, value)


def test_the_commands_hear_the_same(run, question, capsys, one_try):
    opened = systems.load(run)
    command("transcribe", run, question, "--words")
    line, *words = capsys.readouterr().out.splitlines()
    mel = spoken.Utterance(0, "what color is the circle?", spoken.mel_of(read_audio(question)), CLEAN)
    heard = opened.hear(opened.listed([mel]), [np.array([0])], WAYS[:1])[WAYS[0]][0]
    assert line == heard and len(words) == len(heard.split())
    command("evaluate", run, "--split", "val", "--limit", 2)
    told = json.loads((run / "evaluation.json").read_text())
    assert told["utterances_heard"] == 2 and "ctc beam" in capsys.readouterr().out
    for argv, fault in (
        ((run, question, "--times"), "has no tokens of times: leave out --times"),
        ((run,), "give RUN and FILE, or --model and FILE; here are 1 paths"),
        ((run, question, "--language", "de"), "knows English alone"),
    ):
        with pytest.raises(UserError, match=fault):
            command("transcribe", *argv)
    with pytest.raises(UserError, match="too long for .*: it hears 4 s"):
        list(opened.transcriber().transcribe(torch.ones(16_000 * 5)))
    with pytest.raises(UserError, match="which answers nothing"):
        opened.ask(question, "what?")


def test_the_exported_readme_hears_what_the_run_hears(run, question, tmp_path, monkeypatch, capsys, one_try):
    """Its program, run as it stands with the models of `transformers`; the folder is a --model too."""
    (note,) = systems.load(run).export(tmp_path / "out")
    assert "no CTC head" in note
    command("transcribe", run, question)
    ours = capsys.readouterr().out.strip()
    command("transcribe", "--model", tmp_path / "out", question)
    assert capsys.readouterr().out.strip() == ours
    monkeypatch.chdir(tmp_path / "out")
    (tmp_path / "out" / "recording.wav").write_bytes(question.read_bytes())
    program = re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.S)[1]
    exec(compile(program, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip() == ours


def test_drawn_voices_of_another_split(tmp_path):
    with pytest.raises(UserError, match="drawn voices have no split dev; give --data"):
        systems.find("voice").read(tiny_options(tmp_path, val_split="dev"))
    with pytest.raises(UserError, match="--window 1 is too short: no drawn utterance"):
        systems.find("voice").read(tiny_options(tmp_path, window=1))
