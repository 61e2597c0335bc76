"""Hearing drawn voices: a small network under CTC learns words from some speakers and sentences, and hears others.

Half of the training utterances have noise, half an echo. Word error rate is (substituted + left out + added) / said,
summed over all words. The middle of a word is where the likeliest path says it; it is compared with the middle of when
the voice said it. `blind` scores what was heard against other sentences.

Shapes: B utterances, T frames of 10 ms, M mels, V words with the blank.
"""

import random
import sys
import time
from collections.abc import Sequence
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
    """(B, M, T) -> logits (B, T / 4, V), from 0.8 s on each side of a frame."""

    def __init__(self, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv1d(80, width, 5, stride=STRIDE, padding=2)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, len(VOCABULARY) + 1)

    def forward(self, mel: Tensor) -> Tensor:
        return self.out(self.norm(self.blocks(F.gelu(self.stem(mel)).mT)))


def batch_of(some: Sequence[Utterance], bands: int = 0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(log-mel (B, M, T), `bands` of it taken out; words (B, S), -1 behind the last; frames of the logits (B,))."""
    mels = [one.mel for one in some]
    rng = np.random.default_rng(seed)
    mel = windows([masked(one, bands, rng) for one in mels], max(map(len, mels)))
    ids = [torch.tensor([VOCABULARY.index(word) + 1 for word in plain(one.text).split()]) for one in some]
    words = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
    return mel, words, torch.tensor([-(-len(one) // STRIDE) for one in mels])


def train(utterances: list[Utterance], seconds: float, seed: int) -> tuple[Hearer, int]:
    """(the trained network, how many utterances it heard)."""
    torch.manual_seed(seed)
    rng, model, began, step = np.random.default_rng(seed), Hearer(), time.perf_counter(), 0
    rates = {"learning_rate": 2e-3, "matrix_learning_rate": 0.02, "weight_decay": 0.1}
    optimizers, lengths = Optimizers(model, kind="muon", **rates), np.array([len(one.mel) for one in utterances])
    while True:
        order = np.argsort(lengths + rng.uniform(0, 40, len(lengths)))  # of like length, but not the same each time
        parts = np.array_split(order, max(1, len(order) // BATCH))
        for place in rng.permutation(len(parts)):
            share = (time.perf_counter() - began) / seconds
            if share >= 1:
                return model.eval(), step * BATCH
            mel, words, frames = batch_of([utterances[i] for i in parts[place]], 2, step)
            optimizers.set_factor(schedule(step, share, 50, 0.4))
            loss = ctc_loss(model(mel), words, frames)
            loss.backward()
            nn.utils.clip_grad_norm_(optimizers.parameters, 1.0)
            for optimizer in optimizers.optimizers:
                optimizer.step()
            optimizers.zero_grad()
            step += 1
            if step % 100 == 0:
                print(f"step {step}, {share * seconds:.0f} s: loss {loss:.3f} a word", file=sys.stderr)


@torch.no_grad()
def score(model: Hearer, utterances: list[Utterance]) -> dict[str, float]:
    """Word errors of greedy and prefix search, and of other sentences; median error of a word's middle, in ms."""

    def text_of(labels: list[int]) -> str:
        return " ".join(VOCABULARY[label - 1] for label in labels)

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
    said = [plain(one.text) for one in utterances]
    blind = word_error_rate(said[len(said) // 2 :] + said[: len(said) // 2], greedy)
    errors = {"greedy": word_error_rate(said, greedy), "beam": word_error_rate(said, beam), "blind": blind}
    return errors | {"ms": float(np.median(off))}


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
