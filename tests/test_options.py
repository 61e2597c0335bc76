"""The dialect of options itself, and what every options class of the programs must obey."""

import json
import math
import subprocess
import sys
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import get_type_hints

import pytest
from vqa_helpers import ROOT

from vqa_scratch import command_line
from vqa_scratch.command_line import flag_names, flags, parse, run_program
from vqa_scratch.connectors import CONNECTORS
from vqa_scratch.errors import UserError
from vqa_scratch.generation_options import GenerationOptions
from vqa_scratch.options import (
    Options,
    changeable,
    check_dependencies,
    choices_of,
    from_json,
    option,
    rules_of,
    to_json,
    types_of,
)
from vqa_scratch.rl import options as rl
from vqa_scratch.systems import find
from vqa_scratch.systems import options as systems

OLD_RUNS = Path(__file__).parent / "old_runs"
PROGRAMS = ((systems.CLASSES, systems.PRESETS), ((rl.RLHFOptions,), rl.PRESETS))


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
        check_dependencies(merged, ["depth"])
    check_dependencies(merged, ["slices"])
    with pytest.raises(UserError, match="--depth means nothing with --preset home"):
        parsed("--resume --depth 4")


def test_what_may_change():
    assert changeable(Toaster) == {"out", "resume"}
    of_training = {"resume", "out", "device", "parallel", "data", "cache", "test_images"}
    of_training |= {"learning_rate", "matrix_learning_rate", "max_grad_norm"}
    assert changeable(systems.ViLTOptions) == changeable(systems.CaptionOptions) == of_training
    assert changeable(systems.VQAOptions) == of_training | {"feature_cache"}
    of_rlhf = {"resume", "out", "cache", "device", "parallel", "save_every", "learning_rate", "max_grad_norm"}
    assert changeable(rl.RLHFOptions) == of_rlhf


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


def test_old_names_of_the_programs(capsys):
    assert systems.read_command_line(["--fusion", "mean"]).connector == "mean"
    assert capsys.readouterr().err == "note: --fusion is now called --connector\n"
    old = "--preset vqa --data-dir x --checkpoint-every 3 --no-repeat-ngram 2 --freeze none"
    new = "--preset vqa --data x --save-every 3 --no-repeat-ngram-size 2 --freeze nothing"
    assert rl.read_command_line(old.split()) == rl.read_command_line(new.split())
    assert capsys.readouterr().err.count("is now called") == 4


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


@pytest.mark.parametrize(
    ("run", "key", "options_class", "known"),
    [
        ("vqa", "train", systems.VQAOptions, {"connector": "tokens", "image_model": None, "width": 16}),
        ("vqa-mean", "train", systems.VQAOptions, {"connector": "mean", "freeze": "nothing"}),
        ("vilt", "train", systems.ViLTOptions, {"model": None}),
        ("caption", "train", systems.CaptionOptions, {"decoder_model": None, "question_share": 0.3}),
        ("rlhf-vqa", None, rl.RLHFOptions, {"data": Path("data"), "freeze": "nothing", "reference": None}),
    ],
)
def test_runs_of_the_first_release(run, key, options_class, known):
    """Their config.json, old names and all, gives the options of today; nothing in it is lost."""
    values = json.loads((OLD_RUNS / run / "config.json").read_text())
    values = values[key] if key else {name: value for name, value in values.items() if name != "program"}
    options = from_json(options_class, values, run)
    assert {name: getattr(options, name) for name in known} == known
    new = {rules.was: name for name, rules in rules_of(options_class).items() if rules.was}
    again = to_json(options)
    for name, value in values.items():
        renamed = rules_of(options_class)[new.get(name, name)].renamed
        assert again[new.get(name, name)] == (renamed.get(value, value) if isinstance(value, str) else value) or (
            value == "" and again[new.get(name, name)] is None
        )


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
    assert "(with --preset works and with --colour black)" in " ".join(page.split())
    works = page_of(capsys, parsed, "--preset works --help")
    assert "How hot.  [1.0]" in works and "[plain]" in works


@pytest.mark.parametrize(
    ("module", "classes", "preset"),
    [
        (module, classes, name)
        for module, (classes, presets) in zip((systems, rl), PROGRAMS, strict=True)
        for name in presets
    ],
)
def test_every_option_is_in_the_help_under_its_heading(module, classes, preset, capsys):
    page = page_of(capsys, module.read_command_line, ["--preset", preset, "--help"])
    (options_class,) = (cls for cls in classes if preset in choices_of(cls, "preset"))
    for name, rules in rules_of(options_class).items():
        section = page.split(f"\n{rules.group}:\n")[1].split("\n\n")[0]
        assert f"  --{name.replace('_', '-')} " in section, name


