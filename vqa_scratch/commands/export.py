"""`export`: writes a trained system in the layout that `transformers` loads, and publishes it if asked to."""

import sys
from pathlib import Path
from typing import Any

import click

from vqa_scratch.command_line import Flag, GroupedCommand
from vqa_scratch.commands.line import FILE_FORMATS, FOLDER, check_no_run, open_run
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
        Flag(["--quantize"], type=FILE_FORMATS, help="Write a run folder instead, with a smaller decoder."),
        Flag(["--calibrate"], is_flag=True, help="Choose codes by GPTQ, on its training questions.  (--quantize)"),
    ],
)
def export(run: Path, folder: Path, push: str | None, private: bool, quantize: str | None, calibrate: bool) -> None:
    """Write the trained system in the folder RUN to DIR, in the layout of `transformers`.

    With --push the files written, and no others, go to the Hugging Face Hub too, with the login of `hf auth login`
    or the token in HF_TOKEN. Their README.md is the model's page.

    With --quantize DIR is a smaller run folder, for `ask`, `evaluate` and `study` (docs/quantization.md).

    \b
    Example:
      python -m vqa_scratch export runs/vqa exported/
      python -m vqa_scratch export runs/vqa exported/ --push me/my-vqa --private
      python -m vqa_scratch export runs/vqa small/ --quantize int8
    """
    check_writable(folder)
    inside = [run.resolve(), *(run.resolve() / f"{name}_tokenizer" for name in ("text", "decoder"))]
    if folder.resolve() in inside:
        raise UserError(f"DIR must be another folder than RUN, whose files would be lost; not {folder}")
    check_no_run(folder, "DIR")
    if quantize is not None and push is not None:
        raise UserError("--push publishes the layout of `transformers`, with no place for --quantize: leave out one")
    if push is not None:
        check_publishable(push)
    elif private:
        raise UserError("--private says how to publish: it needs --push OWNER/NAME")
    if quantize is not None:
        _quantize(run, folder, quantize, calibrate)
        return
    if calibrate:
        raise UserError("--calibrate says how to choose codes: it needs --quantize")
    opened, before = open_run(run), _files(folder) if push else {}
    for note in opened.export(folder):
        print(f"note: {note}", file=sys.stderr)
    print(f"written to {folder}; {folder / 'README.md'} says how to load it")
    if push is not None:
        written = [name for name, state in _files(folder).items() if before.get(name) != state]
        print(f"published: {publish(folder, written, push, private)}")


def _quantize(run: Path, folder: Path, name: str, calibrate: bool) -> None:
    from vqa_scratch.systems.quantize import save_quantized
    from vqa_scratch.systems.run_folder import WEIGHTS

    opened: Any = open_run(run)
    save_quantized(opened, folder, name, calibrate=calibrate)
    before, now = ((where / WEIGHTS).stat().st_size / 1e6 for where in (run, folder))
    print(f"written to {folder}: {WEIGHTS} has {now:.1f} MB, that of {run} {before:.1f} MB")
    print(f"ask it with: python -m vqa_scratch ask {folder} --precision bf16 --image FILE")


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """{path of every file below the folder: what changes when it is written anew}."""
    states = ((path, path.stat()) for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): (state.st_ino, state.st_mtime_ns) for path, state in states}
