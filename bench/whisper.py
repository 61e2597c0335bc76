"""Whisper on recordings against `transformers`: the same weights, the same tokens, the time of features and decoding.

Each side hears every clip on its own (batch 1), greedily, without times, as `transformers` does by default, and without
a second try: samples to features, encoder, tokens. Sides take turns over all clips; their tokens are equal, or there is
no table. What is said lies beside the clips, in a file `transcription`, a line "the words (name of the clip)" each, as
in the test data of PocketSphinx. Words are compared in lower case, without punctuation, "Mr." as "mister".
"""

import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor

import tests.torchvision_shim  # noqa: F401  (lets transformers import beside a CPU-only torch)
from bench import processes, results, timing
from vqa_scratch.audio.reading import read_audio
from vqa_scratch.errors import UserError
from vqa_scratch.fastest import timed
from vqa_scratch.storage import read_text
from vqa_scratch.training.allocator import keep_freed_memory
from vqa_scratch.transcription import open_transcriber
from vqa_scratch.transcription.window import Window

REAL_TIME, FASTER, FEATURES = 5, 1.5, 1  # goals
EQUAL = 1e-4  # log-mels at most so far apart, of 1.5: both round to fp32 before the logarithm of what may be small
HEAD = ("clips", "sound (s)", "ours (s)", "`transformers` (s)", "ours is faster by", "goal")
HEAD = (*HEAD, "than real time by", "goal", "word errors", "GB, ours / theirs")


class Side:
    """What both have in common: the clips, the clock, the memory."""

    def __init__(self, clips: Path) -> None:
        self.waves = [read_audio(path) for path in clips_in(clips)]
        timing.forget_peak()

    def hear(self, wave: Tensor) -> list[int]:
        """What is said in one clip, without the end token."""
        raise NotImplementedError

    def log_mel(self, wave: Tensor) -> Tensor:
        """(M, F): of one clip, filled up to 30 s."""
        raise NotImplementedError

    def log_mels(self) -> list[Tensor]:
        return [self.log_mel(wave) for wave in self.waves]

    def tokens(self) -> list[list[int]]:
        return [self.hear(wave) for wave in self.waves]

    def seconds(self, work: str) -> float:
        """Of "tokens" or "log_mels" of all clips, one after the other."""
        return timed(getattr(self, work))


class Ours(Side):
    """This project's window."""

    def __init__(self, folder: Path, clips: Path) -> None:
        keep_freed_memory()
        super().__init__(clips)
        self.opened = open_transcriber(str(folder), torch.device("cpu"))
        self.options = self.opened.options(self.opened.model.config.max_positions // 2, times=False)

    def hear(self, wave: Tensor) -> list[int]:
        states, words = self.opened.states(wave), self.opened.vocabulary
        prompt = [*words.prompt("en", "transcribe"), words.no_times]
        return Window(self.opened.model.decoder, words, states, prompt).attempt(self.options).ids

    def log_mel(self, wave: Tensor) -> Tensor:
        return self.opened.features(wave)[0]

    def texts(self) -> list[str]:
        """What is said in each clip."""
        return [self.opened.vocabulary.text(ids) for ids in self.tokens()]


class Peer(Side):
    """`transformers`: its features, its model, its `generate`."""

    def __init__(self, folder: Path, clips: Path) -> None:
        from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

        super().__init__(clips)
        self.features = WhisperFeatureExtractor.from_pretrained(folder)
        self.model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
        said = self.model.generation_config
        self.end = said.eos_token_id
        self.how: dict[str, Any] = {"return_timestamps": False, "do_sample": False}
        self.how |= {"language": "en", "task": "transcribe"} if said.is_multilingual else {}

    def hear(self, wave: Tensor) -> list[int]:
        found = self.features(wave.numpy(), sampling_rate=16_000, return_tensors="pt", return_attention_mask=True)
        ids = self.model.generate(found.input_features, attention_mask=found.attention_mask, **self.how)[0].tolist()
        return [index for index in ids if index < self.end]

    def log_mel(self, wave: Tensor) -> Tensor:
        """By numpy, which is its way without torch."""
        filled = F.pad(wave, (0, self.features.n_samples - len(wave))).numpy()
        return torch.from_numpy(self.features._np_extract_fbank_features(filled[None], "cpu")[0])


SIDES = {"ours": Ours, "peer": Peer}


def clips_in(folder: Path) -> list[Path]:
    """The clips of a folder, by name. Raises UserError if there are none."""
    clips = sorted(folder.glob("*.wav"))
    if not clips:
        raise UserError(f"{folder} holds no clips (*.wav)")
    return clips


def truths(folder: Path) -> list[str | None]:
    """What is said in each clip, where it is known."""
    path = folder / "transcription"
    lines = re.findall(r"^(?:<s> )?(.*?)(?: </s>)? \((\S+)\)$", read_text(path) if path.is_file() else "", re.M)
    known = {name: text for text, name in lines}
    return [known.get(clip.stem) for clip in clips_in(folder)]


def plain(text: str) -> list[str]:
    """Its words in lower case, without punctuation."""
    return ["mister" if word == "mr" else word for word in re.findall(r"[\w']+", text.lower())]


def word_errors(said: list[str], truth: list[str]) -> int:
    """The fewest words to insert, leave out or replace (Levenshtein)."""
    row = list(range(len(truth) + 1))
    for i, word in enumerate(said, 1):
        before, row = row, [i]
        for j, right in enumerate(truth, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (word != right)))
    return row[-1]


