"""Hearing drawn voices: a small network under CTC learns words from some speakers and sentences, and hears others.

Half of the training utterances have noise, half an echo. Word error rate is (substituted + left out + added) / said,
summed over all words. `blind` scores what was heard against other sentences.

When a word is said is read from the likeliest path through its sounds (phonemes), from the first to the last of them:
the network writes these too, under a CTC of their own. The label of a whole word does not tell. CTC pays for a word
once, anywhere between the words beside it, so the label is a spike of one frame, and the network, which hears 0.8 s on
each side, puts it where it is surest. The table has how far the middle of a word is from the truth, by both (medians).

Shapes: B utterances, T frames of 10 ms, M mels, V words with the blank, P sounds with the blank.
"""

import random
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import results, timing
from vqa_scratch.data.spoken import CLEAN, HARD, KINDS, Spoil, Utterance, draw, masked, mixed, plain, windows
from vqa_scratch.data.voices import WORDS, sentences
from vqa_scratch.generate.ctc import ctc_beam, ctc_greedy
from vqa_scratch.kernels import ctc_align, ctc_loss
from vqa_scratch.metrics import word_error_rate
from vqa_scratch.training.optimizers import Optimizers, schedule

VOCABULARY = sorted(WORDS)  # from 1 on; 0 is the blank
SPELLED = {word: [sound.rstrip("1") for sound in sounds.split()] for word, sounds in WORDS.items()}
SOUNDS = sorted({sound for sounds in SPELLED.values() for sound in sounds})  # likewise
BATCH, TESTED, STRIDE = 32, 200, 4


