"""Hearing drawn voices: a small network under CTC learns words from some speakers and sentences, and hears others.

Half of the training utterances have noise, half an echo. Word error rate is (substituted + left out + added) / said,
summed over all words. The middle of a word is where the likeliest path says it; it is compared with the middle of when
the voice said it. `blind` scores what was heard against other sentences.

Shapes: B utterances, T frames of 10 ms, M mels, V words with the blank.
"""

import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import results, timing
from vqa_scratch.audio import log_mel
from vqa_scratch.data.voices import WORDS, Span, Speaker, sentences, speak, with_echo, with_noise
from vqa_scratch.generate.ctc import ctc_beam, ctc_greedy
from vqa_scratch.kernels import ctc_align, ctc_loss
from vqa_scratch.training.optimizers import Optimizers, schedule

VOCABULARY = sorted(WORDS)  # from 1 on; 0 is the blank
BATCH, TESTED, STRIDE = 32, 200, 4
Spoil = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass
class Utterance:
    mel: Tensor  # (M, T) fp16
    words: tuple[Span, ...]

    @property
    def text(self) -> list[str]:
        return [word for word, _, _ in self.words]


def clean(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return wave


def mixed(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    wave = with_echo(wave, rng.uniform(0.1, 0.4), rng) if rng.random() < 0.5 else wave
    return with_noise(wave, rng.uniform(5, 25), rng) if rng.random() < 0.5 else wave


def hard(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return with_noise(with_echo(wave, 0.3, rng), 10, rng)


def draw(number: int, seed: int, spoil: Spoil, *, speakers: bool, texts: bool) -> list[Utterance]:
    """Utterances of `speakers` that training never hears (True) or may hear, saying such `texts`."""
    rng, asked, made = np.random.default_rng(seed), sentences(random.Random(seed), unseen=texts), []
    for _ in range(number):
        speech = speak(next(asked), Speaker.draw(rng, unseen=speakers), rng)
        mel = log_mel(torch.from_numpy(spoil(speech.wave, rng)), seconds=None).half()
        made.append(Utterance(mel, speech.words))
    return made


class Block(nn.Module):
    """A residual step: each channel over 11 frames, then an MLP in each frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Conv1d(width, width, 11, padding=5, groups=width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.mix(self.norm(x).mT).mT)))


class Hearer(nn.Module):
    """(B, M, T) -> logits (B, T / 4, V), from 0.8 s on each side of a frame."""

    def __init__(self, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv1d(80, width, 5, stride=STRIDE, padding=2)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, len(VOCABULARY) + 1)

    def forward(self, mel: Tensor) -> Tensor:
        return self.out(self.norm(self.blocks(F.gelu(self.stem(mel)).mT)))


def batch_of(some: Sequence[Utterance]) -> tuple[Tensor, Tensor, Tensor]:
    """(log-mel (B, M, T), filled with each one's silence; words (B, S), -1 behind; frames of the logits (B,))."""
    longest = max(one.mel.shape[1] for one in some)
    mel = torch.stack(
        [F.pad(one.mel.float(), (0, longest - one.mel.shape[1]), value=float(one.mel.min())) for one in some]
    )
    ids = [torch.tensor([VOCABULARY.index(word) + 1 for word in one.text]) for one in some]
    words = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
    return mel, words, torch.tensor([-(-one.mel.shape[1] // STRIDE) for one in some])


def masked(mel: Tensor, rng: np.random.Generator) -> Tensor:
    """SpecAugment (Park et al. 2019): two bands of up to 10 mels and two of up to 200 ms are taken out."""
    for row in mel:
        for axis, most in ((0, 10), (0, 10), (1, 20), (1, 20)):
            width = int(rng.integers(most + 1))
            start = int(rng.integers(row.shape[axis] - width))
            row.narrow(axis, start, width).fill_(0.0)
    return mel


def train(utterances: list[Utterance], seconds: float, seed: int) -> tuple[Hearer, int]:
    """(the trained network, how many utterances it heard)."""
    torch.manual_seed(seed)
    rng, model, began, step = np.random.default_rng(seed), Hearer(), time.perf_counter(), 0
    rates = {"learning_rate": 2e-3, "matrix_learning_rate": 0.02, "weight_decay": 0.1}
    optimizers, lengths = Optimizers(model, kind="muon", **rates), np.array([one.mel.shape[1] for one in utterances])
    while True:
        order = np.argsort(lengths + rng.uniform(0, 40, len(lengths)))  # of like length, but not the same each time
        parts = np.array_split(order, max(1, len(order) // BATCH))
        for place in rng.permutation(len(parts)):
            share = (time.perf_counter() - began) / seconds
            if share >= 1:
                return model.eval(), step * BATCH
            mel, words, frames = batch_of([utterances[i] for i in parts[place]])
            optimizers.set_factor(schedule(step, share, 50, 0.4))
            loss = ctc_loss(model(masked(mel, rng)), words, frames)
            loss.backward()
            nn.utils.clip_grad_norm_(optimizers.parameters, 1.0)
            for optimizer in optimizers.optimizers:
                optimizer.step()
            optimizers.zero_grad()
            step += 1
            if step % 100 == 0:
                print(f"step {step}, {share * seconds:.0f} s: loss {loss:.3f} a word", file=sys.stderr)


def edits(said: list[str], heard: list[str]) -> int:
    """The fewest words to put in, take out or change to make one of the other (Levenshtein)."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]


def word_errors(said: Sequence[list[str]], heard: Sequence[list[str]]) -> float:
    return sum(edits(a, b) for a, b in zip(said, heard, strict=True)) / sum(map(len, said))


@torch.no_grad()
def score(model: Hearer, utterances: list[Utterance]) -> dict[str, float]:
    """Word errors of greedy and prefix search, and of other sentences; median error of a word's middle, in ms."""

    def text_of(labels: list[int]) -> list[str]:
        return [VOCABULARY[label - 1] for label in labels]

    greedy, beam, off = [], [], []
    for start in range(0, len(utterances), BATCH):
        some = utterances[start : start + BATCH]
        mel, words, frames = batch_of(some)
        logits = model(mel)
        greedy += [text_of(labels) for labels in ctc_greedy(logits, frames)]
        beam += [text_of(found[0][0]) for found in ctc_beam(logits, frames, width=8)]
        for one, path in zip(some, ctc_align(logits, words, frames), strict=True):
            for place, (_, begins, ends) in enumerate(one.words):
                heard_at = float((path == place).nonzero().float().mean()) * STRIDE / 100
                off.append(1000 * abs(heard_at - (begins + ends) / 2))
    said = [one.text for one in utterances]
    blind = word_errors(said[len(said) // 2 :] + said[: len(said) // 2], greedy)
    errors = {"greedy": word_errors(said, greedy), "beam": word_errors(said, beam), "blind": blind}
    return errors | {"ms": float(np.median(off))}


def run(minutes: float, number: int, seed: int, command: str) -> str:
    """Draw, train, score; returns the section of the results file."""
    began = time.perf_counter()
    utterances = draw(number, seed, mixed, speakers=False, texts=False)
    drawing, heard = time.perf_counter() - began, sum(one.mel.shape[1] for one in utterances) / 100
    model, trained = train(utterances, 60 * minutes, seed)
    cases = {
        "unseen sentences, unseen speakers": (clean, True, " (goal at most 0.005)"),
        "unseen sentences, unseen speakers, 10 dB and an echo": (hard, True, " (goal at most 0.03)"),
        "unseen sentences, speakers as in training": (clean, False, ""),
    }
    rows = []
    for name, (spoil, unseen, goal) in cases.items():
        figures = score(model, draw(TESTED, seed + 1, spoil, speakers=unseen, texts=True))
        shown = [f"{figures[key]:.4f}" for key in ("greedy", "beam", "blind")]
        rows.append([name, shown[0] + goal, *shown[1:], f"{figures['ms']:.0f}"])
    size = sum(p.numel() for p in model.parameters())
    lines = [
        "## Hearing drawn voices",
        "",
        " ".join(__doc__.split("\n\n")[1].split()),
        "",
        results.table(["what is heard", "word errors, greedy", "prefix search", "blind", "middle of a word, ms"], rows),
        "",
        f"- {size:,} parameters, {number:,} utterances ({heard:,.0f} s, as log-mel in {drawing:.0f} s), "
        f"{trained:,} heard in {minutes:g} minutes; {TESTED} tested a row.",
        f"- {timing.machine('cpu')}. torch {torch.__version__}. Commit {timing.commit(Path(__file__).parent)}. "
        f"`{command}`",
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ command


@click.command("voice")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=4.0, show_default=True, help="Of training.")
@click.option("--utterances", type=click.IntRange(64), default=4_000, show_default=True, help="To train on.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of voices, weights and order.")
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md.")
def command(minutes: float, utterances: int, seed: int, write: bool) -> None:
    """A small network under CTC learns to hear drawn voices; speakers and sentences that it never heard."""
    results.present("voice", run(minutes, utterances, seed, results.command_given()), write)