@pytest.mark.parametrize(
    "argv",
    [
        "train.py --help",
        "train.py --preset caption --help",
        "train.py --wdith 3",
        "rlhf.py --help",
        "rlhf.py --preset vqa --help",
        "-m vqa_scratch --help",
        *(f"-m vqa_scratch {name} --help" for name in ("ask", "evaluate", "study", "export", "convert")),
        "-m vqa_scratch ask --imag x",
    ],
)
def test_a_command_line_is_read_without_torch(argv):
    """So that it takes a tenth of a second."""
    program = "import runpy, sys, atexit\n" + (
        "atexit.register(lambda: print('heavy:', sorted({'torch', 'numpy', 'matplotlib'} & set(sys.modules))))\n"
        f"sys.argv = {argv.removeprefix('-m ').split()}\n"
        + (
            "runpy.run_module('vqa_scratch', run_name='__main__', alter_sys=False)"
            if argv.startswith("-m")
            else "runpy.run_path(sys.argv[0], run_name='__main__')"
        )
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=600)
    good = "--help" in argv
    assert ended.returncode == (0 if good else 2), ended.stderr
    assert ended.stdout.splitlines()[-1] == "heavy: []"
    assert ("Example:" in ended.stdout and ended.stderr == "") if good else ended.stderr.count("\n") == 1


def test_an_error_is_a_line_and_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        run_program(lambda: parsed("--slices 9"))
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: --slices must be at least 1")


# ------------------------------------------------------------------------------------------------ every option there is

EVERY_CLASS = (*systems.CLASSES, rl.RLHFOptions, GenerationOptions)


@pytest.mark.parametrize("options_class", EVERY_CLASS)
def test_every_option_is_documented_and_ruled_soundly(options_class):
    rules, kinds = rules_of(options_class), types_of(options_class)
    assert [f.name for f in fields(options_class) if f.name not in rules] == (
        ["eos_id"] if options_class is GenerationOptions else []
    )
    for item in fields(options_class):
        if item.name not in rules:
            continue
        rule = rules[item.name]
        assert rule.help.endswith(".") and rule.help[0].isupper() and "\n" not in rule.help, item.name
        assert rule.group and rule.group[0].isupper()
        assert rule.choices == () or str in kinds[item.name]
        assert rule.range == "" or {int, float} & set(kinds[item.name]), item.name
        if item.default is not MISSING and item.default is not None:
            assert isinstance(item.default, kinds[item.name]), item.name
            assert rule.range == "" or rule.allow(item.default), item.name
            assert rule.choices == () or item.default in rule.choices, item.name
        assert item.default != "" or type(None) not in kinds[item.name], "absent is None"
        for other, values in rule.only.items():
            assert other in rules and other != item.name
            assert all(v is None or isinstance(v, kinds[other]) for v in values), item.name
            assert not rules[other].choices or set(values) < set(rules[other].choices), item.name
        assert set(rule.renamed.values()) <= set(rule.choices) and not set(rule.renamed) & set(rule.choices)
        assert rule.was is None or rule.was not in rules
    names = flag_names(options_class)
    assert len(names) == len(set(names)) and len(flags(options_class)) == len(rules) + sum(
        rule.was is not None for rule in rules.values()
    )


@pytest.mark.parametrize(("classes", "presets"), PROGRAMS)
def test_presets_obey_the_rules_and_mean_something(classes, presets):
    """Every preset has a class, and every value of it is a field, within its bounds and of effect."""
    names = [name for cls in classes for name in choices_of(cls, "preset")]
    assert names == list(presets)
    for options_class in classes:
        defaults = {item.name: item.default for item in fields(options_class)}
        for preset in choices_of(options_class, "preset"):
            options = options_class(preset=preset, resume=True, **presets[preset])
            given = {name for name, value in presets[preset].items() if getattr(options, name) == value}
            assert given == set(presets[preset]) and given <= set(defaults)
            check_dependencies(options, given)


def test_every_preset_has_a_system_with_its_options():
    for preset in systems.PRESETS:
        build, kind = find(preset).build, systems.BY_PRESET[preset]
        assert kind in systems.CLASSES and preset in choices_of(kind, "preset")
        assert get_type_hints(build)["options"] is kind
    with pytest.raises(UserError, match="there is no preset shape; there are shapes, book, vilt"):
        find("shape")


def test_every_connector_is_a_choice():
    """The table of connectors is not imported where options are read, because it imports torch."""
    assert tuple(CONNECTORS) == systems.CONNECTORS == choices_of(systems.VQAOptions, "connector")
