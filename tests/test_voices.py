"""Drawn voices: what is drawn is what is said, when it is said to be, and training never hears what is kept from it."""

import itertools
import random

import numpy as np
import pytest

from vqa_scratch.data import spoken, voices
from vqa_scratch.data.accents import SAID, Accent
from vqa_scratch.data.scenes import QuestionWriter, draw_scene
from vqa_scratch.data.voices import Speaker, is_unseen, sentences, speak, with_echo, with_noise, words_of
from vqa_scratch.errors import UserError

TEXT = "is the small green square left of the large red circle?"


def drawn(seed: int, text: str = TEXT, **changes):
    rng = np.random.default_rng(seed)
    speaker = Speaker.draw(rng)
    speaker = Speaker(**{**vars(speaker), **changes})
    return speaker, speak(text, speaker, rng)


def energy(wave: np.ndarray, low: float, high: float) -> float:
    power = np.abs(np.fft.rfft(wave)) ** 2
    hertz = np.linspace(0, 8_000, len(power))
    return float(power[(hertz >= low) & (hertz < high)].sum())


def cut(speech, span) -> np.ndarray:
    return speech.wave[round(span[1] * 16_000) : round(span[2] * 16_000)]


def test_the_questions_have_just_these_words():
    heard = set()
    for held_out in (False, True):
        rng = random.Random(0)
        writer = QuestionWriter(rng, held_out=held_out)
        for _ in range(120):
            for question in writer.write(draw_scene(rng, held_out=held_out), 8):
                heard.update(words_of(question.text))
    assert heard == voices.WORDS.keys()
    sounds = {sound.rstrip("1") for word in voices.WORDS.values() for sound in word.split()}
    for sound in sounds:
        assert voices._pieces(sound)  # every sound is in the tables


def test_the_seed_makes_the_voice():
    (one, first), (_, again), (other, second) = drawn(1), drawn(1), drawn(2)
    assert np.array_equal(first.wave, again.wave) and first.words == again.words
    assert one != other and (len(first.wave) != len(second.wave) or not np.array_equal(first.wave, second.wave))
    assert first.wave.dtype == np.float32 and np.abs(first.wave).max() == pytest.approx(0.5)


def test_times_are_those_of_the_sound():
    for seed in range(3):
        _, speech = drawn(seed)
        assert [word for word, _, _ in speech.words] == words_of(TEXT)
        assert len(speech.wave) % 80 == 0
        for word, start, end in speech.words:
            inside = [sound for sound in speech.sounds if start <= sound[1] and sound[2] <= end]
            assert [sound for sound, _, _ in inside] == voices.WORDS[word].replace("1", "").split()
            assert inside[0][1] == start and inside[-1][2] == end
            assert all(a[2] == b[1] for a, b in itertools.pairwise(inside))
        ends = [0.0, *(time for _, *span in speech.words for time in span), len(speech.wave) / 16_000]
        assert ends == sorted(ends)
        by_sound = {sound[0]: cut(speech, sound) for sound in speech.sounds}
        hiss, vowel = by_sound["S"], by_sound["IY"]
        assert energy(hiss, 4_000, 8_000) > 10 * energy(hiss, 0, 2_000)
        assert energy(vowel, 0, 2_000) > 10 * energy(vowel, 4_000, 8_000)
        before = speech.wave[: round((speech.words[0][1] - 0.03) * 16_000)]
        assert np.square(before).mean() < 1e-4 * np.square(vowel).mean()


def test_a_short_tract_has_high_formants():
    """The strongest frequency of a vowel goes up with the factor of the speaker."""

    def strongest(tract: float) -> int:
        _, speech = drawn(0, "are more", tract=tract, pitch=80.0, breath=0.0, tilt=8_000.0)
        vowel = cut(speech, next(sound for sound in speech.sounds if sound[0] == "AA"))
        power = np.abs(np.fft.rfft(vowel * np.hanning(len(vowel)), 16_000)) ** 2
        return int(np.argmax(np.convolve(power[:1_600], np.ones(100), "same")))  # Hz: wider than the pitch

    assert strongest(1.2) / strongest(0.9) == pytest.approx(1.2 / 0.9, rel=0.1)


