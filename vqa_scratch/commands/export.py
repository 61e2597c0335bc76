"""`export`: writes a trained system in the layout that `transformers` loads, and publishes it if asked to."""

import sys
from pathlib import Path

import click

from vqa_scratch.command_line import Flag, GroupedCommand
from vqa_scratch.commands.line import FOLDER, check_no_run, open_run
from vqa_scratch.errors import UserError
from vqa_scratch.storage import check_writable
from vqa_scratch.weights.hub import check_publishable, publish


@click.command(
    "export",
    cls=GroupedCommand,
    params=[
        click.Argument(["run"], type=FOLDER),
        click.Argument(["folder"], type=FOLDER, metavar="DIR"),
        Flag(["--push"], metavar="OWNER/NAME", help="Publish the model on the Hugging Face Hub under this name."),
        Flag(["--private"], is_flag=True, help="Let only the owner see it there.  (--push)"),
    ],
)
def export(run: Path, folder: Path, push: str | None, private: bool) -> None:
    """Write the trained system in the folder RUN to DIR, in the layout of `transformers`.

    With --push the files written, and no others, go to the Hugging Face Hub too, with the login of `hf auth login`
    or the token in HF_TOKEN. Their README.md is the model's page.

    \b
    Example:
      python -m vqa_scratch export runs/vqa exported/
      python -m vqa_scratch export runs/vqa exported/ --push me/my-vqa --private
    """
    check_writable(folder)
    inside = [run.resolve(), *(run.resolve() / f"{name}_tokenizer" for name in ("text", "decoder"))]
    if folder.resolve() in inside:
        raise UserError(f"DIR must be another folder than RUN, whose files would be lost; not {folder}")
    check_no_run(folder, "DIR")
    if push is not None:
        check_publishable(push)
    elif private:
        raise UserError("--private says how to publish: it needs --push OWNER/NAME")
    opened, before = open_run(run), _files(folder) if push else {}
    for note in opened.export(folder):
        print(f"note: {note}", file=sys.stderr)
    print(f"written to {folder}; {folder / 'README.md'} says how to load it")
    if push is not None:
        written = [name for name, state in _files(folder).items() if before.get(name) != state]
        print(f"published: {publish(folder, written, push, private)}")


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """{path of every file below the folder: what changes when it is written anew}."""
    states = ((path, path.stat()) for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): (state.st_ino, state.st_mtime_ns) for path, state in states}
