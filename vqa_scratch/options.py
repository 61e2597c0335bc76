"""Command lines from frozen dataclasses: every field is a flag, and bad input is one line.

`option` gives a field its help sentence; `parse` reads the flags with click. A preset is a dictionary of fields that
differ from the defaults; flags given by the user win over the preset.
"""

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from vqa_scratch.errors import UserError

Config = TypeVar("Config")


def option(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field with the sentence that --help shows and, for words, the ones allowed."""
    return field(default=default, metadata={"help": help, "choices": tuple(choices) if choices else None})


class NearChoice(click.Choice):
    """A choice whose error names the nearest allowed word."""

    def fail(self, message: str, param: click.Parameter | None = None, ctx: click.Context | None = None) -> NoReturn:
        word = message.split("'")[1] if "'" in message else ""
        near = difflib.get_close_matches(word, list(self.choices), 1)
        super().fail(message.rstrip(".") + (f"; did you mean '{near[0]}'?" if near else "."), param, ctx)


def _click_type(annotation: Any, choices: tuple[str, ...] | None) -> Any:
    """(int | None) -> int, Path -> path, a word with choices -> those."""
    if choices:
        return NearChoice(choices)
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    return click.Path(path_type=Path) if annotation is Path else annotation


def flags(config_type: type, defaults: Mapping[str, Any]) -> list[click.Option]:
    """One click option a field. Values not given come out as None, so that a preset can fill them."""
    hints = typing.get_type_hints(config_type)
    result = []
    for item in dataclasses.fields(config_type):
        value, name = defaults[item.name], item.name.replace("_", "-")
        shown = item.metadata["help"] + (f"  [{value}]" if value not in (None, "") else "")
        if hints[item.name] is bool:
            result.append(click.Option([f"--{name}/--no-{name}", item.name], default=None, help=shown))
        else:
            kind = _click_type(hints[item.name], item.metadata["choices"])
            result.append(click.Option([f"--{name}", item.name], type=kind, default=None, help=shown))
    return result


def flag_names(config_type: type) -> list[str]:
    """Every flag of a config, negated ones included."""
    hints = typing.get_type_hints(config_type)
    names = [(f.name.replace("_", "-"), hints[f.name] is bool) for f in dataclasses.fields(config_type)]
    return [f"--{prefix}{name}" for name, is_bool in names for prefix in (("", "no-") if is_bool else ("",))]


def as_user_error(error: click.ClickException, elsewhere: Mapping[str, str] | None = None) -> UserError:
    """What is wrong with a command line, in one line that names the nearest flag for one that there is not.

    `elsewhere` says which flags exist under another choice, and which choice that is.
    """
    if not isinstance(error, click.NoSuchOption):
        return UserError(error.format_message())
    if error.option_name in (elsewhere or {}):
        return UserError(f"{error.option_name} means nothing here: it is a flag of {elsewhere[error.option_name]}")
    near = difflib.get_close_matches(error.option_name, error.possibilities or (), 1)
    return UserError(f"no such flag: {error.option_name}" + (f"; did you mean {near[0]}?" if near else ""))


def peek(argv: Sequence[str], flag: str, choices: Sequence[str]) -> str:
    """The value of one flag, before it is known which others there are; the first choice if it is not given.

    Raises UserError on a value that is not among the choices, naming the nearest.
    """
    option = click.Option([flag, "found"], type=NearChoice(choices), default=choices[0])
    rest = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": True}
    command = click.Command("peek", params=[option], add_help_option=False, context_settings=rest)
    try:
        return command.make_context("peek", list(argv)).params["found"]
    except click.ClickException as error:
        raise as_user_error(error) from None


def parse(
    config_type: type[Config],
    presets: Mapping[str, Mapping[str, Any]],
    argv: Sequence[str],
    *,
    program: str,
    about: str,
    elsewhere: Mapping[str, str] | None = None,
    unread: Callable[[Config], Mapping[str, str]] = lambda config: {},
) -> Config:
    """The config that the flags in `argv` ask for. `--help` prints the flags and exits.

    `unread` says which fields of a config nothing reads, and with what. Raises UserError on an unknown flag or value,
    naming the nearest known one (or, of a flag in `elsewhere`, where it belongs), on a flag that nothing reads, and on
    what the config itself refuses.
    """
    first = next(iter(presets))
    defaults = {f.name: f.default for f in dataclasses.fields(config_type)} | dict(presets[first])
    command = click.Command(
        program, params=flags(config_type, defaults), callback=lambda **given: given, help=about, add_help_option=True
    )
    try:
        given = command.main(list(argv), prog_name=program, standalone_mode=False)
    except click.ClickException as error:
        raise as_user_error(error, elsewhere) from None
    if isinstance(given, int):  # --help
        sys.exit(given)
    given = {name: value for name, value in given.items() if value is not None}
    preset = given.get("preset", first)
    config = config_type(**{"preset": preset} | dict(presets[preset]) | given)
    ignored = {name: why for name, why in unread(config).items() if name in given}
    for why in ignored.values():
        names = [f"--{name.replace('_', '-')}" for name, its in ignored.items() if its == why]
        raise UserError(f"{', '.join(names)} {'means' if len(names) == 1 else 'mean'} nothing with {why}")
    return config


def run_program(main: Callable[[], Any]) -> NoReturn:
    """Call `main` and exit: with 0, with 128 + n if it returns the signal n that stopped it, with 2 and one line on
    stderr after a UserError or an operating-system error on a file, with 130 after Ctrl-C where nothing catches it."""
    try:
        stopped = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno is None or error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(128 + stopped if isinstance(stopped, int) else 0)


def to_json(config: Any) -> dict[str, Any]:
    """The fields of a config as JSON values."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}


def from_json(config_type: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """The inverse of `to_json`. Raises UserError, naming `where`, on a field that this version does not know."""
    hints = typing.get_type_hints(config_type)
    known = {f.name for f in dataclasses.fields(config_type)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UserError(f"{where} has unknown fields {', '.join(unknown)}; was it written by another version?")
    is_path = {name for name, hint in hints.items() if hint is Path or Path in typing.get_args(hint)}
    return config_type(**{k: Path(v) if k in is_path and v is not None else v for k, v in values.items()})
