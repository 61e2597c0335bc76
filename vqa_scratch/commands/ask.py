"""`ask`: one question about one image file."""

import sys
from pathlib import Path
from typing import Any

import click

from vqa_scratch.command_line import Flag, GroupedCommand, flags
from vqa_scratch.commands.line import DEVICE, FOLDER, PRECISION, open_run
from vqa_scratch.errors import UserError
from vqa_scratch.generation_options import GenerationOptions
from vqa_scratch.options import flag


@click.command(
    "ask",
    cls=GroupedCommand,
    params=[
        click.Argument(["run"], type=FOLDER, required=False),
        Flag(["--model"], help="Instead of RUN: a released BLIP-2 checkpoint, a folder or Hub id."),
        Flag(["--image"], type=FOLDER, required=True, help="Image file of any size that Pillow reads."),
        Flag(["--question"], help="What to ask."),
        Flag(["--top"], type=click.IntRange(min=1), help="Give this many answers, if the system chooses from a list."),
        *flags(GenerationOptions),
        DEVICE,
        PRECISION,
    ],
)
def ask(
    run: Path | None,
    model: str | None,
    image: Path,
    question: str | None,
    top: int | None,
    device: str,
    precision: str,
    **decoding: Any,
) -> None:
    """Ask the trained system in the folder RUN, or a released BLIP-2 (--model), about one image.

    \b
    Example:
      python -m vqa_scratch ask runs/vqa --image photo.jpg --question "how many dogs are there?"
    """
    if (run is None) == (model is None):
        raise UserError("give RUN, the folder of a trained system, or --model, a BLIP-2 checkpoint: one of the two")
    if model is None:
        system = open_run(run, device, precision)
    else:
        from vqa_scratch.training.precision import pick_device
        from vqa_scratch.zero_shot import open_zero_shot

        system = open_zero_shot(model, pick_device(device), precision)
    decoding = {name: value for name, value in decoding.items() if value is not None}
    if decoding and not system.writes:
        raise UserError(f"{run or model} does not take {flag(next(iter(decoding)))}: leave it out")
    answers, notes = system.ask(image, question, top, decoding)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for said in answers:
        print(f"{said.text or '(nothing)'}  (probability {said.probability:.3f})")
