"""Voices that the program draws itself, saying the questions of the built-in data set, with the time of every sound.

Source and filter (Fant 1960; Klatt 1980): a train of pulses at the pitch of a speaker, and noise, are shaped every 5 ms
by the resonances (formants) of a vocal tract that moves from sound to sound. A speaker is drawn: pitch, length of the
tract, speed, breath. Nothing is recorded, so nothing is needed to make it again but the seed.

Who is heard in training and who is not is a rule (`Speaker.draw`), and so is which sentences are (`is_unseen`).
Times are in seconds, a wave is fp32 in [-1, 1] at 16 kHz. Shapes: N samples, T frames of 5 ms, F frequencies.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vqa_scratch.data.accents import Accent
from vqa_scratch.data.scenes import QuestionWriter, draw_scene
from vqa_scratch.errors import UserError

RATE, HOP = 16_000, 80  # samples a second, and in a frame
WINDOW, SIZE = 320, 480  # samples: under the Hann window, and in a transform, with room for what a filter adds
SECONDS = HOP / RATE

# Vowels and consonants that sound: the first three formants in Hz (Peterson and Barney 1952 for the vowels).
FORMANTS = {
    "AA": (730, 1090, 2440), "AE": (660, 1720, 2410), "AH": (600, 1250, 2390), "AX": (500, 1450, 2450),
    "AO": (590, 900, 2410), "EH": (530, 1840, 2480), "ER": (480, 1300, 1650), "IH": (390, 1990, 2550),
    "IY": (280, 2250, 2950), "UH": (440, 1020, 2240), "UW": (300, 900, 2240),
    "W": (290, 620, 2150), "Y": (260, 2150, 3000), "R": (330, 1100, 1450), "L": (360, 1050, 2800),
    "M": (250, 1000, 2200), "N": (250, 1600, 2550), "NG": (250, 2100, 2700),
    "P": (300, 900, 2300), "B": (250, 900, 2300), "T": (350, 1750, 2700), "D": (250, 1750, 2700),
    "K": (350, 2000, 2500), "G": (250, 2000, 2500), "S": (350, 1700, 2600), "Z": (300, 1700, 2600),
    "SH": (350, 1900, 2600), "ZH": (300, 1900, 2600), "F": (350, 1100, 2300), "V": (300, 1100, 2300),
    "DH": (300, 1400, 2500), "HH": (550, 1400, 2450),
}  # fmt: skip
GLIDES = {"OW": ("AO", "UH"), "AW": ("AA", "UH"), "AY": ("AA", "IH"), "EY": ("EH", "IY")}  # from one vowel to another
# Consonants: ms, voice, and noise with its centre and width in Hz and its level. A vowel: 95 ms, all voice, no noise.
CONSONANTS = {
    "W": (70, 0.7, 0, 1, 0), "Y": (60, 0.7, 0, 1, 0), "R": (70, 0.7, 0, 1, 0), "L": (70, 0.7, 0, 1, 0),
    "M": (75, 0.5, 0, 1, 0), "N": (70, 0.5, 0, 1, 0), "NG": (75, 0.5, 0, 1, 0),
    "S": (105, 0, 6200, 1500, 0.5), "SH": (105, 0, 3600, 1200, 0.6), "F": (90, 0, 4700, 4000, 0.12),
    "Z": (80, 0.4, 6200, 1500, 0.3), "V": (60, 0.45, 4700, 4000, 0.06), "DH": (50, 0.45, 4700, 4000, 0.05),
    "ZH": (60, 0.35, 3600, 1200, 0.4),
}  # fmt: skip
BURSTS = {"P": (900, 0.5), "B": (900, 0.3), "T": (4500, 0.8), "D": (4500, 0.5), "K": (2000, 0.8), "G": (2000, 0.5)}
VOICELESS = {"P", "T", "K"}
WORDS = {
    "what": "W AH1 T", "color": "K AH1 L ER", "is": "IH Z", "the": "DH AX", "shape": "SH EY1 P", "where": "W EH1 R",
    "there": "DH EH R", "a": "AX", "how": "HH AW1", "many": "M EH1 N IY", "are": "AA R", "more": "M AO1 R",
    "than": "DH AE N", "closest": "K L OW1 S AX S T", "to": "T UW", "left": "L EH1 F T", "right": "R AY1 T",
    "of": "AX V", "above": "AX B AH1 V", "below": "B IH L OW1", "small": "S M AO1 L", "large": "L AA1 R D ZH",
    "red": "R EH1 D", "green": "G R IY1 N", "blue": "B L UW1", "yellow": "Y EH1 L OW", "purple": "P ER1 P AX L",
    "gray": "G R EY1", "circle": "S ER1 K AX L", "square": "S K W EH1 R", "triangle": "T R AY1 AE NG G AX L",
    "object": "AA1 B D ZH EH K T",
}  # fmt: skip
WORDS |= {f"{word}s": WORDS[word] + " Z" for word in ("circle", "square", "triangle")} | {
    "objects": WORDS["object"] + " S"
}

PITCH, TRACT, CELLS = (80.0, 260.0), (0.85, 1.25), 4  # Hz; factor of all formants; bands that each is cut into
UNSEEN_SENTENCES = 0.2  # share of all

PLAIN = Accent()

Span = tuple[str, float, float]  # what is said, from, to


@dataclass(frozen=True)
class Speaker:
    pitch: float  # Hz
    tract: float  # 1 is a man's; a shorter tract has higher formants
    speed: float  # 1 is about 4 words a second
    breath: float  # noise in the voice
    tilt: float  # Hz from which the voice loses 6 dB an octave
    accent: Accent = PLAIN

    @classmethod
    def draw(cls, rng: np.random.Generator, *, unseen: bool = False, accent: bool = False) -> "Speaker":
        """Pitch and tract lie in one of 4 x 4 cells; those of the diagonal hold the speakers that training never hears.

        So unseen speakers lie among those heard, and no pair of pitch and tract is in both.
        """
        row, column = rng.integers(CELLS), rng.integers(CELLS - 1)
        column = (row if unseen else row + 1 + column) % CELLS
        place = (np.array([row, column]) + rng.random(2)) / CELLS
        pitch = PITCH[0] * (PITCH[1] / PITCH[0]) ** place[0]
        tract = TRACT[0] + (TRACT[1] - TRACT[0]) * place[1]
        speed, breath, tilt = rng.uniform((0.85, 0.02, 250), (1.25, 0.12, 600))
        sounds = [*FORMANTS, *GLIDES]
        return cls(pitch, tract, speed, breath, tilt, Accent.draw(rng, sounds) if accent else PLAIN)


@dataclass(frozen=True)
class Speech:
    text: str
    wave: np.ndarray  # (N,)
    words: tuple[Span, ...]
    sounds: tuple[Span, ...]  # phonemes in the notation of CMUdict; what lies between spans is silence


def is_unseen(text: str) -> bool:
    """Whether a sentence is kept for measuring: a fifth of all, by the hash of its words."""
    return hashlib.sha256(" ".join(words_of(text)).encode()).digest()[0] < 256 * UNSEEN_SENTENCES


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation. Raises UserError on a word that no voice knows."""
    words = text.lower().replace("?", " ").replace(".", " ").replace(",", " ").split()
    for word in words:
        if word not in WORDS:
            raise UserError(
                f"no voice knows the word {word!r} of {text!r}: they say the {len(WORDS)} words of questions"
            )
    if not words:
        raise UserError(f"{text!r} has no word to say")
    return words


