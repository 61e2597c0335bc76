"""`ask`: one question about one image file, or one text, or a prompt that takes one after the other."""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from vqa_scratch.command_line import Flag, GroupedCommand, flags
from vqa_scratch.commands.line import (
    DEVICE,
    FOLDER,
    MODEL,
    PRECISION,
    PRODUCT_FORMATS,
    check_image,
    open_asked,
    open_ears,
)
from vqa_scratch.errors import UserError
from vqa_scratch.generation_options import GenerationOptions
from vqa_scratch.options import flag


@click.command(
    "ask",
    cls=GroupedCommand,
    params=[
        click.Argument(["run"], type=FOLDER, required=False),
        MODEL,
        Flag(["--image"], type=FOLDER, help="Image file of any size that Pillow reads; a language model takes none."),
        Flag(["--question"], help="What to ask, or the text to answer; without it, a prompt for many."),
        Flag(["--voice"], type=FOLDER, help="Instead of --question: a sound file in which it is asked."),
        Flag(
            ["--voice-model"],
            help="What hears it, if RUN does not: a run of --preset voice, or a Whisper (folder, .pt file, Hub id).",
        ),
        Flag(["--top"], type=click.IntRange(min=1), help="Give this many answers, if the system chooses from a list."),
        *flags(GenerationOptions),
        DEVICE,
        PRECISION,
        Flag(["--quantize"], type=PRODUCT_FORMATS, help="Round the decoder's weights (bf16).", group="Computing"),
    ],
)
def ask(
    run: Path | None,
    model: str | None,
    image: Path | None,
    question: str | None,
    voice: Path | None,
    voice_model: str | None,
    top: int | None,
    device: str,
    precision: str,
    quantize: str | None,
    **decoding: Any,
) -> None:
    """Ask the trained system in the folder RUN, or a released model (--model), about one image; or one that reads
    texts alone.

    \b
    Examples:
      python -m vqa_scratch ask runs/vqa --image photo.jpg --question "how many dogs are there?"
      python -m vqa_scratch ask runs/rlhf-lm --question "why is the sky dark at night?"
    Without --question the system stays loaded and takes one question a line, from the keyboard or a pipe. With --voice
    the words that --voice-model hears are printed, and are the question.
    """
    if voice is not None and question is not None:
        raise UserError("--question is typed, --voice spoken: give one of them")
    if voice is None and voice_model is not None:
        raise UserError("--voice-model hears --voice, a sound file: give both")
    check_image(run, model, image is not None)
    system = open_asked(run, model, device, precision, quantize)
    decoding = {name: value for name, value in decoding.items() if value is not None}
    if decoding and not system.writes:
        raise UserError(f"{run or model} does not take {flag(next(iter(decoding)))}: leave it out")
    if voice is not None and voice_model is None:
        if not hasattr(system, "ask_aloud"):  # a released model
            raise UserError(f"{run or model} hears no questions: give --voice-model, what writes them down")
        tell(system.ask_aloud(image, voice, decoding))
        return
    if voice is not None and voice_model is not None:
        question = heard(voice, voice_model, device, precision)
        print(f"heard: {question}", flush=True)
    # It answers questions, and there is a place for them.
    if question is None and system.example and sys.stdin is not None:
        prompt(system, image, top, decoding)
    else:
        show(system, image, question, top, decoding)


def heard(recording: Path, model: str, device: str, precision: str) -> str:
    """The words that a model hears in a recording. Raises UserError if there are none."""
    from vqa_scratch.audio.reading import read_audio

    wave = read_audio(recording)  # before a model is opened
    segments = open_ears(model, device, precision).transcribe(wave)
    words = " ".join(segment.text.strip() for segment in segments)
    if not words:
        raise UserError(f"{model} hears no words in {recording}: ask again, nearer to the microphone")
    return words


def show(system: Any, image: Path | None, question: str | None, top: int | None, decoding: dict[str, Any]) -> None:
    """Print the answers to one question, and notes on stderr. Raises UserError as `System.ask` does."""
    answers, notes = system.ask(image, question, top, decoding)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    tell(answers)


def tell(answers: Sequence[Any]) -> None:
    for said in answers:
        print(f"{said.text or '(nothing)'}  (probability {said.probability:.3f})", flush=True)


def prompt(system: Any, image: Path | None, top: int | None, decoding: dict[str, Any]) -> None:
    """Answer each line of stdin until an empty one or its end; `image PATH` changes the image.

    What cannot be answered is said in a line on stderr, and the next line is read.
    Raises UserError if the image to begin with cannot be read, or if a pipe holds no question.
    """
    from vqa_scratch.data.image_files import load_image

    if image is not None:
        load_image(image)
    by_hand = sys.stdin.isatty()
    if by_hand:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401 -- its import gives input() arrow keys and a history
        about = "A text" if image is None else f"A question about {image.name}"
        change = "" if image is None else "`image PATH` changes it, "
        print(f"{about}, like {system.example!r}; {change}Enter or Ctrl-D ends.")

    def next_line() -> str:
        try:
            return (input("> ") if by_hand else sys.stdin.readline()).strip()
        except UnicodeDecodeError as error:
            raise UserError(f"the questions on stdin are not {error.encoding} text: byte {error.start}") from None

    asked = by_hand
    with contextlib.suppress(EOFError):
        while line := next_line():
            asked = True
            try:
                command, _, rest = line.partition(" ")
                if command == "image" and image is not None:
                    path = Path(os.path.expanduser(rest.strip().strip("'\"")))  # Path's raises for ~nobody
                    load_image(path)
                    image = path
                else:
                    show(system, image, line, top, decoding)
            except UserError as error:
                print(error, file=sys.stderr, flush=True)
    if not asked:
        raise UserError("there is no question: give --question, or one a line on stdin")
