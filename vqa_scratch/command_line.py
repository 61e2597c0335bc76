"""Command lines from options: every option is a flag, --help is grouped, and an error is one line.

`parse` reads the flags of a program whose `--preset` picks the options and their values; the user's flags override the
preset. Nothing here imports torch, so that --help and a mistyped flag are answered at once.
"""

import difflib
import gc
import io
import os
import re
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from vqa_scratch.errors import UserError
from vqa_scratch.options import (
    check_dependencies,
    check_more,
    choices_of,
    defaults_of,
    flag,
    rules_of,
    types_of,
    with_values,
)

T = TypeVar("T")


class NearChoice(click.Choice):
    """A choice whose error suggests the nearest allowed value. `renamed` maps old values to new ones."""

    def __init__(self, choices: Iterable[str], renamed: Mapping[str, str] | None = None) -> None:
        super().__init__(choices)
        self.renamed = renamed or {}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in self.renamed and param is not None:
            note_renamed(f"{param.opts[0]} {value}", f"{param.opts[0]} {self.renamed[value]}")
            value = self.renamed[value]
        return super().convert(value, param, ctx)

    def fail(self, message: str, param: click.Parameter | None = None, ctx: click.Context | None = None) -> NoReturn:
        word = message.split("'")[1] if "'" in message else ""
        near = difflib.get_close_matches(word, list(self.choices), 1)
        super().fail(message.rstrip(".") + (f"; did you mean '{near[0]}'?" if near else "."), param, ctx)


def note_renamed(old: str, new: str) -> None:
    print(f"note: {old} is now called {new}", file=sys.stderr)


@dataclass(frozen=True)
class More:
    """The value +N of a flag: so much beyond what a finished run has done."""

    amount: float


class Number(click.ParamType):
    """An int or a float. "+N" is `More` if the option has `more`, else an error: it would be read without its sign."""

    def __init__(self, kind: type, more: bool) -> None:
        self.kind, self.more = click.types.convert_type(kind), more
        self.name = self.kind.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str) or not value.startswith("+"):
            return self.kind.convert(value, param, ctx)
        if not self.more:
            self.fail(f"{value!r} has a plus sign; this option takes the number itself.", param, ctx)
        if value.startswith("++"):
            self.fail(f"{value!r} has two plus signs; one means so much more.", param, ctx)
        return More(self.kind.convert(value[1:], param, ctx))


