"""`transcribe`: what is said in a recording, with times."""

from pathlib import Path
from typing import Any

import click

from vqa_scratch.command_line import Flag, GroupedCommand, NearChoice, flags
from vqa_scratch.commands.line import DEVICE, FOLDER, PRECISION
from vqa_scratch.errors import UserError
from vqa_scratch.generation_options import GenerationOptions

OPTIONS = ("max_new_tokens", "num_beams", "length_penalty", "no_repeat_ngram_size")  # of a window


@click.command(
    "transcribe",
    cls=GroupedCommand,
    params=[
        click.Argument(["recording"], type=FOLDER, metavar="FILE"),
        Flag(["--model"], required=True, help="A released Whisper: a folder, OpenAI's .pt file, or Hub id."),
        Flag(["--language"], help="What is spoken, as a code like en or de; without it the model finds out."),
        Flag(["--task"], type=NearChoice(("transcribe", "translate")), default="transcribe", help="Or into English."),
        Flag(["--words"], is_flag=True, help="The times of each word."),
        Flag(["--times/--no-times"], default=True, help="Without times the words of at most 30 s are a little surer."),
        Flag(["--previous-text"], is_flag=True, help="Hear each window as the continuation of the one before."),
        Flag(["--format"], type=NearChoice(("txt", "srt", "vtt", "json")), default="txt", help="How it is written."),
        Flag(["--out"], type=FOLDER, help="A file to write, in place of the terminal."),
        *(option for option in flags(GenerationOptions) if option.name in OPTIONS),
        DEVICE,
        PRECISION,
    ],
)
def transcribe(
    recording: Path,
    model: str,
    language: str | None,
    task: str,
    words: bool,
    times: bool,
    previous_text: bool,
    format: str,
    out: Path | None,
    device: str,
    precision: str,
    **decoding: Any,
) -> None:
    """Write down what is said in the sound file FILE, of any length.

    \b
    Examples:
      python -m vqa_scratch transcribe --model openai/whisper-tiny.en talk.wav
      python -m vqa_scratch transcribe --model ./whisper-small talk.mp3 --language de --format srt --out talk.srt
    """
    from vqa_scratch.audio.reading import read_audio
    from vqa_scratch.storage import check_writable, write_text
    from vqa_scratch.training.precision import pick_device
    from vqa_scratch.transcription import formats, open_transcriber

    if out is not None:
        check_writable(out.parent)
        if out.is_dir():
            raise UserError(f"--out {out} is a folder; give a file")
    opened = open_transcriber(model, pick_device(device), precision)
    decoding = {name: value for name, value in decoding.items() if value is not None}
    opened.check(language, task, decoding.get("max_new_tokens"))
    decoding |= {"words": words, "times": times, "previous_text": previous_text}
    found = opened.transcribe(read_audio(recording), language=language, task=task, **decoding)
    written = formats.written(found, format)
    if out is None:
        for line in written:
            print(line, flush=True)
    else:
        write_text(out, "\n".join(written) + "\n")
