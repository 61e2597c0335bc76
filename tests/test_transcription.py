"""Speech to text: the vocabulary, what counts as heard, seeking, times of words, files, and what is refused.

Small random models say nothing sensible, so what a window says is often given; `test_whisper_released.py` has a real
one.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from run_helpers import command
from speech_helpers import FRAMES, LANGUAGES, SPEECH, openai_file, raw, reference, tokenizer
from transformers.models.whisper.generation_whisper import _dynamic_time_warping, _median_filter

from vqa_scratch.audio.distortion import dtw
from vqa_scratch.audio.features import HOP, RATE, log_mel
from vqa_scratch.audio.reading import write_wav
from vqa_scratch.data.text import Tokenizer
from vqa_scratch.errors import UserError
from vqa_scratch.generation_options import GenerationOptions
from vqa_scratch.transcription import Segment, open_transcriber, transcriber
from vqa_scratch.transcription.formats import written
from vqa_scratch.transcription.transcriber import cut
from vqa_scratch.transcription.vocabulary import SpeechVocabulary
from vqa_scratch.transcription.window import SAMPLES, TEMPERATURES, Try, Window
from vqa_scratch.transcription.words import Word, alignment, with_punctuation, word_times

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[False, True], ids=["en", "multi"])
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whisper")
    reference(folder, multilingual=request.param)
    return folder


@pytest.fixture(scope="module")
def opened(folder):
    return open_transcriber(str(folder), CPU)


def noise(seconds: float) -> torch.Tensor:
    return torch.randn(round(seconds * RATE), generator=torch.Generator().manual_seed(4)) * 0.1


def vocabulary(multilingual: bool = True) -> SpeechVocabulary:
    own = Tokenizer(tokenizer().backend_tokenizer, {"eos": "<|endoftext|>"})
    return SpeechVocabulary(own, multilingual, "here")


# ------------------------------------------------------------------------------------------------ the vocabulary


def test_special_tokens():
    words, theirs = vocabulary(), tokenizer().convert_tokens_to_ids
    assert words.languages == {name: theirs(f"<|{name}|>") for name in LANGUAGES}
    assert words.first_time == theirs("<|0.00|>") and words.silence == theirs("<|nospeech|>")
    prompt = words.prompt("de", "translate")
    assert prompt == theirs(["<|startoftranscript|>", "<|de|>", "<|translate|>"])
    assert vocabulary(False).prompt(None, "transcribe") == theirs(["<|startoftranscript|>"])
    said = [*words.encode(SPEECH[0]), words.first_time + 3, words.end]
    assert words.text(said) == SPEECH[0]


def test_tokens_that_are_no_speech():
    """A symbol is barred if it is one token, with or without a space; so are special tokens, but not end and times."""
    words = vocabulary()
    barred, text = words.no_speech(), {words.text([index]) for index in words.no_speech()}
    assert {'"', "(", "#", "[", "~"} <= text and not {".", ",", "?", "!", "-", "'"} & text
    assert words.encode("♪")[0] in barred and len(words.encode("♪")) > 1
    assert {words.start, words.previous, words.silence, words.translate} <= set(barred)
    assert words.end not in barred and words.no_times not in barred and words.first_time not in barred


def test_words_of_tokens():
    words = vocabulary()
    ids = words.encode(" He might, amiable: “naïve” 日本")
    found = words.words(ids, "en")
    assert [text for text, _ in found] == [" He", " might", ",", " amiable", ":", " “naïve”", " 日本"]
    assert sum(count for _, count in found) == len(ids)
    assert [text for text, _ in words.words(words.encode("日本語"), "ja")] == ["日", "本", "語"]


def test_a_tokenizer_without_the_special_tokens(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text.replace("<|startofprev|>", "<|before|>").replace("nospeech", "nothing"))
    with pytest.raises(UserError, match=r"has no <\|startofprev\|>, <\|nospeech\|>, as that of a Whisper has"):
        open_transcriber(str(copy), CPU)
    (copy / "tokenizer.json").write_text(text.replace("nospeech", "nocaptions"))  # as the .en models call it
    assert open_transcriber(str(copy), CPU).vocabulary.silence


# ------------------------------------------------------------------------------------------------ a window


def heard(text: str = " a b c d e f", average: float = -0.3, silence: float = 0.1, temperature: float = 0.0) -> Try:
    return Try([], text, temperature, average, silence)


def test_what_counts_as_heard():
    assert not heard().failed and heard().holds_speech
    assert heard(" you" * 40).repetitive and heard(" you" * 40).failed
    assert heard(average=-1.1).failed
    quiet = heard(average=-1.1, silence=0.7)
    assert not quiet.failed and not quiet.holds_speech
    assert heard(" you" * 40, average=-1.1, silence=0.7).failed  # a loop is none of silence
    assert heard(average=-0.4, silence=0.7).holds_speech and not heard(average=-0.6, silence=0.7).holds_speech
    assert heard("").ratio == 0.0


def test_tries_rise_until_one_is_good(opened, monkeypatch):
    tries, asked = [], []

    def attempt(self, options, seed=0):
        asked.append((options.temperature, options.num_beams, options.no_repeat_ngram_size))
        return tries[len(asked) - 1]

    monkeypatch.setattr(Window, "attempt", attempt)
    window, options = Window(None, None, torch.zeros(1, 1, 1), []), opened.options(40, num_beams=3)
    tries[:] = [heard(average=-2), heard(average=-1.5), heard()]
    assert window.hear(options) is tries[2]
    assert asked == [(None, 3, 0), (0.2, 1, 0), (0.4, 1, 0)]
    asked.clear()
    tries[:] = [heard(average=-2 - n / 10) for n in range(len(TEMPERATURES) + 2)]
    tries[3] = heard(average=-1.1)
    assert window.hear(options) is tries[3] and asked[-1] == (None, 3, 4)
    asked.clear()
    tries[:] = [heard(" you" * 40) for _ in range(len(TEMPERATURES) + 2)]
    assert window.hear(options) is tries[-1]


def test_a_window_equals_the_reference(opened, folder):
    """Greedy, with timestamps: the tokens, the probability of no speech, and the average log-probability."""
    theirs = hf.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    wave, words = noise(0.8), opened.vocabulary
    features = log_mel(wave, 8, seconds=FRAMES * HOP / RATE)[None]
    assert torch.equal(opened.states(wave), opened.model.encode(features))
    given = {"language": "de", "task": "translate"} if words.multilingual else {}
    prompt = words.prompt(given.get("language"), given.get("task", "transcribe"))
    tried = Window(opened.model.decoder, words, opened.states(wave), prompt).attempt(opened.options(20))
    assert [tried.ids] == raw(theirs, features, return_timestamps=True, max_new_tokens=20, **given)
    with torch.no_grad():
        logits = theirs(features, decoder_input_ids=torch.tensor([[words.start]])).logits[0, 0]
    assert tried.silence == pytest.approx(float(logits.softmax(-1)[words.silence]), rel=1e-4)


def test_samples_are_drawn_anew_by_the_seed(opened):
    window = Window(
        opened.model.decoder, opened.vocabulary, opened.states(noise(1)), opened.vocabulary.prompt("en", "transcribe")
    )
    options = opened.options(20, do_sample=True, temperature=1.0)
    assert window.attempt(options, 1) == window.attempt(options, 1) != window.attempt(options, 2)
    assert SAMPLES > 1


def test_the_average_is_that_of_scores_before_the_temperature(opened):
    """By running what was said through the modules again."""
    words = opened.vocabulary
    prompt, states = words.prompt("en", "transcribe"), opened.states(noise(1))
    window = Window(opened.model.decoder, words, states, prompt)
    options = GenerationOptions(12, words.end, do_sample=True, temperature=0.6)
    tried = window.attempt(options, 3)
    ids = torch.tensor([[*prompt, *tried.ids]])
    from vqa_scratch.nn.memory import Memory

    with torch.no_grad():
        logits = opened.model.decoder(ids, memory=[Memory(states)])[0, len(prompt) - 1 :]
    said = [*tried.ids, words.end][:12]
    chosen = logits[: len(said)].log_softmax(-1).gather(1, torch.tensor(said)[:, None])
    assert tried.average == pytest.approx(float(chosen.sum()) / (len(tried.ids) + 1), abs=1e-4)


# ------------------------------------------------------------------------------------------------ seeking

T = 100  # the first time in the ids of these tests


@pytest.mark.parametrize(
    ("ids", "segments", "step"),
    [
        ([T + 5, 1, 2, T + 30, T + 30, 3, T + 44], [(5, 30), (30, 44)], 50),  # nothing follows the last time
        ([T + 5, 1, 2, T + 30, T + 32, 3, 4], [(5, 30)], 30),  # the last segment has no end: heard again
        ([T + 5, 1, T + 30, T + 30, 3, T + 40, T + 40], [(5, 30), (30, 40)], 40),
        ([T + 5, 1, 2], [(5, 50)], 50),
        ([T + 5, 1, 2, T + 20], [(5, 20)], 50),
        ([1, 2], [(0, 50)], 50),
        ([T], [(0, 50)], 50),
        ([], [], 50),
    ],
)
def test_where_a_window_is_cut(ids, segments, step):
    found, ahead = cut(ids, T, 50)
    assert ([(first, last) for first, last, _ in found], ahead) == (segments, step)


def scripted(opened, monkeypatch, *said: list[int] | Try) -> list[list[int]]:
    """Windows hear this, one after the other, the last again and again. Returns the prompts, as they come."""
    prompts: list[list[int]] = []

    def hear(self, options):
        prompts.append(self.prompt)
        found = said[min(len(prompts), len(said)) - 1]
        return found if isinstance(found, Try) else Try(found, opened.vocabulary.text(found), 0.0, -0.2, 0.0)

    monkeypatch.setattr(Window, "hear", hear)
    return prompts


def test_segments_of_a_long_recording(opened, monkeypatch):
    words = opened.vocabulary
    time, one, two = words.first_time, words.encode(" He might"), words.encode(" been made")
    first = [time + 5, *one, time + 30, time + 30, *two]
    prompts = scripted(opened, monkeypatch, first, [time, *two, time + 45])
    found = list(opened.transcribe(noise(1.9), language="en" if words.multilingual else None))
    # The second window begins after 0.6 s, with the segment that had no end in the first; the third is 0.3 s long.
    assert [(s.start, s.end, s.text) for s in found[:2]] == [(0.1, 0.6, " He might"), (0.6, 1.5, " been made")]
    assert len(prompts) == 3 and prompts == [words.prompt("en", "transcribe")] * 3


def test_seeking_equals_the_reference(opened, folder, monkeypatch):
    """Five windows long, greedily: the same segments at the same times. The samples here are their own places, by which
    a window finds its part of one mel spectrogram, as the reference cuts it."""
    theirs = hf.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    frames, words = 437, opened.vocabulary
    mel = torch.randn(8, frames, generator=torch.Generator().manual_seed(9))
    given = {"language": "ja", "task": "transcribe"} if words.multilingual else {}
    how = {"return_timestamps": True, "return_segments": True, "do_sample": False, "max_new_tokens": 24}
    expected = theirs.generate(mel[None], attention_mask=torch.ones(1, frames, dtype=torch.long), **how, **given)[
        "segments"
    ][0]

    def states(wave):
        start = int(wave[0]) // HOP
        piece = mel[:, start : start + FRAMES]
        return opened.model.encode(torch.nn.functional.pad(piece, (0, FRAMES - piece.shape[1]))[None]).detach()

    monkeypatch.setattr(opened, "states", states)
    monkeypatch.setattr(transcriber, "LEAST_STEP", 0)
    monkeypatch.setattr(Window, "hear", Window.attempt)
    monkeypatch.setattr(words, "text", lambda ids: "".join(f"w{index}" for index in ids if index < words.end))
    wave = torch.arange(1, frames * HOP + 1, dtype=torch.float64)
    found = list(opened.transcribe(wave, **{name: text for name, text in given.items()}))
    wanted = [
        (round(float(s["start"]), 2), round(float(s["end"]), 2), words.text(s["tokens"].tolist())) for s in expected
    ]
    wanted = [one for one in wanted if one[1] > one[0] and one[2]]
    assert [(s.start, s.end, s.text) for s in found] == wanted and len(found) > 4


def test_previous_text_is_a_prompt_until_it_was_guessed(opened, monkeypatch):
    words = opened.vocabulary
    time, one = words.first_time, words.encode(" He might")
    said = [time, *one, time + 50]
    guessed = Try(said, " He might", 0.8, -0.2, 0.0)
    prompts = scripted(opened, monkeypatch, said, said, guessed, said)
    list(opened.transcribe(noise(5), language="en" if words.multilingual else None, previous_text=True))
    own = words.prompt("en", "transcribe")
    room = opened.model.config.max_positions // 2 - 1
    assert prompts == [own, [words.previous, *said, *own], [words.previous, *(said * 2)[-room:], *own], own, prompts[1]]


def test_silence_is_skipped_and_little_steps_are_made_longer(opened, monkeypatch):
    words = opened.vocabulary
    time, one = words.first_time, words.encode(" He")
    language = "en" if words.multilingual else None
    prompts = scripted(opened, monkeypatch, [time, *one, time + 1, time + 1])
    assert list(opened.transcribe(torch.zeros(RATE * 30), language=language)) == [] and not prompts
    list(opened.transcribe(noise(3), language=language))
    assert len(prompts) == 6  # half a second each
    silent = Try([time, *one, time + 40], " He", 0.0, -1.2, 0.9)
    prompts = scripted(opened, monkeypatch, silent)
    assert list(opened.transcribe(noise(3), language=language)) == [] and len(prompts) == 3
    prompts = scripted(opened, monkeypatch, words.encode(" He might"))
    (one,) = opened.transcribe(noise(0.7), language=language, times=False)
    assert (one.start, one.end, one.text) == (0.0, 0.7, " He might") and prompts[0][-1] == words.no_times
    for samples in (1, 159, 161):
        list(opened.transcribe(noise(1)[:samples], language=language))


def test_a_long_recording_takes_a_window_at_a_time(opened, monkeypatch):
    seen: list[int] = []

    def watched(wave):
        seen.append(len(wave))
        return torch.zeros(1, FRAMES // 2, 16)

    monkeypatch.setattr(opened, "states", watched)
    words = opened.vocabulary
    scripted(opened, monkeypatch, [words.first_time, *words.encode(" He"), words.first_time + 50])
    wave = torch.full((1,), 0.1).expand(1200 * RATE)  # one sample in memory
    found = sum(1 for _ in opened.transcribe(wave, language="en" if words.multilingual else None))
    assert found == len(seen) == 1200 and max(seen) == FRAMES * HOP


def test_the_language_is_found_in_the_first_window_with_sound(opened, monkeypatch):
    words = opened.vocabulary
    if not words.multilingual:
        return
    states = opened.states(noise(1))
    likeliest = Window(opened.model.decoder, words, states, [words.start]).language()
    with torch.no_grad():
        from vqa_scratch.nn.memory import Memory

        logits = opened.model.decoder(torch.tensor([[words.start]]), memory=[Memory(states)])[0, 0]
    assert likeliest == max(words.languages, key=lambda name: float(logits[words.languages[name]]))
    prompts = scripted(opened, monkeypatch, [words.first_time])
    list(opened.transcribe(torch.cat([torch.zeros(RATE), noise(1)])))
    assert prompts == [words.prompt(likeliest, "transcribe")]


# ------------------------------------------------------------------------------------------------ words


def least(cost: np.ndarray) -> float:
    """By dynamic programming in its plainest form."""
    best = np.full((cost.shape[0] + 1, cost.shape[1] + 1), np.inf)
    best[0, 0] = 0
    for i in range(cost.shape[0]):
        for j in range(cost.shape[1]):
            best[i + 1, j + 1] = cost[i, j] + min(best[i, j], best[i, j + 1], best[i + 1, j])
    return float(best[-1, -1])


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (5, 9), (9, 5), (12, 40)])
def test_warping_takes_the_best_path_and_the_reference_takes_the_same(shape):
    for kind in range(3):
        cost = np.random.default_rng(kind).normal(size=shape).round(0 if kind == 2 else 9)  # the last has many ties
        rows, columns = dtw(cost)
        steps = set(zip(np.diff(rows).tolist(), np.diff(columns).tolist(), strict=True))
        assert steps <= {(0, 1), (1, 0), (1, 1)} and (rows[0], columns[0]) == (0, 0)
        assert (rows[-1] + 1, columns[-1] + 1) == shape
        assert float(cost[rows, columns].sum()) == pytest.approx(least(cost), abs=1e-9)
        if kind < 2:  # at ties the reference may leave the best path
            theirs = _dynamic_time_warping(cost)
            assert np.array_equal(rows, theirs[0]) and np.array_equal(columns, theirs[1])


def test_alignment():
    scores = torch.randn(3, 6, 20)
    weights = scores[..., :15].softmax(-1)
    normed = (weights - weights.mean(1, keepdim=True)) / weights.std(1, correction=0, keepdim=True)
    expected = _median_filter(normed[None], 7)[0].mean(0)
    assert torch.allclose(alignment(scores, 15), expected, atol=1e-6)
    assert alignment(scores, 2).shape == (6, 2)  # too short for a median


def test_word_times(opened):
    """Words follow each other, within the sound; the heads are those of generation_config.json."""
    words = opened.vocabulary
    assert opened.heads == [(0, 1), (1, 2)]
    ids = words.encode(" He might even have been made amiable.")
    found = word_times(opened.model, words, opened.states(noise(1)), "en", "transcribe", ids, opened.heads, 80)
    assert [word.text for word, _ in found] == " He, might, even, have, been, made, amiable.".replace(
        ", ", "|, "
    ).replace("|,", ",").split(",")
    assert sum(count for _, count in found) == len(ids)
    times = [at for word, _ in found for at in (word.start, word.end)]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= 0.8
    assert all(0 < word.probability < 1 for word, _ in found)


def test_punctuation_joins_its_word():
    words = [(Word(text, i, i + 1, 0.5), 1) for i, text in enumerate([" “", "He", ",", " (", "said", ")", ".", " so"])]
    found = with_punctuation(words)
    assert [(word.text, word.start, word.end, count) for word, count in found] == [
        (" “He,", 1, 2, 3),
        (" (said).", 4, 5, 4),
        (" so", 7, 8, 1),
    ]


def test_words_of_a_transcript(opened, monkeypatch):
    words = opened.vocabulary
    time, one, two = words.first_time, words.encode(" He might"), words.encode(" been made")
    scripted(opened, monkeypatch, [time + 5, *one, time + 20, time + 20, *two, time + 40])
    found = list(opened.transcribe(noise(2), language="en" if words.multilingual else None, words=True))
    assert [[word.text for word in s.words] for s in found] == [[" He", " might"], [" been", " made"]] * 2
    assert all(word.start >= 1.0 for s in found[2:] for word in s.words)


# ------------------------------------------------------------------------------------------------ files and the command

SEGMENTS = [
    Segment(0.0, 3661.5, " He --> said.", 0.0, -0.2, 1.1, 0.0),
    Segment(3661.5, 3662.0, " So.", 0.0, -0.2, 1.1, 0.0),
]


def test_formats():
    assert list(written(SEGMENTS, "txt")) == ["He --> said.", "So."]
    assert "\n".join(written(SEGMENTS, "srt")) == (
        "1\n00:00:00,000 --> 01:01:01,500\nHe -> said.\n\n2\n01:01:01,500 --> 01:01:02,000\nSo.\n"
    )
    assert "\n".join(written(SEGMENTS, "vtt")) == (
        "WEBVTT\n\n00:00:00.000 --> 01:01:01.500\nHe -> said.\n\n01:01:01.500 --> 01:01:02.000\nSo.\n"
    )
    (text,) = written(SEGMENTS, "json")
    found = json.loads(text)
    assert found["text"] == "He --> said. So." and found["segments"][1]["start"] == 3661.5
    words = [Word(" He", 0.0, 0.5, 0.9), Word(" said.", 0.5, 1.25, 0.9)]
    timed = [Segment(0.0, 1.25, " He said.", 0.0, -0.2, 1.1, 0.0, words)]
    assert "2\n00:00:00,500 --> 00:00:01,250\nsaid.\n" in "\n".join(written(timed, "srt"))
    assert "0.50      1.25  said." in "\n".join(written(timed, "txt"))


@pytest.fixture
def recording(tmp_path) -> Path:
    write_wav(tmp_path / "noise.wav", noise(1.5))
    return tmp_path / "noise.wav"


def test_the_command(folder, opened, recording, tmp_path, capsys, monkeypatch):
    words = opened.vocabulary
    scripted(opened, monkeypatch, [words.first_time, *words.encode(" He might"), words.first_time + 50])
    common = ("transcribe", "--model", folder, recording, "--device", "cpu")
    command(*common)
    assert capsys.readouterr().out == "He might\nHe might\n"
    for kind in ("txt", "srt", "vtt", "json"):
        out = tmp_path / f"said.{kind}"
        command(*common, "--format", kind, "--out", out, "--words")
        assert "might" in out.read_text() and out.read_text().endswith("\n")
    assert capsys.readouterr().out == ""


def test_nothing_is_left_half_written(folder, recording, tmp_path, monkeypatch):
    def broken(self, options):
        raise UserError("broken off")

    monkeypatch.setattr(Window, "hear", broken)
    out = tmp_path / "said.txt"
    out.write_text("before")
    with pytest.raises(UserError, match="broken off"):
        command("transcribe", "--model", folder, recording, "--out", out)
    assert out.read_text() == "before" and not list(tmp_path.glob(".*tmp"))


def test_bad_input(folder, opened, recording, tmp_path):
    def refused(line: str, *more: object, model: object = folder, file: object = recording) -> None:
        with pytest.raises(UserError, match=line) as error:
            command("transcribe", "--model", model, file, "--device", "cpu", *more)
        assert "\n" not in str(error.value)

    if opened.vocabulary.multilingual:
        refused("knows no language 'klingon'; it knows en, de, ja", "--language", "klingon")
    else:
        refused("knows English alone, and writes it: leave out --language de", "--language", "de")
        refused("leave out --task translate", "--task", "translate")
    refused(r"max_new_tokens 449: a window of .* has room for \d+", "--max-new-tokens", 449)
    refused("1.5 s are heard by times: only a recording of at most 1 s can do without", "--no-times")
    refused("no folder", model=tmp_path / "nowhere")
    refused("holds no Whisper", model=tmp_path)
    refused("not found: there is no such sound file", file=tmp_path / "nothing.wav")
    refused("is a folder; give a file", "--out", tmp_path)
    refused("is not one of", "--format", "doc")
    for content, line in (
        ({"alignment_heads": [[9, 9]]}, "must be pairs"),
        ({"suppress_tokens": [-1]}, "must hold ids"),
        ({"suppress_tokens": [10**6]}, "a barred token is 1000000"),
        ({"is_multilingual": 3}, "is_multilingual"),
    ):
        copy = Path(shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True))
        (copy / "generation_config.json").write_text(json.dumps(content))
        refused(line, model=copy)


def test_a_model_without_a_config(folder, tmp_path):
    """OpenAI's .pt beside a tokenizer: the lists and heads are the usual ones."""
    theirs = reference(tmp_path / "made", encoder_ffn_dim=64, decoder_ffn_dim=64)
    openai_file(theirs, tmp_path / "small.pt")
    shutil.copy(tmp_path / "made" / "tokenizer.json", tmp_path)
    found = open_transcriber(str(tmp_path / "small.pt"), CPU)
    words = found.vocabulary
    assert found.barred == words.no_speech() and found.barred_first == (words.encode(" ")[0], words.end)
    assert found.heads == [(1, 0), (1, 1), (1, 2), (1, 3)] and not words.multilingual
