"""`export`: writes a trained system in the layout that `transformers` loads."""

import sys
from pathlib import Path

import click

from vqa_scratch.command_line import GroupedCommand
from vqa_scratch.commands.line import FOLDER, check_no_run, open_run
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
    inside = [run.resolve(), *(run.resolve() / f"{name}_tokenizer" for name in ("text", "decoder"))]
    if folder.resolve() in inside:
        raise UserError(f"DIR must be another folder than RUN, whose files would be lost; not {folder}")
    check_no_run(folder, "DIR")
    opened = open_run(run)
    for note in opened.export(folder):
        print(f"note: {note}", file=sys.stderr)
    print(f"written to {folder}; {folder / 'README.md'} says how to load it")