def test_an_accent_changes_how_long_where_and_how_loud_a_sound_is():
    """Held against the same speaker without one, on the vowel that it changes and one that it leaves alone."""
    accent = Accent(lengths={"AA": 2.0}, formants={"AA": np.array([0.5, 1.0, 1.0])}, levels={"AA": 0.1})
    kept = {"tract": 1.0, "pitch": 80.0, "breath": 0.0, "tilt": 8_000.0}
    spans, peaks, loudness = [], [], []
    for given in (voices.PLAIN, accent):
        _, speech = drawn(0, "are many", accent=given, **kept)
        sounds = {sound[0]: cut(speech, sound) for sound in speech.sounds}
        spans.append({name: len(wave) for name, wave in sounds.items()})
        power = np.abs(np.fft.rfft(sounds["AA"] * np.hanning(len(sounds["AA"])), 16_000)) ** 2
        peaks.append(int(np.argmax(np.convolve(power[:1_600], np.ones(100), "same"))))
        loudness.append(np.square(sounds["AA"]).mean() / np.square(sounds["IY"]).mean())
    assert spans[1]["AA"] / spans[0]["AA"] == pytest.approx(2, rel=0.1) and spans[1]["IY"] == spans[0]["IY"]
    assert peaks[1] / peaks[0] == pytest.approx(0.5, rel=0.15)
    assert loudness[1] < 0.05 * loudness[0]


def test_an_accent_changes_the_voice_as_a_whole():
    """Each factor against the same speaker without one: when he begins, hiss, resonances, melody, and the spectrum."""
    kept = {"tract": 1.0, "pitch": 100.0, "breath": 0.0, "tilt": 8_000.0}

    def said(**factors) -> tuple[voices.Speech, np.ndarray]:
        _, speech = drawn(0, "is there a", accent=Accent(**factors), **kept)
        return speech, cut(speech, next(sound for sound in speech.sounds if sound[0] == "IH"))

    def periods(speech) -> list[int]:
        """Samples of a period of the first vowel and of the last."""
        vowels = [cut(speech, span) for span in speech.sounds if span[0] in ("IH", "AX")]
        against = [np.correlate(vowel, vowel, "full")[len(vowel) :] for vowel in (vowels[0], vowels[-1])]
        return [1 + int(np.argmax(some[80:300])) + 80 for some in against]

    def hump(vowel: np.ndarray) -> float:
        """Of the energy around the first resonance, how much is within 60 Hz of its top."""
        power = np.abs(np.fft.rfft(vowel * np.hanning(len(vowel)), 16_000))[200:1_000] ** 2
        top = int(np.argmax(np.convolve(power, np.ones(120), "same")))
        return power[max(0, top - 60) : top + 60].sum() / power.sum()

    speech, vowel = said()
    early, _ = said(lead=0.1)
    assert early.words[0][1] == pytest.approx(0.1 * speech.words[0][1], abs=voices.SECONDS)
    falls, rises = periods(said(melody=(1.2, 0.7))[0]), periods(said(melody=(0.8, 1.2))[0])
    assert falls[0] < falls[-1] and rises[0] > rises[-1], "a long period is a low pitch"
    assert hump(said(bands=4.0)[1]) < 0.8 * hump(vowel)
    faded = [some * np.hanning(len(some)) for some in (vowel, said(colour=(1.0,))[1])]
    shares = [energy(some, 4_000, 8_000) / energy(some, 0, 2_000) for some in faded]
    assert shares[1] < 0.3 * shares[0]
    hisses = [
        cut(one, next(sound for sound in one.sounds if sound[0] == "Z")) for one in (speech, said(noise=(0.6, 1.0))[0])
    ]
    shares = [energy(some, 5_000, 8_000) / energy(some, 2_000, 5_000) for some in hisses]
    assert shares[1] < 0.5 * shares[0]


def test_words_are_said_as_the_accent_has_them():
    accent = Accent(words={"the": "DH IY", "are": "AA"})
    _, speech = drawn(0, "where are the circles?", accent=accent)
    assert [word for word, _, _ in speech.words] == ["where", "are", "the", "circles"]
    assert [name for name, _, _ in speech.sounds] == "W EH R AA DH IY S ER K AX L Z".split()


def test_every_other_way_to_say_a_word_can_be_said():
    sounds = {sound for ways in SAID.values() for way in ways for sound in way.split()}
    assert SAID.keys() <= voices.WORDS.keys() and all(voices._pieces(sound) for sound in sounds)
    assert all(voices.WORDS[word] not in ways for word, ways in SAID.items())


