"""Hearing a synthesiser that the program did not write: espeak-ng, in accents and variants of its voices.

A run of `train.py --preset voice` has heard drawn voices alone, or has learned from the recordings that this writes.
Sentences of `test` are in no training; its variants are not in `train` either. Word error rate is (substituted + left
out + added) / said, summed over all words.
"""

import csv
import random
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import click
import torch

from bench import results, timing
from vqa_scratch import systems
from vqa_scratch.data.voices import sentences
from vqa_scratch.errors import UserError
from vqa_scratch.systems.voice_report import WAYS

ACCENTS = ("en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan", "en-029")
NEVER, TRAINED = 0.25, 0.02  # goals: of a run that never heard espeak, and of one that learned from it
TABLE = "metadata.csv"


def variants(program: str) -> list[str]:
    """The names of espeak-ng's variants of a voice, such as f3."""
    listed = subprocess.run([program, "--voices=variant"], capture_output=True, text=True, check=True).stdout
    return sorted(line.split("!v/")[1].split()[0] for line in listed.splitlines() if "!v/" in line)


def record(folder: Path, number: int, tested: int, seed: int) -> None:
    """Write `number` recordings to train on, a tenth as many for val, and `tested` for test, with a table of them.

    Every fourth variant is kept for val and test. Raises UserError if espeak-ng is missing.
    """
    program = shutil.which("espeak-ng")
    if program is None:
        raise UserError("espeak-ng is not installed: it is a program of its own (apt-get install espeak-ng)")
    voices, jobs = variants(program), []
    for name, count in (("train", number), ("val", max(1, number // 10)), ("test", tested)):
        rng = random.Random(f"{seed}/{name}")
        known = [voice for place, voice in enumerate(voices) if (place % 4 == 0) == (name != "train")]
        for place, text in enumerate(islice(sentences(rng, unseen=name != "train"), count)):
            speaker = f"{rng.choice(ACCENTS)}+{rng.choice(known)}"
            wave = folder / name / f"{place:05d}.wav"
            wave.parent.mkdir(parents=True, exist_ok=True)
            manner = ["-v", speaker, "-s", str(rng.randint(140, 190)), "-p", str(rng.randint(25, 75))]
            jobs.append(([program, *manner, "-w", str(wave), text], [f"{name}/{wave.name}", text, speaker, name]))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda job: subprocess.run(job[0], check=True, stderr=subprocess.DEVNULL), jobs))
    with (folder / TABLE).open("w", encoding="utf-8", newline="") as file:  # last: a folder with it is whole
        csv.writer(file).writerows([["file_name", "text", "speaker", "split"], *(row for _, row in jobs)])


def run(folder: Path, runs: dict[str, Sequence[Path]], command: str) -> str:
    """Let each run hear the test split; `runs` maps a goal's name to runs. Returns the section of the results file."""
    rows, heard, goals = [], 0, {"never": NEVER, "trained": TRAINED}
    for kind, paths in runs.items():
        for path in paths:
            hearing: Any = systems.load(path)
            found = hearing.recognise(folder, "test", None)
            heard = found["utterances_heard"]
            errors, blind = found["word_errors"], found["baselines"]["shuffled_audio"][WAYS[0]]
            name = {"never": "drawn voices alone", "trained": "these recordings"}[kind]
            size = sum(p.numel() for p in hearing.model.parameters())
            goal = f"{errors[WAYS[0]]:.4f} (goal at most {goals[kind]})"
            rows.append([name, f"{size:,}", goal, *(f"{errors[way]:.4f}" for way in WAYS[1:]), f"{blind:.4f}"])
    head = ["learned from", "parameters", *(f"word errors, {way}" for way in WAYS), "shuffled audio"]
    return "\n".join(
        [
            "## Hearing espeak-ng",
            "",
            " ".join(" ".join(__doc__.split("\n\n")).split()),
            "",
            results.table(head, rows),
            "",
            f"- {heard:,} recordings of `test`, in {len(ACCENTS)} accents.",
            f"- {timing.machine('cpu')}. torch {torch.__version__}. Commit {timing.commit(Path(__file__).parent)}. "
            f"`{command}`",
        ]
    )


RUN = click.Path(exists=True, path_type=Path)


@click.command("espeak")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/espeak"), show_default=True, help="Sounds.")
@click.option("--voice", type=RUN, multiple=True, help="A run of --preset voice that never heard espeak-ng.")
@click.option("--trained", type=RUN, multiple=True, help="One with --data OUT, the recordings that this writes.")
@click.option("--utterances", type=click.IntRange(16), default=2_500, show_default=True, help="To train on.")
@click.option("--tested", type=click.IntRange(2), default=300, show_default=True, help="To test with.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of sentences and voices.")
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md.")
def command(
    out: Path, voice: Sequence[Path], trained: Sequence[Path], utterances: int, tested: int, seed: int, write: bool
) -> None:
    """Word errors on a synthesiser that drawn voices do not know; without runs it only records."""
    if not (out / TABLE).exists():
        record(out, utterances, tested, seed)
    if not voice and not trained:
        print(f"recordings in {out}; to learn from them: python train.py --preset voice --data {out}")
        return
    runs = {"never": voice, "trained": trained}
    results.present("espeak", run(out, runs, results.command_given()), write)
