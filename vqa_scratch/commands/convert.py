"""`convert`: writes the tensors of a .bin file as safetensors."""

from pathlib import Path

import click

from vqa_scratch.command_line import GroupedCommand
from vqa_scratch.commands.line import FOLDER


@click.command("convert", cls=GroupedCommand)
@click.argument("source", type=FOLDER, metavar="FILE.bin")
@click.argument("out", type=FOLDER)
def convert(source: Path, out: Path) -> None:
    """Write the tensors of FILE.bin to OUT, a .safetensors file or a folder; anything but tensors is refused.

    \b
    Example:
      python -m vqa_scratch convert pytorch_model.bin model.safetensors
    """
    from vqa_scratch.weights import files

    tensors, digest = files.convert(source, out)
    print(f"{tensors} tensors written to {out / files.WEIGHTS if out.is_dir() else out}")
    print(f"sha256 of {source}: {digest}")