def mel_line(ask: Mapping[str, Callable[..., Any]], rounds: int) -> str:
    """The log-mels of both sides: that they are equal, and how long they take."""
    found = zip(*(one("log_mels")[1] for one in ask.values()), strict=True)
    apart = max((ours - theirs).abs().max().item() for ours, theirs in found)
    if apart > EQUAL:
        raise UserError(f"the log-mels of both sides are {apart:.1e} apart")
    taken = timing.in_turn({side: lambda one=one: one("seconds", "log_mels")[1] for side, one in ask.items()}, rounds)
    ours, theirs = (1000 * timing.Spread.of(taken[side]).median for side in SIDES)
    faster = timing.speedup(taken["ours"], taken["peer"]).median
    said = f"- The log-mels of all clips alone: {ours:.0f} ms, by the numpy of `transformers` {theirs:.0f} ms, "
    return said + f"**{faster:.1f}x** (goal {FEATURES}x); they differ by {apart:.0e} at most."


def run(model: Path, clips: Path, rounds: int, command: str) -> str:
    """Hold both sides to each other and time them; returns the section of the results file."""
    length = sum(len(read_audio(path)) for path in clips_in(clips)) / 16_000
    with tempfile.TemporaryDirectory() as name:
        open_transcriber(str(model), torch.device("cpu")).save(Path(name))
        with processes.contestants({side: (SIDES[side], Path(name), clips) for side in SIDES}) as sides:
            heard = {one.side: one.ask("tokens")[1] for one in sides}
            if heard["ours"] != heard["peer"]:
                different = [c.name for c, a, b in zip(clips_in(clips), *heard.values(), strict=True) if a != b]
                raise UserError(f"the sides wrote different tokens: {', '.join(different)}")
            texts = sides[0].ask("texts")[1]
            turns = {one.side: lambda one=one: one.ask("seconds", "tokens")[1] for one in sides}
            seconds = timing.in_turn(turns, rounds, lambda line: print(line, file=sys.stderr, flush=True))
            memory = {one.side: one.ask("peak_memory_gb")[1] for one in sides}
            features = mel_line({one.side: one.ask for one in sides}, rounds)
    ours, theirs = (timing.Spread.of(seconds[side]) for side in SIDES)
    faster = timing.speedup(seconds["ours"], seconds["peer"])
    errors, total, lines = 0, 0, []
    for clip, text, truth in zip(clips_in(clips), texts, truths(clips), strict=True):
        wrong = None if truth is None else word_errors(plain(text), plain(truth))
        errors, total = errors + (wrong or 0), total + len(plain(truth or ""))
        lines.append(
            f"- {clip.name}: {text.strip()}" + ("" if wrong is None else f" ({wrong} of {len(plain(truth or ''))})")
        )
    row = [str(len(texts)), f"{length:.1f}", ours.text(), theirs.text()]
    row += [f"**{faster.median:.2f}x** ({faster.low:.2f} to {faster.high:.2f})", f"{FASTER}x"]
    row += [f"{length / ours.median:.1f}x", f"{REAL_TIME}x", f"{errors} of {total}"]
    row += [" / ".join(f"{memory[side]:.2f}" for side in SIDES)]
    about = [text.replace("\n", " ") for text in (__doc__ or "").split("\n\n")[1:]]
    machine = f"- {timing.machine()}. torch {torch.__version__}, transformers {version('transformers')}. "
    machine += f"Commit {timing.commit(Path(__file__).parent)}. `{command}`"
    return "\n".join(
        ["## Whisper against `transformers`", "", *about, "", results.table(HEAD, [row]), "", *lines, features, machine]
    )


# ------------------------------------------------------------------------------------------------ command


@click.command("whisper")
@click.option("--model", type=click.Path(path_type=Path), required=True, help="A released Whisper, in any layout.")
@click.option("--clips", type=click.Path(path_type=Path), required=True, help="Folder of WAV files, and their texts.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns of each side.")
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md.")
def command(model: Path, clips: Path, rounds: int, write: bool) -> None:
    """Recordings heard by a released Whisper, here and in transformers: tokens, words, time."""
    results.present("whisper", run(model, clips, rounds, results.command_given()), write)
