"""`export`: writes a trained system in the layout that `transformers` loads."""

import sys
from pathlib import Path

import click

from vqa_scratch.command_line import GroupedCommand
from vqa_scratch.commands.line import FOLDER, open_run
from vqa_scratch.errors import UserError
from vqa_scratch.storage import check_writable


@click.command("export", cls=GroupedCommand)
@click.argument("run", type=FOLDER)
@click.argument("folder", type=FOLDER, metavar="DIR")
def export(run: Path, folder: Path) -> None:
    """Write the trained system in the folder RUN to DIR, in the layout of `transformers`.

    \b
    Example:
      python -m vqa_scratch export runs/vqa exported/
    """
    check_writable(folder)
    opened = open_run(run)
    if folder.resolve() == run.resolve():
        raise UserError("DIR must be another folder than RUN")
    for note in opened.export(folder):
        print(f"note: {note}", file=sys.stderr)
    print(f"written to {folder}; {folder / 'README.md'} says how to load it")
