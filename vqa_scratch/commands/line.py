"""What the commands share: a group that imports a command when it is used, and the flags that open a run."""

import difflib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vqa_scratch.command_line import Flag, NearChoice, as_user_error, check_arguments
from vqa_scratch.errors import UserError
from vqa_scratch.storage import check_writable, read_json

if TYPE_CHECKING:
    from vqa_scratch.systems.base import System
    from vqa_scratch.transcription import Transcriber

FOLDER = click.Path(path_type=Path)
DEVICES, PRECISIONS = NearChoice(("auto", "cpu", "cuda", "mps")), NearChoice(("auto", "fp32", "bf16", "fp16"))
PRODUCT_FORMATS = NearChoice(("int8", "int4", "int4-g64", "int4-g128", "int4-g256"))  # of nn/quantized.py
FILE_FORMATS = NearChoice((*PRODUCT_FORMATS.choices, "nf4"))
DEVICE = Flag(["--device"], type=DEVICES, default="auto", help="Where to compute.", group="Computing")
MODEL = Flag(["--model"], help="Instead of RUN: a released BLIP-2, LLaVA, Fuyu or Idefics, a folder or Hub id.")
PRECISION = Flag(["--precision"], type=PRECISIONS, default="fp32", help="Arithmetic.", group="Computing")


class NearGroup(click.Group):
    """A group of commands whose error on an unknown name suggests the nearest known one."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name, names = args[0], self.list_commands(ctx)
        if name not in names and not name.startswith("-"):
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(names))}"
            raise UserError(f"no such command: {name}; {hint}")
        return super().resolve_command(ctx, args)


class CommandGroup(NearGroup):
    """A group of commands, each in a module of its own name, which is imported when the command is used."""

    def __init__(self, name: str, names: Sequence[str], **more: Any) -> None:
        super().__init__(name, **more)
        self.names = names

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.names)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        known = name in self.names
        return getattr(importlib.import_module(f"vqa_scratch.commands.{name}"), name) if known else None


def call(group: click.Group, argv: Sequence[str], program: str) -> None:
    """Run the command that `argv` names. Raises UserError on an unknown command, flag or value."""
    check_arguments(argv)
    try:
        group.main(list(argv), prog_name=program, standalone_mode=False)
    except click.ClickException as error:
        raise as_user_error(error) from None
    except click.Abort:
        raise KeyboardInterrupt from None


def check_page(out: Path) -> None:
    """Raise UserError if no page can be written to this file, or if it is something that would be lost."""
    check_writable(out.parent)
    if out.is_dir() or (out.exists() and out.suffix.lower() not in (".html", ".htm")):
        what = "a folder" if out.is_dir() else "another file, which would be lost"
        raise UserError(f"--out {out} is {what}; give a new file")


def check_no_run(folder: Path, flag: str) -> None:
    """Raise UserError if files written into this folder could take the place of a run's."""
    path = folder / "config.json"
    values = read_json(path) if path.is_file() else {}
    if isinstance(values, dict) and "program" in values:
        raise UserError(f"{flag} {folder} is the folder of a run, whose files would be lost; give another folder")


def open_run(folder: Path, device: str = "cpu", precision: str = "fp32") -> "System":
    """`systems.load` with the values of the flags."""
    from vqa_scratch import systems
    from vqa_scratch.training.precision import pick_device

    return systems.load(folder, pick_device(device), precision)


def open_latest(folder: Path, device: str = "cpu", precision: str = "fp32") -> "tuple[System, int | None]":
    """`systems.load_latest` with the values of the flags; of a run that was tuned by feedback its policy."""
    from vqa_scratch import systems
    from vqa_scratch.commands.study_files import run_folder
    from vqa_scratch.training.precision import pick_device

    return systems.load_latest(run_folder(folder), pick_device(device), precision)


def open_ears(source: str, device: str = "cpu", precision: str = "fp32") -> "Transcriber":
    """What listens: the run of `train.py --preset voice` in a folder, or a Whisper: a folder, .pt file or Hub id."""
    from vqa_scratch.training.precision import pick_device
    from vqa_scratch.transcription import open_transcriber

    config = Path(source) / "config.json"
    values = read_json(config) if config.is_file() else {}
    if isinstance(values, dict) and "program" in values:
        return open_run(Path(source), device, precision).transcriber()
    return open_transcriber(source, pick_device(device), precision)


def open_asked(run: Path | None, model: str | None, device: str, precision: str, quantize: str | None = None) -> Any:
    """A run, or a released model: what can be asked about an image, maybe with its decoder's weights in a format.

    Raises UserError unless one of the two is given, and for a format without bf16 on a CPU.
    """
    if (run is None) == (model is None):
        raise UserError("give RUN, the folder of a trained system, or --model, a released checkpoint: one of the two")
    from vqa_scratch.nn import quantized
    from vqa_scratch.training.precision import pick_device

    if quantize is not None and (precision != "bf16" or pick_device(device).type != "cpu"):
        raise UserError(f"--quantize {quantize}: {quantized.BF16_ONLY}")
    if model is None:
        assert run is not None
        opened: Any = open_run(run, device, precision)
    else:
        from vqa_scratch.zero_shot import open_zero_shot

        opened = open_zero_shot(model, pick_device(device), precision)
    if quantize is not None:
        quantized.quantize(opened.model, quantized.FORMATS[quantize])
    return opened
