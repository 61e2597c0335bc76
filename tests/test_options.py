"""The dialect of options itself; tests/test_program_options.py has what the programs make of it."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from vqa_scratch import command_line
from vqa_scratch.command_line import parse, run_program
from vqa_scratch.errors import UserError
from vqa_scratch.options import (
    Options,
    changeable,
    check_dependencies,
    from_json,
    option,
    to_json,
)
from vqa_scratch.rl import options as rl
from vqa_scratch.systems import options as systems


@dataclass(frozen=True)
class Toaster(Options):
    preset: str = option("home", "Which one.", "Run", ("home", "works"))
    out: Path = option(Path("toast"), "Where to.", "Run", may_change=True)
    resume: bool = option(False, "Go on.", "Run", may_change=True)
    slices: int = option(2, "Slices at once.", "Bread", minimum=1, maximum=4)
    share: float = option(0.5, "Share that is toasted.", "Bread", above=0, below=1)
    heat: float = option(1.0, "How hot.", "Heat", above=0, maximum=math.inf)
    colour: str = option(
        "brown", "What it turns into.", "Heat", ("brown", "black"), was="color", renamed={"noir": "black"}
    )
    butter: str | None = option(None, "Kind of butter; without it, none.", "Bread")
    salted: bool = option(False, "Whether the butter is.", "Bread", was="salt")
    depth: int = option(3, "How deep the black goes.", "Heat", only={"preset": "works", "colour": "black"})
    jam: str | None = option(None, "Jam instead of butter.", "Bread", only={"butter": None})
    knife: str | None = option(None, "A knife.", "Bread", only={"preset": ("works", "home"), "salted": True})
    spread: int = option(1, "How thick.", "Bread", never={"butter": None, "salted": True, "colour": "black"})


@dataclass(frozen=True)
class Kettle(Options):
    preset: str = option("tea", "Which one.", "Run", ("tea",))
    litres: float = option(1.0, "How much water.", "Water", above=0, was="liters")


PRESETS = {"home": {"heat": 2.0}, "works": {"out": Path("many"), "butter": "plain"}, "tea": {}}


def parsed(line: str) -> Options:
    words = {"program": "toast.py", "about": "Makes toast.", "example": "python toast.py --slices 3"}
    return parse([Toaster, Kettle], PRESETS, line.split(), **words)


# ------------------------------------------------------------------------------------------------ values


def test_flags_win_over_the_preset_and_the_preset_over_defaults():
    made = parsed("--preset works --slices 3 --salted --out else")
    assert made == Toaster(preset="works", slices=3, salted=True, out=Path("else"), butter="plain")
    assert parsed("") == Toaster(heat=2.0) and parsed("--heat inf").heat == math.inf
    assert parsed("--preset tea --litres 2") == Kettle(litres=2.0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--slices 0", "--slices must be at least 1 and at most 4, not 0"),
        ("--slices 5", "--slices must be at least 1 and at most 4, not 5"),
        ("--share 0", "--share must be above 0 and below 1, not 0.0"),
        ("--share 1", "--share must be above 0 and below 1, not 1.0"),
        ("--share nan", "--share must be a finite number, not nan"),
        ("--share inf", "--share must be a finite number, not inf"),
        ("--heat 0", "--heat must be above 0, not 0.0"),
        ("--heat -inf", "--heat must be a finite number, not -inf"),
        ("--slices two", "'two' is not a valid integer"),
        ("--colour blak", "'blak' is not one of 'brown', 'black'; did you mean 'black'?"),
        ("--slics 3", "no such flag: --slics; did you mean --slices?"),
        ("--frobnicate", "no such flag: --frobnicate$"),
        ("--preset hom", "did you mean 'home'?"),
        ("--litres 2", "^--litres means nothing here: it is a flag of --preset tea$"),
        ("--liters 2", "^--liters means nothing here: it is a flag of --preset tea$"),
        ("--preset tea --no-salted", "^--no-salted means nothing here: it is a flag of --preset home$"),
        ("--depth 3", "^--depth means nothing with --preset home: it goes with --preset works$"),
        ("--preset works --depth 3", "^--depth means nothing with --colour brown: it goes with --colour black$"),
        ("--preset works --jam plum", "^--jam means nothing with --butter plain: it goes without --butter$"),
        ("--knife x", "^--knife means nothing without --salted: it goes with --salted$"),
        ("--color black --colour brown", "--color is now called --colour: give one of the two"),
    ],
)
def test_what_cannot_be_is_one_line(line, message):
    with pytest.raises(UserError, match=message) as caught:
        parsed(line)
    assert "\n" not in str(caught.value)


def test_empty_is_not_absent():
    with pytest.raises(UserError, match="--butter must not be empty; leave it out"):
        parse([Toaster], PRESETS, ["--butter", ""], program="", about="", example="")


def test_a_rule_holds_however_an_object_is_made():
    with pytest.raises(UserError, match="--slices must be at least 1"):
        Toaster(slices=0)
    with pytest.raises(UserError, match="--colour must be brown or black, not 'blue'"):
        Toaster(colour="blue")


def test_bounds_themselves():
    assert Toaster(slices=1).slices == 1 and Toaster(slices=4).slices == 4
    assert Toaster(share=1e-9).share == 1e-9 and Toaster(share=1 - 1e-9).share < 1


@pytest.mark.parametrize(
    "line",
    [
        "--preset works --colour black --depth 3",
        "--jam plum",
        "--salted --knife x",
        "--preset works --resume --depth 4",  # the colour is that of the run, which is not known yet
        "--no-salted",
    ],
)
def test_a_flag_that_means_something_is_taken(line):
    parsed(line)


def test_dependencies_are_checked_again_when_all_is_known():
    merged = parsed("--preset works --resume --depth 4")
    with pytest.raises(UserError, match="--depth means nothing with --colour brown"):
        check_dependencies(Toaster, vars(merged), ["depth"])
    check_dependencies(Toaster, vars(merged), ["slices"])
    with pytest.raises(UserError, match="--depth means nothing with --preset home"):
        parsed("--resume --depth 4")


def test_what_may_change():
    assert changeable(Toaster) == {"out", "resume"}


# ------------------------------------------------------------------------------------------------ old names


def test_an_old_name_works_with_one_note(capsys):
    for line, note, wanted in (
        ("--color black", "note: --color is now called --colour\n", Toaster(heat=2.0, colour="black")),
        ("--colour noir", "note: --colour noir is now called --colour black\n", Toaster(heat=2.0, colour="black")),
        ("--salt", "note: --salt is now called --salted\n", Toaster(heat=2.0, salted=True)),
        ("--no-salt", "note: --salt is now called --salted\n", Toaster(heat=2.0)),
        ("--preset tea --liters 3", "note: --liters is now called --litres\n", Kettle(litres=3.0)),
    ):
        assert parsed(line) == wanted and capsys.readouterr() == ("", note)
    parsed("--colour black")
    assert capsys.readouterr() == ("", "")


def test_other_ranks_are_quiet(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop, command_line.first_rank_speaks():
        parsed("--color black --slices 9")
    assert stop.value.code == 2 and capsys.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------ JSON


def test_json_round_trip():
    for options in (Toaster(butter="x", out=Path("a/b")), Kettle(), systems.VQAOptions(), rl.RLHFOptions()):
        assert from_json(type(options), json.loads(json.dumps(to_json(options))), "here") == options


def test_older_json():
    assert from_json(Toaster, {"color": "noir", "butter": "", "out": "x"}, "here") == Toaster(
        colour="black", out=Path("x")
    )
    with pytest.raises(UserError, match="here has unknown fields crumbs, deptj; was it written by another version?"):
        from_json(Toaster, {"deptj": 3, "crumbs": 1, "color": "brown"}, "here")
    with pytest.raises(UserError, match="--slices must be at least 1"):
        from_json(Toaster, {"slices": 0}, "here")


# ------------------------------------------------------------------------------------------------ help


def page_of(capsys, read, argv) -> str:
    with pytest.raises(SystemExit) as stop:
        read(argv)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_is_grouped_and_shows_the_values_of_the_preset(capsys):
    page = page_of(capsys, parsed, "--help")
    headings = [line for line in page.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Run:", "Bread:", "Heat:", "Options:"]
    assert "Example:\n    python toast.py --slices 3\n" in page and "works, tea." in page
    assert "How hot.  [2.0]" in page and "Go on.  [off]" in page and "--color " not in page and "--salt " not in page
    page = " ".join(page.split())
    assert "(with --preset works and with --colour black)" in page
    assert "(with --butter and without --salted and not with --colour black)" in page
    works = page_of(capsys, parsed, "--preset works --help")
    assert "How hot.  [1.0]" in works and "[plain]" in works


def test_an_error_is_a_line_and_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        run_program(lambda: parsed("--slices 9"))
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: --slices must be at least 1")
