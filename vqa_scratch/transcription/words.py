"""When each word was spoken: the heads of the decoder that follow the sound, and a path through their weights.

As in OpenAI's `timing.py`: weights of the alignment heads over the states that hold sound, each state normed over the
tokens, smoothed by a median, averaged over heads; dynamic time warping gives each token its time (Giorgino 2009).

Shapes: H heads, T tokens, N states.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqa_scratch.audio.distortion import dtw
from vqa_scratch.data.spoken import SPACE, letters_of
from vqa_scratch.kernels import ctc_align
from vqa_scratch.models.whisper import Whisper
from vqa_scratch.nn.memory import Memory
from vqa_scratch.study.trace import trace
from vqa_scratch.transcription.vocabulary import SpeechVocabulary

STATE_SECONDS = 0.02  # two frames of 160 samples at 16 kHz
MEDIAN = 7  # states
BEFORE_A_WORD, AFTER_A_WORD = "\"'“¿([{-", "\"'.。,，!！?？:：”)]}、"


@dataclass(frozen=True)
class Word:
    """A word as it is written, a space before it included; seconds from the start of the recording."""

    text: str
    start: float
    end: float
    probability: float


def alignment(scores: Tensor, states: int) -> Tensor:
    """Scores (H, T, N) of heads -> how well tokens and the first `states` states go together, (T, states)."""
    weights = scores[..., :states].float().softmax(-1)
    spread, mean = torch.std_mean(weights, -2, correction=0, keepdim=True)
    weights = (weights - mean) / spread.clamp_min(1e-10)
    if states > MEDIAN // 2:
        padded = F.pad(weights, (MEDIAN // 2, MEDIAN // 2), mode="reflect")
        weights = padded.unfold(-1, MEDIAN, 1).median(-1).values
    return weights.mean(0)


@torch.no_grad()
def word_times(
    model: Whisper,
    vocabulary: SpeechVocabulary,
    states: Tensor,
    language: str | None,
    task: str,
    ids: list[int],
    heads: Sequence[tuple[int, int]],
    frames: int,
) -> list[tuple[Word, int]]:
    """The words of text ids that were heard in states (1, N, D), `frames` of whose frames are sound; each with its
    number of tokens. Times are from the start of the window; `heads` are (layer, head)."""
    before = [*vocabulary.prompt(language, task), vocabulary.no_times]
    given = torch.tensor([[*before, *ids, vocabulary.end]], device=states.device)
    names = {layer: f"decoder.{layer}.cross.scores" for layer, _ in heads}
    with trace(model, *names.values()) as seen:
        logits = model.decoder(given, memory=[Memory(states)])[0]
    layers = {layer: seen[name][0] for layer, name in names.items()}
    scores = torch.stack([layers[layer][head] for layer, head in heads])
    # Row k is of the state that says token k; that of the last says the end.
    matrix = alignment(scores, max(1, min(frames // 2, states.shape[1])))[len(before) - 1 : -1]
    rows, columns = dtw(-matrix.double().cpu().numpy())
    starts = columns[np.unique(rows, return_index=True)[1]] * STATE_SECONDS  # (T + 1,)
    chances = logits[len(before) - 1 : -2, : vocabulary.end].float().softmax(-1)
    chances = chances.gather(1, torch.tensor(ids, device=chances.device)[:, None])[:, 0].tolist()
    words, at = [], 0
    for text, count in vocabulary.words(ids, language):
        span = slice(at, at + count)
        word = Word(text, float(starts[at]), float(starts[at + count]), sum(chances[span]) / count)
        words.append((word, count))
        at += count
    return with_punctuation(words)


def spans_of(letters: list[int], path: list[int]) -> list[tuple[float, float]]:
    """When each word was said, from, to in seconds, by a path that has a letter's place, or -1, at each state."""
    words, spans = np.cumsum([letter == SPACE for letter in letters]), dict[int, list[int]]()
    for at, place in enumerate(path):
        if place >= 0 and letters[place] != SPACE:
            spans.setdefault(int(words[place]), []).append(at)
    return [(min(at) * STATE_SECONDS, (max(at) + 1) * STATE_SECONDS) for _, at in sorted(spans.items())]


def by_letters(words: list[tuple[Word, int]], logits: Tensor) -> list[tuple[Word, int]]:
    """The same words, timed by where CTC spells them in logits (1, N, L); as they are if it cannot."""
    try:
        letters = letters_of(" ".join(word.text for word, _ in words))
        path = ctc_align(logits, torch.tensor([letters], device=logits.device))[0].tolist()
    except ValueError:  # a letter outside its alphabet, or more letters than states
        return words
    spans = spans_of(letters, path)
    if len(spans) != len(words):  # of a number as digits it spells several
        return words
    return [(replace(word, start=a, end=b), count) for (word, count), (a, b) in zip(words, spans, strict=True)]


def with_punctuation(words: list[tuple[Word, int]]) -> list[tuple[Word, int]]:
    """Each mark joins the word before or after it, whose times stay: those of marks are late."""
    joined: list[tuple[Word, int]] = []
    for word, count in words:
        if joined and word.text in AFTER_A_WORD and not joined[-1][0].text.endswith(" "):
            last, before = joined.pop()
            word, count = replace(last, text=last.text + word.text), before + count
        elif joined and (mark := joined[-1][0].text).startswith(" ") and mark.strip() in BEFORE_A_WORD:
            word, count = replace(word, text=mark + word.text), joined.pop()[1] + count
        joined.append((word, count))
    return joined
