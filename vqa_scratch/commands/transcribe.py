"""`transcribe`: what is said in a recording, with times."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vqa_scratch.command_line import Flag, GroupedCommand, NearChoice, flags
from vqa_scratch.commands.line import DEVICE, FOLDER, PRECISION, open_ears
from vqa_scratch.errors import UserError
from vqa_scratch.generation_options import GenerationOptions

if TYPE_CHECKING:
    from vqa_scratch.transcription import Segment

OPTIONS = ("num_beams", "length_penalty", "no_repeat_ngram_size")  # of a window
MOST = click.IntRange(1)


@click.command(
    "transcribe",
    cls=GroupedCommand,
    params=[
        click.Argument(["paths"], type=FOLDER, metavar="[RUN] FILE", nargs=-1),
        Flag(["--model"], help="Instead of RUN: a released Whisper, a folder, OpenAI's .pt file or Hub id."),
        Flag(["--language"], help="What is spoken, as a code like en or de; without it the model finds out."),
        Flag(["--task"], type=NearChoice(("transcribe", "translate")), default="transcribe", help="Or into English."),
        Flag(["--words"], is_flag=True, help="The times of each word."),
        Flag(
            ["--times/--no-times"],
            default=None,
            shown="if the model knows them",
            help="Without times the words of at most 30 s are a little surer.",
        ),
        Flag(["--previous-text"], is_flag=True, help="Hear each window as the continuation of the one before."),
        Flag(["--format"], type=NearChoice(("txt", "srt", "vtt", "json")), default="txt", help="How it is written."),
        Flag(["--out"], type=FOLDER, help="A file to write, in place of the terminal."),
        Flag(["--max-new-tokens"], type=MOST, help="Tokens of a window at most.", shown=224, group="Decoding"),
        *(option for option in flags(GenerationOptions) if option.name in OPTIONS),
        DEVICE,
        PRECISION,
    ],
)
def transcribe(
    paths: tuple[Path, ...],
    model: str | None,
    language: str | None,
    task: str,
    format: str,
    out: Path | None,
    device: str,
    precision: str,
    **how: Any,
) -> None:
    """Write down what is said in the sound file FILE: by a run of `train.py --preset voice`, RUN, or by a released
    Whisper (--model), which takes any length.

    \b
    Examples:
      python -m vqa_scratch transcribe runs/voice question.wav
      python -m vqa_scratch transcribe --model openai/whisper-tiny.en talk.wav
      python -m vqa_scratch transcribe --model ./whisper-small talk.mp3 --language de --format srt --out talk.srt
    """
    from tqdm import tqdm

    from vqa_scratch.audio.features import RATE
    from vqa_scratch.audio.reading import read_audio
    from vqa_scratch.storage import check_writable, write_text
    from vqa_scratch.training.allocator import keep_freed_memory
    from vqa_scratch.training.progress import Redrawn
    from vqa_scratch.transcription import formats

    if len(paths) != (2 if model is None else 1):
        wanted = "RUN and FILE, or --model and FILE" if model is None else "FILE alone beside --model"
        raise UserError(f"give {wanted}; here are {len(paths)} paths")
    recording = paths[-1]
    if out is not None:
        check_writable(out.parent)
        if out.is_dir():
            raise UserError(f"--out {out} is a folder; give a file")
    keep_freed_memory()
    opened = open_ears(str(paths[0]) if model is None else model, device, precision)
    how = {name: value for name, value in how.items() if value is not None}
    opened.check(language, task, how.get("max_new_tokens"))  # before a long file is read
    wave = read_audio(recording)
    shape = "{desc} {percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} s [{elapsed}<{remaining}]"
    bar = tqdm(desc="listening", total=len(wave) / RATE, bar_format=shape, leave=False)
    with bar, Redrawn(bar.refresh):  # a window of 30 s, its tries and all, may take minutes

        def heard() -> Iterator["Segment"]:
            for segment in opened.transcribe(wave, language=language, task=task, **how):
                bar.update(min(segment.end, bar.total) - bar.n)
                yield segment

        written = formats.written(heard(), format)
        if out is None:
            for line in written:
                with bar.external_write_mode():
                    print(line, flush=True)
        else:
            write_text(out, "\n".join(written) + "\n")