def sentences(rng: random.Random, *, unseen: bool = False) -> Iterator[str]:
    """Questions about scenes that are drawn for them, without end; those that training may hear, or the others."""
    writer = QuestionWriter(rng)
    while True:
        for question in writer.write(draw_scene(rng), 8):
            if is_unseen(question.text) == unseen:
                yield question.text


# ------------------------------------------------------------------------------------------------ from words to targets

# A piece of a sound: ms; three formants; voice, aspiration; the centre, width and level of its noise.
Piece = tuple[float, tuple[float, ...], float, float, float, float, float]


def _pieces(sound: str, accent: Accent = PLAIN) -> list[Piece]:
    name, stressed = sound.rstrip("1"), sound.endswith("1")
    length, level = accent.lengths.get(name, 1.0), accent.levels.get(name, 1.0)
    at, wide = accent.noise
    moved = accent.formants.get(name, np.ones(3))
    return [
        (ms * length, tuple(moved * formants), voice * level, breath * level, centre * at, width * wide, hiss * level)
        for ms, formants, voice, breath, centre, width, hiss in _plain_pieces(name, stressed)
    ]


def _plain_pieces(name: str, stressed: bool) -> list[Piece]:
    if name in GLIDES:
        halves = zip((75, 65), GLIDES[name], strict=True)
        return [(length * (1.25 if stressed else 1), FORMANTS[half], 1, 0, 0, 1, 0) for length, half in halves]
    formants = FORMANTS[name]
    if name in BURSTS:
        centre, level = BURSTS[name]
        voiced = name not in VOICELESS
        closure, burst = (55, formants, 0.12 * voiced, 0, 0, 1, 0), (12, formants, 0.2 * voiced, 0, centre, 1200, level)
        return [closure, burst] if voiced else [closure, burst, (45, formants, 0, 0.25, 0, 1, 0)]
    if name == "HH":
        return [(70, formants, 0, 0.3, 0, 1, 0)]
    if name in CONSONANTS:
        length, voice, centre, width, level = CONSONANTS[name]
        return [(length, formants, voice, 0, centre, width, level)]
    return [(95 * (1.25 if stressed else 0.8 if name == "AX" else 1), formants, 1, 0, 0, 1, 0)]


