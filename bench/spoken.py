"""Questions asked aloud: the answers of a run to what is heard, as a share of those to what is typed.

Questions of the built-in test split that the training of a hearing run never heard are said by speakers that it never
heard, clean, and with an echo and 10 dB of noise. That run, of `train.py --preset voice`, writes them down, and the run
that answers questions answers what was written. A run of `--preset spoken` hears them itself, clean. Accuracy is the
official one.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from bench import results, timing
from vqa_scratch import systems
from vqa_scratch.data.spoken import KINDS, draw
from vqa_scratch.data.voices import is_unseen
from vqa_scratch.data.vqa_v2 import VQASample, read_vqa, spread
from vqa_scratch.metrics import word_error_rate
from vqa_scratch.systems.questions import built_in
from vqa_scratch.systems.scoring import score
from vqa_scratch.systems.voice import AT_ONCE, VoiceSystem, in_batches
from vqa_scratch.systems.voice_report import WAYS, plain

CHAIN, WHOLE = 0.98, 0.93  # goals, of the typed accuracy: by way of a transcript, and without


def heard_by(voice: VoiceSystem, samples: Sequence[VQASample], kind: str, seed: int) -> list[str]:
    """What the run hears of each question, said by a speaker of its own, in the first window of it."""
    said = draw([sample.question for sample in samples], (seed, 9), {kind: KINDS[kind]}, unseen=True)
    most = voice.model.whisper.config.frames
    said = [replace(one, mel=one.mel[:most]) for one in said]
    spoken = voice.listed(said)
    found = voice.hear(spoken, in_batches(len(said), AT_ONCE), WAYS[:1], progress=kind)[WAYS[0]]
    return [found[row] for row in range(len(said))]


def run(asked: Path, hears: Path, whole: Path | None, number: int, seed: int, command: str) -> str:
    """Answer typed and spoken questions; returns the section of the results file."""
    answering: Any = systems.load(asked)
    voice: Any = systems.load(hears)
    samples = [one for one in read_vqa(built_in(answering.options), "test").samples if is_unseen(one.question)]
    samples = spread(samples, number)
    typed = score(samples, answering.answer(samples, progress="typed")).accuracy
    rows = [["typed", f"{typed:.4f}", "1", "", "0"]]
    for kind in KINDS:
        texts = heard_by(voice, samples, kind, seed)
        changed = [replace(one, question=text or "?") for one, text in zip(samples, texts, strict=True)]
        accuracy = score(changed, answering.answer(changed, progress="spoken")).accuracy
        errors = word_error_rate([plain(one.question) for one in samples], [plain(text) for text in texts])
        goal = f"at least {CHAIN}" if kind == next(iter(KINDS)) else ""
        rows.append(
            [f"spoken, {kind}", f"{accuracy:.4f}", f"{accuracy / typed if typed else 0:.4f}", goal, f"{errors:.4f}"]
        )
    if whole is not None:
        accuracy = score(samples, systems.load(whole).answer(samples, progress="heard")).accuracy
        share = accuracy / typed if typed else 0.0
        rows.append(["spoken, clean, no transcript", f"{accuracy:.4f}", f"{share:.4f}", f"at least {WHOLE}", ""])
    head = ["questions", "accuracy", "share of typed", "goal", "word errors"]
    return "\n".join(
        [
            "## Questions asked aloud",
            "",
            " ".join(__doc__.split("\n\n")[1].split()),
            "",
            results.table(head, rows),
            "",
            f"- {len(samples):,} questions, each by a speaker of its own.",
            f"- {timing.machine('cpu')}. torch {torch.__version__}. Commit {timing.commit(Path(__file__).parent)}. "
            f"`{command}`",
        ]
    )


@click.command("spoken")
@click.option(
    "--run", "asked", type=click.Path(path_type=Path), default=Path("runs/vqa"), show_default=True, help="Answers."
)
@click.option("--voice", type=click.Path(path_type=Path), default=Path("runs/voice"), show_default=True, help="Hears.")
@click.option("--spoken", type=click.Path(path_type=Path), help="A run of --preset spoken, which hears and answers.")
@click.option("--questions", type=click.IntRange(1), default=1_000, show_default=True, help="Asked aloud.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the speakers.")
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md.")
def command(asked: Path, voice: Path, spoken: Path | None, questions: int, seed: int, write: bool) -> None:
    """Answers to questions asked aloud, as a share of those to typed ones."""
    results.present("spoken", run(asked, voice, spoken, questions, seed, results.command_given()), write)
