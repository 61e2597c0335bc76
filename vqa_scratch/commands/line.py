"""What the commands share: a group whose errors name the near miss, and the options that open a run."""

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from vqa_scratch.engine.precision import pick_device
from vqa_scratch.errors import UserError
from vqa_scratch.options import NearChoice, as_user_error
from vqa_scratch.systems import open_trained
from vqa_scratch.systems.base import Trained

FOLDER = click.Path(path_type=Path)


class NearGroup(click.Group):
    """A group of commands that answers an unknown name with the nearest known one."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.commands, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(self.commands))}"
            raise UserError(f"no such command: {name}; {hint}")
        return super().resolve_command(ctx, args)


def call(group: click.Group, argv: Sequence[str], program: str) -> None:
    """Run the command that `argv` names. Raises UserError on an unknown command, flag or value."""
    try:
        group.main(list(argv), prog_name=program, standalone_mode=False)
    except click.ClickException as error:
        raise as_user_error(error) from None
    except click.Abort:
        raise KeyboardInterrupt from None


def where_to_compute(command: Callable[..., None]) -> Callable[..., None]:
    """The flags --device and --precision of a command that opens a run."""
    kinds = NearChoice(("auto", "fp32", "bf16", "fp16"))
    devices = NearChoice(("auto", "cpu", "cuda", "mps"))
    command = click.option("--precision", type=kinds, default="fp32", show_default=True, help="Arithmetic.")(command)
    return click.option("--device", type=devices, default="auto", show_default=True, help="Where to compute.")(command)


def open_run(folder: Path, device: str = "cpu", precision: str = "fp32") -> Trained:
    """`open_trained` for the values of the flags."""
    return open_trained(folder, pick_device(device), precision)