def test_who_has_an_accent_is_else_the_speaker_without():
    """So speakers of before are heard as they were, and those of training, which have accents, have all the rest."""
    plain, accented = (Speaker.draw(np.random.default_rng(4), accent=given) for given in (False, True))
    assert plain.accent is voices.PLAIN and accented.accent != voices.PLAIN
    assert {**vars(plain), "accent": None} == {**vars(accented), "accent": None}
    strengths = [
        np.std(list(Speaker.draw(np.random.default_rng(i), accent=True).accent.lengths.values())) for i in range(30)
    ]
    assert min(strengths) < 0.05 and max(strengths) > 0.2, "of any strength"


def test_training_hears_accents_and_measuring_does_not(monkeypatch):
    heard = []
    monkeypatch.setattr(
        spoken, "speak", lambda text, speaker, rng: heard.append(speaker.accent) or speak(text, speaker, rng)
    )
    for name in ("train", "val", "test"):
        spoken.drawn_split(name, 2, 0)
    assert [accent != voices.PLAIN for accent in heard] == [True] * 2 + [False] * 4


@pytest.mark.parametrize("pitch", [90.0, 220.0])
def test_the_pitch_is_that_of_the_speaker(pitch):
    _, speech = drawn(3, "yellow yellow", pitch=pitch)
    vowel = cut(speech, next(sound for sound in speech.sounds if sound[0] == "OW"))
    against = np.correlate(vowel, vowel, "full")[len(vowel) :]
    period = 1 + np.argmax(against[40:300]) + 40
    assert 0.8 * pitch < 16_000 / period < 1.2 * pitch  # it falls from 1.12 to 0.82 of it


def test_unseen_speakers_and_sentences_are_never_heard_in_training():
    rng = np.random.default_rng(0)

    def cell(speaker: Speaker) -> tuple[int, int]:
        low, high = voices.PITCH
        row = np.log(speaker.pitch / low) / np.log(high / low)
        column = (speaker.tract - voices.TRACT[0]) / (voices.TRACT[1] - voices.TRACT[0])
        return int(row * voices.CELLS), int(column * voices.CELLS)

    seen, unseen = ({cell(Speaker.draw(rng, unseen=kept)) for _ in range(400)} for kept in (False, True))
    assert len(seen) == 12 and len(unseen) == 4 and not seen & unseen
    heard, kept = (set(itertools.islice(sentences(random.Random(1), unseen=x), 400)) for x in (False, True))
    assert not heard & kept and not any(map(is_unseen, heard)) and all(map(is_unseen, kept))
    assert is_unseen("Where is the RED circle") == is_unseen("where is the red circle?")
    texts = {question for question in itertools.islice(sentences(random.Random(2)), 400)}
    words = {word for text in heard | texts for word in words_of(text)}
    assert words == voices.WORDS.keys()  # training hears every word


def test_noise_has_the_level_asked_for():
    speech = drawn(0)[1].wave
    for decibels in (-5.0, 10.0):
        noise = with_noise(speech, decibels, np.random.default_rng(0)).astype(np.float64) - speech
        ratio = np.square(speech, dtype=np.float64).sum() / np.square(noise).sum()
        assert 10 * np.log10(ratio) == pytest.approx(decibels, abs=1e-3)
        assert energy(noise, 500, 1_000) == pytest.approx(
            energy(noise, 2_000, 4_000), rel=0.3
        )  # pink: as much an octave


def test_an_echo_comes_late_and_dies_away():
    click = np.zeros(8_000, np.float32)
    click[100] = 1
    heard = with_echo(click, 0.3, np.random.default_rng(0), level=0.5)
    assert not np.abs(heard[:100]).max() > 1e-6 and heard[100] == pytest.approx(1, abs=1e-6)
    assert np.abs(heard[101:180]).max() < 1e-6
    assert np.square(heard[180:]).sum() == pytest.approx(0.5, rel=1e-4)
    early, late = (np.square(heard[180 + at : 180 + at + 480]).mean() for at in (0, 3_000))
    assert 10 * np.log10(early / late) == pytest.approx(60 * 3_000 / 4_800, abs=3)  # 60 dB in 0.3 s


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("where is the dog?", "no voice knows the word 'dog' of 'where is the dog\\?'"),
        ("?", "'\\?' has no word to say"),
    ],
)
def test_words_that_no_voice_knows(text, line):
    with pytest.raises(UserError, match=line):
        speak(text, Speaker(120, 1, 1, 0.05, 400), np.random.default_rng(0))
