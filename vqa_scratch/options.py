"""Options as data: frozen dataclasses whose fields carry their help text and their rules.

`option` makes such a field, `Options` checks the rules when an object is made, `to_json` and `from_json` write and read
it, and `command_line.py` turns every field into a flag: `eval_every` is `--eval-every`, a bool is `--x/--no-x`, and
None means "not given". A rule about several options is code in `__post_init__` of their class.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from vqa_scratch.errors import UserError, naming
from vqa_scratch.storage import is_text

T = TypeVar("T")
LARGEST = 2**53  # of any number that an option may be; further ones are not exact as floats


@dataclass(frozen=True)
class Rules:
    """What is known of an option besides its name, type and default.

    help, group: the sentence that --help shows, and the heading above it.
    choices: the allowed values.
    minimum, above, maximum, below: bounds of a number; `minimum` and `maximum` are allowed values themselves. Numbers
        must be finite, unless `maximum` is math.inf.
    only: the option has a meaning only while other options have these values: {"init": ("pretrained",)}.
    never: it has none while another has one of these: {"connector": ("patches",)}.
    was, renamed: the old name of the option, and old names of choices {old: new}; both still work, with a note.
    may_change: a run may be resumed with another value.
    more: a finished run may be resumed with +N, so many beyond what it has done.
    excludes: another option that must not be given beside this one.
    """

    help: str
    group: str
    choices: Collection[str] = ()
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    never: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    was: str | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    may_change: bool = False
    more: bool = False
    excludes: str | None = None

    @property
    def range(self) -> str:
        """The bounds in words: "above 0 and at most 1"; "" if there are none."""
        bounds = {"at least": self.minimum, "above": self.above, "at most": self.maximum, "below": self.below}
        return " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound not in (None, math.inf))

    def allow(self, value: float) -> bool:
        """Whether a number is within the bounds."""
        low = (self.minimum is None or value >= self.minimum) and (self.above is None or value > self.above)
        return low and (self.maximum is None or value <= self.maximum) and (self.below is None or value < self.below)


def option(
    default: Any,
    help: str,
    group: str,
    choices: Collection[str] = (),
    only: Mapping[str, Any] | None = None,
    never: Mapping[str, Any] | None = None,
    **rules: Any,
) -> Any:
    """A dataclass field with these `Rules`; `only` and `never` may have a single value in place of a tuple."""

    def tuples(values: Mapping[str, Any] | None) -> dict[str, tuple[Any, ...]]:
        return {name: some if isinstance(some, tuple) else (some,) for name, some in (values or {}).items()}

    made = Rules(help, group, choices, only=tuples(only), never=tuples(never), **rules)
    return field(default=default, metadata={"rules": made})


def threads_option(group: str) -> Any:
    """--threads, of both programs; `training/threads.py` does without it what it says."""
    return option(
        None,
        "Threads of a CPU; without it as many as are fastest beside what else runs, so that sums may round otherwise.",
        group,
        minimum=1,
        maximum=1024,
        may_change=True,
    )


@dataclass(frozen=True)
class Options:
    """Options whose rules hold. A subclass with rules of its own calls `super().__post_init__()` first.

    `given` has the values that a command line set, by name; None of options that no command line made. `more` has what
    it adds to a finished run: {"steps": 100} for --steps +100.
    """

    given = None
    more: ClassVar[Mapping[str, float]] = MappingProxyType({})

    def __post_init__(self) -> None:
        check(self)


def rules_of(options_class: Any) -> dict[str, Rules]:
    """The rules of each option, by name; fields that `option` did not make are not options."""
    fields = dataclasses.fields(options_class)
    return {item.name: item.metadata["rules"] for item in fields if "rules" in item.metadata}


def defaults_of(options_class: type) -> dict[str, Any]:
    """The default of each option, None where a value is required."""
    fields, names = dataclasses.fields(options_class), rules_of(options_class)
    return {item.name: None if item.default is MISSING else item.default for item in fields if item.name in names}


def choices_of(options_class: type, name: str) -> tuple[str, ...]:
    """The allowed values of an option."""
    return tuple(rules_of(options_class)[name].choices)


def changeable(options_class: type) -> frozenset[str]:
    """The options that may have another value when a run is resumed."""
    return frozenset(name for name, rules in rules_of(options_class).items() if rules.may_change)


def types_of(options_class: type) -> dict[str, tuple[Any, ...]]:
    """The types of each field: (int, NoneType) for `int | None`."""
    hints = typing.get_type_hints(options_class).items()
    return {name: typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,) for name, hint in hints}


def flag(name: str) -> str:
    """The flag of an option."""
    return "--" + name.replace("_", "-")


def one_of(words: Iterable[Any]) -> str:
    """ "a", "a or b", "a, b or c"."""
    *most, last = map(str, words)
    return f"{', '.join(most)} or {last}" if most else last


def check(options: Any, shown: Callable[[str], str] = flag) -> None:
    """Raise UserError if a value breaks a rule; `shown` spells the name of an option for the message."""
    kinds = types_of(type(options))
    for name, rules in rules_of(options).items():
        value = getattr(options, name)
        if value is None and type(None) in kinds[name]:
            continue
        if value == "" and type(None) in kinds[name]:
            raise UserError(f"{shown(name)} must not be empty; leave it out")
        if rules.excludes and getattr(options, rules.excludes) is not None:
            raise UserError(f"give {shown(name)} or {shown(rules.excludes)}, not both")
        check_value(shown(name), value, rules)


def check_value(name: str, value: Any, rules: Rules) -> None:
    """Raise UserError, which begins with `name`, if a value breaks the rules about itself."""
    if rules.choices and value not in rules.choices:
        raise UserError(f"{name} must be {one_of(rules.choices)}, not {value!r}")
    if isinstance(value, str) and not is_text(value):
        raise UserError(f"{name} must be text in UTF-8, not {value!a}")
    if isinstance(value, float) and not math.isfinite(value) and value != rules.maximum:
        raise UserError(f"{name} must be a finite number, not {value}")
    if rules.range and not rules.allow(value):
        raise UserError(f"{name} must be {rules.range}, not {value}")
    if isinstance(value, int) and abs(value) >= LARGEST:
        raise UserError(f"{name} must be below {LARGEST}, not {value}")


def rivals(options_class: type, name: str) -> list[str]:
    """The options that must not be given beside this one."""
    rules = rules_of(options_class)
    return [other for other in rules if rules[other].excludes == name or rules[name].excludes == other]


def check_more(options_class: type, more: Mapping[str, float], given: Mapping[str, Any]) -> None:
    """Raise UserError if what is added to a run (`Options.more`) cannot be, beside the options that are `given`."""
    for name, amount in more.items():
        if not given.get("resume"):
            raise UserError(f"{flag(name)} +{amount} goes with --resume: it adds to what a finished run has done")
        check_value(f"the N of {flag(name)} +N", amount, rules_of(options_class)[name])
        for other in rivals(options_class, name):
            if other in given or other in more:
                raise UserError(f"give {flag(name)} or {flag(other)}, not both")


def check_dependencies(
    options_class: Any, options: Mapping[str, Any], given: Collection[str], unknown: Collection[str] = ()
) -> None:
    """Raise UserError if one of the `options`, values by name, was given that has no meaning with those of the others.

    `given` are the names of the options to check, `unknown` those whose values are not known yet.
    """
    faults: dict[tuple[str, tuple[Any, ...], bool], list[str]] = {}
    for name, rules in rules_of(options_class).items():
        unmet = [*((other, values, True) for other, values in rules.only.items())]
        unmet += ((other, values, False) for other, values in rules.never.items())
        known = (rule for rule in unmet if name in given and rule[0] not in unknown)
        fault = next((rule for rule in known if (options[rule[0]] in rule[1]) != rule[2]), None)
        if fault is not None:
            faults.setdefault(fault, []).append(flag(name))
    for (other, values, must), names in faults.items():
        mean, go = ("means", "it goes") if len(names) == 1 else ("mean", "they go")
        now = with_values(other, (options[other],))
        instead = f": {go} {with_values(other, values)}" if must else ""
        raise UserError(f"{', '.join(names)} {mean} nothing {now}{instead}")


def with_values(name: str, values: Sequence[Any], but: bool = False) -> str:
    """ "with --init random", "without --model" (None), "with --do-sample" (True); `but` these: "not with ..."."""
    if len(values) == 1 and (values[0] is None or isinstance(values[0], bool)):
        return f"{'with' if bool(values[0]) != but else 'without'} {flag(name)}"
    return f"{'not ' if but else ''}with {flag(name)} {one_of(values)}"


def to_json(options: Any) -> dict[str, Any]:
    """The fields of an options object as JSON values."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(options).items()}


