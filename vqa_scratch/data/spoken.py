"""Utterances that speech is learned from: drawn voices that ask about drawn scenes, and batches of any utterances.

Half of the drawn utterances of training have noise, half an echo. Those of `val` and `test` are unseen sentences by
unseen speakers, every second one with an echo and 10 dB of noise.

Shapes: B utterances, T frames of 10 ms, M mels, F frames of a window, A decoder tokens, S letters.
"""

import random
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vqa_scratch.audio.features import log_mel
from vqa_scratch.audio.reading import wav_bytes
from vqa_scratch.data.batches import IGNORE, Ragged, TensorBatch
from vqa_scratch.data.spelled import spell_numbers
from vqa_scratch.data.tokenizers import Tokenizers, distinct
from vqa_scratch.data.voices import Span, Speaker, sentences, speak, with_echo, with_noise
from vqa_scratch.errors import UserError

ALPHABET = " 'abcdefghijklmnopqrstuvwxyz"  # CTC's labels, from 1 on; 0 is the blank
SPACE = 1 + ALPHABET.index(" ")
LOUD = 2.0  # from the loudest place of a log-mel to silence
CLEAN, HARD = "clean", "noise and echo"
DRAWN = ("train", "val", "test")
Spoil = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True, slots=True)
class Utterance:
    """What was said, as it is written, and its sound."""

    name: int | str  # of a drawn one its place in its split, else of its file
    text: str
    mel: np.ndarray  # (T, M) fp16, as Whisper reads it
    kind: str  # CLEAN, HARD or "recorded", by which figures are broken down
    words: tuple[Span, ...] = ()  # when each was said, in seconds, if that is known


def facts(utterances: Sequence[Utterance]) -> Iterable[tuple[Any, ...]]:
    """What makes each utterance itself, for `data/hashes.py`."""
    return ((one.name, one.text, len(one.mel)) for one in utterances)


def mel_of(wave: np.ndarray | Tensor) -> np.ndarray:
    """(N,) samples -> (T, M) fp16. Raises ValueError on a wave below 10 ms."""
    return log_mel(torch.as_tensor(wave), seconds=None).T.contiguous().half().numpy()


def plain(text: str) -> str:
    """What is said: lower case, numbers in words, no punctuation but the apostrophe."""
    text = unicodedata.normalize("NFC", spell_numbers(text.lower()).replace("\u2019", "'"))
    return " ".join("".join(c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in text).split())


def letters_of(text: str) -> list[int]:
    """The labels of CTC. Raises UserError for a text that says nothing, or has a letter that is not in the alphabet."""
    said = plain(text)
    outside = next((letter for letter in said if letter not in ALPHABET), None)
    if outside is not None:
        raise UserError(f"{outside!r} in {text[:60]!r} is not in the alphabet: a to z and the apostrophe")
    if not said:
        raise UserError(f"{text[:60]!r} says nothing: a transcript has words")
    return [1 + ALPHABET.index(letter) for letter in said]


def states_needed(letters: Sequence[int]) -> int:
    """How many states of the encoder CTC needs to say them: one each, and a blank between equal neighbours."""
    return len(letters) + sum(a == b for a, b in pairwise(letters))


# ------------------------------------------------------------------------------------------------ drawn