class Flag(click.Option):
    """A flag that --help shows under the heading `group`, with `shown` or else its default in brackets."""

    def __init__(
        self, names: Sequence[str], *, help: str, group: str = "Options", shown: Any = None, **more: Any
    ) -> None:
        shown = more.get("default") if shown is None else shown
        if shown not in (None, ""):
            help += f"  [{shown}]" if not isinstance(shown, bool) else f"  [{'on' if shown else 'off'}]"
        super().__init__(names, help=help, **more)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose --help shows its flags under their headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                groups.setdefault(getattr(param, "group", "Options"), []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def flags(options_class: type, defaults: Mapping[str, Any] | None = None) -> list[Flag]:
    """A flag for each option, and a hidden one for each old name. A flag that is not given has the value None.

    `defaults` are the values that --help shows; None: those of the class.
    """
    kinds, result = types_of(options_class), []
    defaults = defaults_of(options_class) if defaults is None else defaults
    for name, rules in rules_of(options_class).items():
        kind: Any = next(kind for kind in kinds[name] if kind is not type(None))
        if rules.choices:
            kind = NearChoice(rules.choices, rules.renamed)
        elif kind is Path:
            kind = click.Path(path_type=Path)
        elif kind in (int, float):
            kind = Number(kind, rules.more)
        needed = [with_values(other, values) for other, values in rules.only.items()]
        needed += [with_values(other, values, but=True) for other, values in rules.never.items()]
        text = f"{rules.help}  ({' and '.join(needed)})" if needed else rules.help
        for spelled, hidden in ((name, False), (rules.was, True)):
            if spelled is None:
                continue
            more = {"help": text, "group": rules.group, "shown": defaults[name], "hidden": hidden, "default": None}
            if bool in kinds[name]:
                result.append(Flag([f"{flag(spelled)}/{flag('no_' + spelled)}", spelled], **more))
            else:
                result.append(Flag([flag(spelled), spelled], type=kind, **more))
    return result


def flag_names(options_class: type) -> list[str]:
    """Every flag of an options class, negated and old ones included."""
    return [name for option in flags(options_class) for name in (*option.opts, *option.secondary_opts)]


def with_new_names(options_class: type, given: dict[str, Any]) -> dict[str, Any]:
    """`given` with every old name replaced, and a note on stderr for each."""
    for name, rules in rules_of(options_class).items():
        if rules.was in given:
            if name in given:
                raise UserError(f"{flag(rules.was)} is now called {flag(name)}: give one of the two")
            note_renamed(flag(rules.was), flag(name))
            given[name] = given.pop(rules.was)
    return given


def as_user_error(error: click.ClickException, elsewhere: Mapping[str, str] | None = None) -> UserError:
    """A click error in one line, which suggests the nearest flag for an unknown one.

    `elsewhere` maps flags that exist only under another choice to that choice.
    """
    if not isinstance(error, click.NoSuchOption):
        return UserError(error.format_message())
    if elsewhere is not None and error.option_name in elsewhere:
        return UserError(f"{error.option_name} means nothing here: it is a flag of {elsewhere[error.option_name]}")
    near = difflib.get_close_matches(error.option_name, error.possibilities or (), 1)
    return UserError(f"no such flag: {error.option_name}" + (f"; did you mean {near[0]}?" if near else ""))


def check_arguments(argv: Sequence[str]) -> None:
    """Raise UserError for what no shell can pass, but a caller of the library can."""
    for argument in argv:
        if "\0" in argument:
            raise UserError(f"the argument {argument!r} holds a NUL, which neither a name nor a text may have")


def value_in(argv: Sequence[str], option: click.Option) -> Any:
    """The value of one flag, before the others are known. Raises UserError on a wrong one."""
    rest = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": True}
    command = click.Command("one", params=[option], add_help_option=False, context_settings=rest)
    try:
        (value,) = command.make_context("one", list(argv)).params.values()
    except click.ClickException as error:
        raise as_user_error(error) from None
    return value


def with_config(argv: Sequence[str]) -> list[str]:
    """The command line with the flags of its `--config FILE` in front, so that those given directly win.

    The file is TOML, a line an option: `learning_rate = 1e-3`, `compile = true`. Raises UserError if it cannot be read.
    """
    path = value_in(argv, click.Option(["--config", "path"], type=click.Path(path_type=Path)))
    if path is None:
        return list(argv)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # tomllib's, and text that is not UTF-8
        raise UserError(f"--config {path} is not TOML: {error}") from None
    given: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            given.append(flag(name if value else f"no_{name}"))
        elif isinstance(value, str | int | float):
            given += [flag(name), str(value)]
        else:
            raise UserError(f"--config {path}: {name} is a {type(value).__name__}; an option is a text, number or bool")
    return given + list(argv)


def parse(
    classes: Sequence[type[T]],
    presets: Mapping[str, Mapping[str, Any]],
    argv: Sequence[str],
    *,
    program: str,
    about: str,
    example: str,
) -> T:
    """The options that the flags in `argv` set. `--help` prints the flags and exits.

    The preset picks the one of the `classes` that has it among its choices of `preset` (by default the first choice of
    the first class), and `presets` holds the values it sets. Raises UserError on an unknown flag or value, naming the
    nearest or where the flag belongs, on a flag without meaning beside the others, and on a value out of bounds.
    """
    argv = with_config(argv)
    check_arguments(argv)
    class_of = {name: options_class for options_class in classes for name in choices_of(options_class, "preset")}
    preset = value_in(argv, click.Option(["--preset"], type=NearChoice(class_of), default=next(iter(class_of))))
    options_class, values = class_of[preset], {"preset": preset} | dict(presets[preset])
    others = ", ".join(name for name in class_of if name != preset)
    config = Flag(
        ["--config"], type=click.Path(), expose_value=False, group="Run", help="TOML file of options; flags win."
    )
    command = GroupedCommand(
        program,
        params=[*flags(options_class, defaults_of(options_class) | values), config],
        callback=lambda **given: given,
        help=f"{about}\n\n\b\nExample:\n  {example}\n\nIn brackets: the defaults of preset {preset}. "
        f"Other presets, with defaults of their own (--preset NAME --help): {others}.",
        context_settings={"max_content_width": 100},
    )
    elsewhere = {
        name: f"--preset {choices_of(other, 'preset')[0]}"
        for other in reversed(classes)  # of several that have it, the first
        if other is not options_class
        for name in flag_names(other)
    }
    try:
        given = command.main(list(argv), prog_name=f"python {program}", standalone_mode=False)
    except click.ClickException as error:
        raise as_user_error(error, elsewhere) from None
    if isinstance(given, int):  # --help
        sys.exit(given)
    given = with_new_names(options_class, {name: value for name, value in given.items() if value is not None})
    more = {name: value.amount for name, value in given.items() if isinstance(value, More)}
    given = {name: value for name, value in given.items() if name not in more}
    check_more(options_class, more, given)
    # A resumed run keeps the options it was started with; those not repeated here are not known yet.
    unknown = set(rules_of(options_class)) - set(given) - {"preset"} if given.get("resume") else ()
    check_dependencies(options_class, defaults_of(options_class) | values | given, given, unknown)
    options = options_class(**values | given)  # a class's own rules are about options that mean something
    for name, known in (("given", given), ("more", more)):
        object.__setattr__(options, name, known)  # no fields: they are not part of a run
    return options


@contextmanager
def first_rank_speaks() -> Iterator[None]:
    """Under torchrun every process reads the command line, but only rank 0 prints its errors."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            yield
        except UserError:
            sys.exit(2)


def count_seconds(program: str) -> None:
    """Show on a terminal how long the program has been running, each second in which no bar does, until it ends.

    Importing torch and reading data take a while. Only rank 0 does so, and nobody with TQDM_DISABLE.
    """
    began = time.monotonic()

    def count() -> None:
        while True:
            time.sleep(1)
            bars = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
            if not getattr(bars, "_instances", ()):
                with suppress(OSError):  # not through sys.stderr, whose lock the end of the program may need
                    os.write(2, f"{program}: {time.monotonic() - began:.0f} s\r".encode())

    seen = sys.stderr is not None and sys.stderr.isatty()
    if seen and os.environ.get("RANK", "0") == "0" and "TQDM_DISABLE" not in os.environ:
        threading.Thread(target=count, daemon=True).start()


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Exit with 2 and one line on stderr after a UserError, an operating-system error on a file, or for want of memory;
    with 130 after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may hold bytes that are no text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno is None or error.filename is None:
            raise
        print(f"error: {UserError(f'{error.filename}: {error.strerror}')}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        wanted = re.search(r"[Tt]ried to allocate ([\d.,]+ \w+)", str(error))
        what = f" ({wanted[1]} at once)" if wanted else ""
        print(f"error: not enough memory{what}: make the batch, the model or the image smaller", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def collect_seldom() -> None:
    gc.set_threshold(700, 10, 1000)  # half a million objects of torch stay, and each look goes through them


def read_first(read: Callable[[Sequence[str]], T]) -> T:
    """`read(argv)`, the options of a program that imports torch after it; errors as in `errors_in_one_line`."""
    collect_seldom()
    with errors_in_one_line():
        return read(sys.argv[1:])


def run_program(main: Callable[..., Any], *args: Any) -> NoReturn:
    """Call `main(*args)`; exit with 0, 128 + n if it returns a signal n, or after an error as `errors_in_one_line`."""
    collect_seldom()
    with errors_in_one_line():
        stopped = main(*args)
    if "triton" not in sys.modules:  # it complains of every object that nobody collected
        gc.freeze()  # nor at the end, where it takes half a second
    sys.exit(128 + stopped if isinstance(stopped, int) else 0)