def drawn(number: int, seed: int, kinds: dict[str, Spoil], *, speakers: bool, texts: bool) -> list[Utterance]:
    """Utterances of `speakers` that training never hears (True) or may hear, saying such `texts`."""
    asked = islice(sentences(random.Random(seed), unseen=texts), number)
    return draw(list(asked), (seed,), kinds, unseen=speakers)


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
    """(B, M, T) -> logits of words (B, T / 4, V) and of sounds (B, T / 4, P), from 0.8 s on each side of a frame."""

    def __init__(self, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv1d(80, width, 5, stride=STRIDE, padding=2)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm, self.words = nn.LayerNorm(width), nn.Linear(width, len(VOCABULARY) + 1)
        self.sounds = nn.Linear(width, len(SOUNDS) + 1)

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        states = self.norm(self.blocks(F.gelu(self.stem(mel)).mT))
        return self.words(states), self.sounds(states)


def padded(names: Sequence[Sequence[str]], known: list[str]) -> Tensor:
    """(B, S) the places of names among those `known`, from 1 on, -1 behind."""
    rows = [torch.tensor([known.index(name) + 1 for name in row]) for row in names]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def batch_of(some: Sequence[Utterance], bands: int = 0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-mel (B, M, T), `bands` of it taken out; words (B, S); sounds (B, S'); frames of the logits (B,))."""
    mels = [one.mel for one in some]
    rng = np.random.default_rng(seed)
    mel = windows([masked(one, bands, rng) for one in mels], max(map(len, mels)))
    said = [plain(one.text).split() for one in some]
    words, sounds = padded(said, VOCABULARY), padded([[s for w in row for s in SPELLED[w]] for row in said], SOUNDS)
    return mel, words, sounds, torch.tensor([-(-len(one) // STRIDE) for one in mels])


def learn(
    model: nn.Module, lengths: Sequence[int], loss_of: Callable[[list[int], int], Tensor], seconds: float, seed: int
) -> int:
    """Train for so many seconds of one core, whatever else runs there; returns how many utterances went by, with the
    model in eval mode. `loss_of` gets the places of a batch, utterances of like length, and the number of the step.
    """
    rng, began, step = np.random.default_rng(seed), time.process_time(), 0
    rates = {"learning_rate": 2e-3, "matrix_learning_rate": 0.02, "weight_decay": 0.1}
    optimizers, longs = Optimizers(model, kind="muon", **rates), np.array(lengths)
    while True:
        order = np.argsort(longs + rng.uniform(0, longs.mean() / 6, len(longs)))  # but not the same each time
        parts = np.array_split(order, max(1, len(order) // BATCH))
        for place in rng.permutation(len(parts)):
            share = (time.process_time() - began) / seconds
            if share >= 1:
                model.eval()
                return step * BATCH
            optimizers.set_factor(schedule(step, share, 50, 0.4))
            loss = loss_of(parts[place].tolist(), step)
            loss.backward()
            nn.utils.clip_grad_norm_(optimizers.parameters, 1.0)
            for optimizer in optimizers.optimizers:
                optimizer.step()
            optimizers.zero_grad()
            step += 1
            if step % 100 == 0:
                print(f"step {step}, {share * seconds:.0f} s: loss {loss:.3f}", file=sys.stderr)


def train(utterances: list[Utterance], seconds: float, seed: int) -> tuple[Hearer, int]:
    """(the trained network, how many utterances it heard)."""
    torch.manual_seed(seed)
    model = Hearer()

    def loss_of(part: list[int], step: int) -> Tensor:
        mel, words, sounds, frames = batch_of([utterances[i] for i in part], 2, step)
        of_words, of_sounds = model(mel)
        return ctc_loss(of_words, words, frames) + ctc_loss(of_sounds, sounds, frames)

    return model, learn(model, [len(one.mel) for one in utterances], loss_of, seconds, seed)


def middles(path: Tensor, counts: Sequence[int]) -> list[float]:
    """Of an alignment (T,) to labels of which the first counts[0] make a word, the next counts[1] another, ...: the
    middle of each word in seconds."""
    places, first = [], 0
    for count in counts:
        at = ((path >= first) & (path < first + count)).nonzero()
        places.append(float(at[0] + at[-1]) / 2 * STRIDE / 100)
        first += count
    return places


@torch.no_grad()
def score(model: Hearer, utterances: list[Utterance]) -> dict[str, float]:
    """Word errors of greedy and prefix search, and of other sentences; how far the middle of a word is off, in ms: by
    its sounds and by its own label, and how late the latter is (medians)."""

    def text_of(labels: list[int]) -> str:
        return " ".join(VOCABULARY[label - 1] for label in labels)

    greedy, beam, late = [], [], {"sounds": [], "label": []}
    for start in range(0, len(utterances), BATCH):
        some = utterances[start : start + BATCH]
        mel, words, sounds, frames = batch_of(some)
        of_words, of_sounds = model(mel)
        greedy += [text_of(labels) for labels in ctc_greedy(of_words, frames)]
        beam += [text_of(found[0][0]) for found in ctc_beam(of_words, frames, width=8)]
        paths = ctc_align(of_words, words, frames), ctc_align(of_sounds, sounds, frames)
        for one, of_label, path in zip(some, *paths, strict=True):
            counts = [len(SPELLED[word]) for word, _, _ in one.words]
            for name, at in (("sounds", middles(path, counts)), ("label", middles(of_label, [1] * len(counts)))):
                late[name] += [1000 * (x - (a + b) / 2) for x, (_, a, b) in zip(at, one.words, strict=True)]
    said = [plain(one.text) for one in utterances]
    blind = word_error_rate(said[len(said) // 2 :] + said[: len(said) // 2], greedy)
    errors = {"greedy": word_error_rate(said, greedy), "beam": word_error_rate(said, beam), "blind": blind}
    off = {name: float(np.median(np.abs(values))) for name, values in late.items()}
    return errors | off | {"late": float(np.median(late["label"]))}


def run(minutes: float, number: int, seed: int, command: str) -> str:
    """Draw, train, score; returns the section of the results file."""
    began = time.perf_counter()
    utterances = drawn(number, seed, {"mixed": mixed}, speakers=False, texts=False)
    drawing, heard = time.perf_counter() - began, sum(len(one.mel) for one in utterances) / 100
    model, trained = train(utterances, 60 * minutes, seed)
    cases = {
        "unseen sentences, unseen speakers": (CLEAN, True, " (goal at most 0.005)"),
        "unseen sentences, unseen speakers, 10 dB and an echo": (HARD, True, " (goal at most 0.03)"),
        "unseen sentences, speakers as in training": (CLEAN, False, ""),
    }
    rows = []
    for name, (kind, unseen, goal) in cases.items():
        figures = score(model, drawn(TESTED, seed + 1, {kind: KINDS[kind]}, speakers=unseen, texts=True))
        shown = [f"{figures[key]:.4f}" for key in ("greedy", "beam", "blind")]
        times = f"{figures['sounds']:.0f}", f"{figures['label']:.0f} ({figures['late']:+.0f})"
        rows.append([name, shown[0] + goal, *shown[1:], *times])
    size = sum(p.numel() for p in model.parameters())
    head = ["what is heard", "word errors, greedy", "prefix search", "blind"]
    head += ["middle of a word by its sounds, ms", "by its label (late by), ms"]
    lines = [
        "## Hearing drawn voices",
        "",
        " ".join(" ".join(__doc__.split("\n\n")[1:3]).split()),
        "",
        results.table(head, rows),
        "",
        f"- {size:,} parameters, {number:,} utterances ({heard:,.0f} s, as log-mel in {drawing:.0f} s), "
        f"{trained:,} heard in {minutes:g} minutes of a core; {TESTED} tested a row.",
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