def clean(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return wave


def mixed(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Half of the time an echo, half of the time noise, of any strength."""
    wave = with_echo(wave, rng.uniform(0.1, 0.4), rng) if rng.random() < 0.5 else wave
    return with_noise(wave, rng.uniform(5, 25), rng) if rng.random() < 0.5 else wave


def hard(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return with_noise(with_echo(wave, 0.3, rng), 10, rng)


KINDS: dict[str, Spoil] = {CLEAN: clean, HARD: hard}  # of val and test, in turn


def draw(
    texts: Sequence[str],
    seed: Sequence[int],
    kinds: dict[str, Spoil],
    *,
    unseen: bool,
    accent: bool = False,
    progress: str | None = None,
) -> list[Utterance]:
    """Each text by a speaker of its own, of the kinds in turn; each depends on the seed and its place alone.

    `progress` is the label of a progress bar, None for no bar.
    """

    def one(place: int) -> Utterance:
        rng, kind = np.random.default_rng([*seed, place]), list(kinds)[place % len(kinds)]
        speech = speak(texts[place], Speaker.draw(rng, unseen=unseen, accent=accent), rng)
        return Utterance(place, speech.text, mel_of(kinds[kind](speech.wave, rng)), kind, speech.words)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # numpy's transforms let other threads run
        said = pool.map(one, range(len(texts)))
        return list(tqdm(said, progress, len(texts), unit="utterance", disable=progress is None, leave=False))


def _texts(name: str, seed: int) -> Iterator[str]:
    """What is said in a split, without end."""
    return sentences(random.Random(f"{seed}/{name}"), unseen=name != "train")


def unseen_speech(start: int, number: int, seed: int) -> list[tuple[str, bytes]]:
    """The texts and the sounds, as WAV, of so many utterances of test from `start` on, without noise or echo."""
    texts = list(islice(_texts("test", seed), start, start + number))
    rngs = [np.random.default_rng([seed, DRAWN.index("test"), start + i]) for i in range(len(texts))]
    said = [speak(text, Speaker.draw(rng, unseen=True), rng) for text, rng in zip(texts, rngs, strict=True)]
    return [(one.text, wav_bytes(torch.from_numpy(one.wave))) for one in said]


def drawn_split(name: str, number: int, seed: int) -> list[Utterance]:
    """So many utterances of train, val or test."""
    unseen = name != "train"
    texts = islice(_texts(name, seed), number)
    kinds: dict[str, Spoil] = KINDS if unseen else {"mixed": mixed}
    label = f"drawing voices of {name}"
    return draw(list(texts), (seed, DRAWN.index(name)), kinds, unseen=unseen, accent=not unseen, progress=label)


# ------------------------------------------------------------------------------------------------ batches


@dataclass
class SpeechBatch(TensorBatch):
    """A batch of windows and what is said in them, for CTC and for a decoder that writes."""

    features: Tensor  # (B, M, F)
    states: Tensor  # (B,): how many states of the encoder hold sound
    letters: Tensor  # (B, S): the labels of CTC, -1 behind the last; in a silent batch all of them
    decoder_input_ids: Tensor  # (B, A)
    labels: Tensor  # (B, A): the next token, IGNORE where there is no loss
    rows: Tensor  # (B,): which utterances these are; of a silent batch (0,)

    @property
    def counts(self) -> tuple[int, int]:
        """(utterances, labelled tokens)."""
        return len(self.rows), int((self.labels >= 0).sum())

    def silent(self) -> Self:
        """The same sound, of which nothing is said: loss and gradients are zero."""
        nothing = {"letters": torch.full_like(self.letters, -1), "labels": torch.full_like(self.labels, IGNORE)}
        return replace(self, **nothing, rows=self.rows[:0])


def masked(mel: np.ndarray, bands: int, rng: np.random.Generator) -> np.ndarray:
    """SpecAugment (Park et al. 2019) on a copy of (T, M): so many bands of up to 10 mels, and as many stretches of up
    to 200 ms, are taken out."""
    mel = mel.copy()
    for axis, most in [(1, 10), (0, 20)] * bands:
        width = int(rng.integers(min(most, mel.shape[axis] - 1) + 1))
        start = int(rng.integers(mel.shape[axis] - width))
        mel[(slice(None),) * axis + (slice(start, start + width),)] = 0.0
    return mel


def windows(mels: Sequence[np.ndarray], frames: int) -> Tensor:
    """Log-mels (T, M) -> (B, M, F), each filled up with silence."""
    whole = np.empty((len(mels), frames, mels[0].shape[1]), np.float32)
    for window, mel in zip(whole, mels, strict=True):
        window[:] = float(mel.max()) - LOUD
        window[: len(mel)] = mel
    return torch.from_numpy(whole).transpose(1, 2)


def sound_of(mels: Sequence[np.ndarray], frames: int) -> Tensor:
    """(B, F / 2): which states of the encoder, of two frames each, hold sound."""
    return torch.arange(frames // 2) < torch.tensor([-(-len(mel) // 2) for mel in mels])[:, None]


class Utterances:
    """Utterances with the ids of their transcripts. The decoder starts from `prompt`, whose tokens have no loss."""

    def __init__(self, samples: Sequence[Utterance], tokenizers: Tokenizers, prompt: Sequence[int], frames: int):
        self.samples, self.frames = list(samples), frames
        texts, which = distinct(one.text for one in samples)
        said = [[*prompt, *tokenizers.answer(text)[1:]] for text in texts]
        self.fill = tokenizers.end_id
        self.inputs = Ragged((ids[:-1] for ids in said), which)
        self.labels = Ragged(([IGNORE] * (len(prompt) - 1) + ids[len(prompt) :] for ids in said), which)
        self.letters = Ragged(map(letters_of, texts), which)

    def epoch(self, seed: int, number: int, per_step: int) -> list[np.ndarray]:
        """The rows of each step of an epoch: every utterance once; it depends on the arguments alone."""
        order = np.random.default_rng([seed, number]).permutation(len(self.samples))
        return np.array_split(order, max(1, round(len(order) / per_step)))

    def batch(self, rows: np.ndarray, bands: int = 0, seed: Sequence[int] = ()) -> SpeechBatch:
        """The batch of these rows, each filled up with silence, with so many `bands` taken out of it; which ones
        depends on the seed and its row."""
        mels = [self.samples[row].mel for row in rows]
        shown = mels
        if bands:
            shown = [
                masked(mel, bands, np.random.default_rng([*seed, row])) for mel, row in zip(mels, rows, strict=True)
            ]
        return SpeechBatch(
            features=windows(shown, self.frames),
            states=sound_of(mels, self.frames).sum(1),
            letters=self.letters.padded(rows, -1)[0],
            decoder_input_ids=self.inputs.padded(rows, self.fill)[0],
            labels=self.labels.padded(rows, IGNORE)[0],
            rows=torch.from_numpy(np.asarray(rows).astype(np.int64)),
        )
