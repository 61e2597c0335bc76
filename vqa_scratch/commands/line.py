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
MODEL = Flag(
    ["--model"], help="Instead of RUN: a released BLIP-2, LLaVA, Fuyu, Idefics or language model, a folder or Hub id."
)
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
    from vqa_scratch.training.precision import pick_device

    return systems.load_latest(of_train(folder), pick_device(device), precision)


def open_ears(source: str, device: str = "cpu", precision: str = "fp32") -> "Transcriber":
    """What listens: the run of `train.py --preset voice` in a folder, or a Whisper: a folder, .pt file or Hub id."""
    from vqa_scratch.study.opened import config_of
    from vqa_scratch.training.precision import pick_device
    from vqa_scratch.transcription import open_transcriber

    if "program" in config_of(Path(source)):
        return open_run(Path(source), device, precision).transcriber()
    return open_transcriber(source, pick_device(device), precision)


def of_train(folder: Path) -> Path:
    """The folder of a run of train.py: the given one, or its policy/ if rlhf.py tuned one there.

    Raises UserError for the folder of anything else that has a config.json.
    """
    from vqa_scratch.study.opened import POLICY, config_of

    if "program" in config_of(folder / POLICY):
        return folder / POLICY
    if (folder / "config.json").is_file() and "program" not in config_of(folder):
        raise UserError(
            f"{folder} has no model to study or to ask: neither model.safetensors of train.py nor {POLICY}/ of rlhf.py"
        )
    return folder


def check_image(run: Path | None, model: str | None, given: bool) -> None:
    """Raise UserError, before weights are read, for an image that a model does not take, or the lack of one that it
    needs."""
    from vqa_scratch.language_model import place_of

    if (run is None) == (model is None) or (run is not None and not run.is_dir()):
        return  # which `open_asked` says
    if given == (place_of(run or str(model)) is not None):
        how = "reads texts alone: leave out --image" if given else "looks at images: give it --image FILE"
        raise UserError(f"{run or model} {how}")


def open_asked(run: Path | None, model: str | None, device: str, precision: str, quantize: str | None = None) -> Any:
    """A run of train.py or rlhf.py, or a released model, maybe with its decoder's weights in a format.

    Raises UserError unless one of the two is given, and for a format without bf16 on a CPU.
    """
    if (run is None) == (model is None):
        raise UserError("give RUN, the folder of a trained system, or --model, a released checkpoint: one of the two")
    from vqa_scratch.nn import quantized
    from vqa_scratch.training.precision import pick_device

    if quantize is not None and (precision != "bf16" or pick_device(device).type != "cpu"):
        raise UserError(f"--quantize {quantize}: {quantized.BF16_ONLY}")
    from vqa_scratch.language_model import open_language_model
    from vqa_scratch.zero_shot import open_zero_shot

    place = pick_device(device)
    opened: Any = open_language_model(run or str(model), place, precision)
    if opened is None and run is not None:
        opened = open_run(of_train(run), device, precision)
    elif opened is None:
        opened = open_zero_shot(str(model), place, precision)
    if quantize is not None:
        quantized.quantize(opened.model, quantized.FORMATS[quantize])
    return opened