def from_json(options_class: type[T], values: Mapping[str, Any], where: str) -> T:
    """The inverse of `to_json`; also reads the names and values of older versions, which wrote "" for None.

    Raises UserError, naming `where`, on a field that this version does not know.
    """
    kinds, rules = types_of(options_class), rules_of(options_class)
    new_names = {rule.was: name for name, rule in rules.items() if rule.was}
    unknown = sorted(set(values) - set(kinds) - set(new_names))
    if unknown:
        raise UserError(f"{where} has unknown fields {', '.join(unknown)}; was it written by another version?")

    def read() -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            name = key if key in kinds else new_names[key]
            if isinstance(value, str) and name in rules:
                value = rules[name].renamed.get(value, value)
            if value == "" and type(None) in kinds[name]:
                value = None
            yield name, of_type(value, kinds[name], f"{where}: {name!r}")

    with naming(where):
        return options_class(**dict(read()))


def of_type(value: Any, kinds: Collection[Any], name: str) -> Any:
    """A JSON value as one of `kinds`, the types of a field. Raises UserError, which begins with `name`."""
    if value is None and type(None) in kinds:
        return None
    if Path in kinds and isinstance(value, str):
        if "\0" in value:
            raise UserError(f"{name} is {value!r}: a path has no NUL in it")
        return Path(value)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST:
        return float(value)
    usual = not isinstance(value, int) or abs(value) < LARGEST
    if isinstance(value, bool) and bool not in kinds or not isinstance(value, tuple(kinds)) or not usual:
        words = one_of([kind.__name__ for kind in kinds if kind is not type(None)])
        raise UserError(f"{name} is {value!r}, not of type {words}")
    return value
