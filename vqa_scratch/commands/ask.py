"""`ask`: one question about one image file."""

import sys
from pathlib import Path

import click

from vqa_scratch.commands.line import FOLDER, open_run, where_to_compute


@click.command("ask")
@click.argument("run", type=FOLDER)
@click.option("--image", type=FOLDER, required=True, help="Image file of any size that Pillow reads.")
@click.option("--question", help="What to ask.")
@click.option("--top", type=click.IntRange(min=1), help="So many answers, where the system scores a list of them.")
@where_to_compute
def ask(run: Path, image: Path, question: str | None, top: int | None, device: str, precision: str) -> None:
    """Ask the trained system in the folder RUN about one image."""
    answers, notes = open_run(run, device, precision).ask(image, question, top)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for said in answers:
        print(f"{said.text or '(nothing)'}  (probability {said.probability:.3f})")
