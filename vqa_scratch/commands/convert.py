"""`convert`: writes the tensors of a .bin file as safetensors, and a Whisper in the layout of `transformers`."""

from pathlib import Path

import click

from vqa_scratch.command_line import GroupedCommand
from vqa_scratch.commands.line import FOLDER, check_no_run
from vqa_scratch.errors import UserError


@click.command("convert", cls=GroupedCommand)
@click.argument("source", type=FOLDER, metavar="FILE.bin|DIR")
@click.argument("out", type=FOLDER)
def convert(source: Path, out: Path) -> None:
    """Write the tensors of FILE.bin to OUT, a .safetensors file or a folder; anything but tensors is refused.

    A folder DIR holds a Whisper, as OpenAI's .pt or CTranslate2's model.bin, and its tokenizer: OUT becomes a folder
    that `transformers` loads.

    \b
    Examples:
      python -m vqa_scratch convert pytorch_model.bin model.safetensors
      python -m vqa_scratch convert whisper-ct2/ whisper/
    """
    if source.is_dir():
        _whisper(source, out)
        return
    from vqa_scratch.weights import files

    tensors, digest = files.convert(source, out)
    print(f"{tensors} tensors written to {out / files.WEIGHTS if out.is_dir() else out}")
    print(f"sha256 of {source}: {digest}")


def _whisper(source: Path, out: Path) -> None:
    import torch

    from vqa_scratch.storage import check_writable
    from vqa_scratch.transcription import open_transcriber

    check_writable(out)
    check_no_run(out, "OUT")
    if out.resolve() == source.resolve():
        raise UserError(f"OUT must be another folder than DIR, whose files would be lost; not {out}")
    open_transcriber(str(source), torch.device("cpu")).save(out)
    print(f"written to {out}")
