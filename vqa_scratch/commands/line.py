"""What the commands share: a group whose errors name the near miss, and the options that open a run."""

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from vqa_scratch.errors import UserError
from vqa_scratch.options import NearChoice, as_user_error
from vqa_scratch.systems import open_trained
from vqa_scratch.systems.base import Trained
from vqa_scratch.training.precision import pick_device

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


def decoding_flags(command: Callable[..., None]) -> Callable[..., None]:
    """The fields of `GenerationOptions` as flags; one that is not given arrives as None."""
    flags = [
        click.option("--do-sample", is_flag=True, default=None, help="Draw tokens at random instead of the likeliest."),
        click.option("--temperature", type=float, help="Below 1 the likely becomes likelier (sampling)."),
        click.option("--top-k", type=int, help="Draw from so many tokens (sampling)."),
        click.option("--top-p", type=float, help="Draw from the tokens that have this much probability (sampling)."),
        click.option("--seed", type=int, help="Seed of the sampling."),
        click.option("--num-beams", type=int, help="Follow so many beginnings at once and take the best answer."),
        click.option("--length-penalty", type=float, help="Above 1 favours long answers, below 1 short ones (beams)."),
        click.option(
            "--early-stopping/--no-early-stopping", default=None, help="Stop at as many answers as beams (beams)."
        ),
        click.option("--no-repeat-ngram-size", type=int, help="No sequence of so many tokens twice."),
        click.option("--repetition-penalty", type=float, help="Above 1 makes tokens less likely that were there."),
        click.option("--min-new-tokens", type=int, help="Tokens before the answer may end."),
        click.option("--max-new-tokens", type=int, help="Tokens at most. [as trained]"),
    ]
    for flag in reversed(flags):
        command = flag(command)
    return command


def open_run(folder: Path, device: str = "cpu", precision: str = "fp32") -> Trained:
    """`open_trained` for the values of the flags."""
    return open_trained(folder, pick_device(device), precision)