SILENCE: Piece = (0, FORMANTS["AX"], 0, 0, 0, 1, 0)


def _smooth(track: np.ndarray, frames: int) -> np.ndarray:
    """The mean of `frames` (odd) neighbours in time; track (T, ...)."""
    padded = np.concatenate((track[:1].repeat(frames // 2 + 1, 0), track, track[-1:].repeat(frames // 2, 0)))
    sums = padded.cumsum(0)
    return (sums[frames:] - sums[:-frames]) / frames


def speak(text: str, speaker: Speaker, rng: np.random.Generator) -> Speech:
    """The text as the speaker says it this time: pauses and wobble are drawn. Raises UserError as `words_of`."""
    lead = max(1, round(rng.integers(10, 40) * speaker.accent.lead))
    pieces, frames, words, sounds = [SILENCE], [lead], [], []

    def add(piece: Piece, ms: float) -> None:
        pieces.append(piece)
        frames.append(max(1, round(ms / speaker.speed / (1000 * SECONDS))))

    for word in words_of(text):
        began = sum(frames)
        for sound in speaker.accent.words.get(word, WORDS[word]).split():
            start = sum(frames)
            for piece in _pieces(sound, speaker.accent):
                add(piece, piece[0] * rng.uniform(0.9, 1.1))
            sounds.append((sound.rstrip("1"), start * SECONDS, sum(frames) * SECONDS))
        words.append((word, began * SECONDS, sum(frames) * SECONDS))
        if rng.random() < 0.3:
            add(SILENCE, rng.uniform(10, 60))
    add(SILENCE, rng.uniform(50, 200))
    targets = np.array([(*piece[1], *piece[2:]) for piece in pieces]).repeat(frames, 0)  # (T, 8)
    wave = _sound(targets, speaker, rng)
    return Speech(text, wave, tuple(words), tuple(sounds))


# ------------------------------------------------------------------------------------------------ from targets to sound


def _pulses(pitch: np.ndarray) -> np.ndarray:
    """(N,): a pulse at each period of a pitch (N,) in Hz, between two samples where it falls there; variance 1."""
    phase = np.cumsum(pitch / RATE)
    at = np.flatnonzero(np.diff(np.floor(phase), prepend=0.0))
    late = (phase[at] % 1) * RATE / pitch[at]  # samples since the pulse
    wave = np.zeros(len(pitch), np.float32)
    height = np.sqrt(RATE / pitch[at])
    np.add.at(wave, at, height * (1 - late))
    np.add.at(wave, np.maximum(at - 1, 0), height * late)
    return wave


def _spectra(wave: np.ndarray) -> np.ndarray:
    """(T, F): the spectrum of each frame, under a window around its middle."""
    padded = np.pad(wave, (WINDOW - HOP) // 2)
    window = np.hanning(WINDOW + 1)[:-1].astype(np.float32) / 2  # four of them overlap, and add to 1
    cut = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP] * window
    return np.fft.rfft(np.pad(cut, ((0, 0), ((SIZE - WINDOW) // 2,) * 2)))


def _sound(targets: np.ndarray, speaker: Speaker, rng: np.random.Generator) -> np.ndarray:
    """(N,) from the targets of each frame (T, 8): three formants, voice, aspiration; centre, width, level of noise."""
    count = len(targets)
    formants = _smooth(_smooth(targets[:, :3], 9), 7) * speaker.tract
    voice, breath, level = _smooth(targets[:, [3, 4, 7]], 3).astype(np.float32).T[..., None]
    centre, width = targets[:, 5:7].astype(np.float32).T[..., None]
    time = np.linspace(0, 1, count)
    start, end = speaker.accent.melody
    contour = (
        start
        + (end - start) * time
        + 0.04 * np.sin(2 * np.pi * (rng.uniform(3, 5) * time * count * SECONDS + rng.random()))
    )
    pitch = speaker.pitch * contour * (1 + 0.01 * rng.standard_normal(count))
    hertz = np.linspace(0, RATE / 2, SIZE // 2 + 1, dtype=np.float32)
    power = np.ones((count, len(hertz)), np.float32)  # of the tract: one resonance after another
    upper = np.tile(np.array([3500, 4500]) * speaker.tract, (count, 1))
    for track, band in zip(np.hstack((formants, upper)).T, (70, 100, 140, 220, 280), strict=True):
        f, b = track.astype(np.float32)[:, None], np.float32((band * speaker.accent.bands / 2) ** 2)
        power *= (f * f + b) ** 2 / (((hertz - f) ** 2 + b) * ((hertz + f) ** 2 + b))
    tract = np.sqrt(power)
    tilt = 1 / np.sqrt(1 + (hertz / np.float32(speaker.tilt)) ** 2)
    source = _spectra(_pulses(np.repeat(pitch, HOP)))
    noise = _spectra(rng.standard_normal(count * HOP, dtype=np.float32))
    hiss = level * np.exp(-0.5 * ((hertz - centre) / width) ** 2)
    spectrum = source * (voice * tract * tilt) + noise * ((breath + speaker.breath * voice * tilt) * tract + hiss)
    for waves, strength in enumerate(speaker.accent.colour, 1):
        spectrum *= np.exp(strength * np.cos(np.pi * waves * hertz / hertz[-1]))
    frames = np.fft.irfft(spectrum, SIZE).reshape(count, SIZE // HOP, HOP)
    wave = np.zeros((count + SIZE // HOP - 1, HOP))
    for k in range(SIZE // HOP):
        wave[k : k + count] += frames[:, k]
    wave = wave.ravel()[(SIZE - HOP) // 2 :][: count * HOP]
    return (wave * (0.5 / np.abs(wave).max())).astype(np.float32)


# ------------------------------------------------------------------------------------------------ noise and room


def with_noise(wave: np.ndarray, decibels: float, rng: np.random.Generator) -> np.ndarray:
    """(N,): the wave and pink noise, whose energy over the whole is `decibels` below that of the wave."""
    spectrum = np.fft.rfft(rng.standard_normal(len(wave)))
    noise = np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 1)), len(wave))
    noise *= np.sqrt(np.square(wave, dtype=np.float64).sum() / np.square(noise).sum() / 10 ** (decibels / 10))
    return (wave + noise).astype(np.float32)


def with_echo(wave: np.ndarray, seconds: float, rng: np.random.Generator, *, level: float = 0.5) -> np.ndarray:
    """(N,): the wave as a room returns it: after 5 ms reflections that fall by 60 dB in `seconds`.

    Their energy is `level` times that of the sound that comes straight, whose times do not change.
    """
    after, length = RATE // 200, max(1, round(seconds * RATE))
    room = rng.standard_normal(length) * 10 ** (-3 * np.arange(length) / length)
    room *= np.sqrt(level / np.square(room).sum())
    size = len(wave) + after + length
    late = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(room, size), size)
    return (wave + np.pad(late, (after, 0))[: len(wave)]).astype(np.float32)
