"""What every options class of the programs must obey: bounds, help, old names, presets."""

import json
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_type_hints

import pytest
from test_options import page_of
from vqa_helpers import ROOT

from vqa_scratch.command_line import flag_names, flags
from vqa_scratch.errors import UserError
from vqa_scratch.generation_options import GenerationOptions
from vqa_scratch.options import (
    changeable,
    check_dependencies,
    choices_of,
    from_json,
    rules_of,
    to_json,
    types_of,
)
from vqa_scratch.rl import options as rl
from vqa_scratch.systems import find
from vqa_scratch.systems import options as systems

OLD_RUNS = Path(__file__).parent / "old_runs"
PROGRAMS = ((systems.CLASSES, systems.PRESETS), ((rl.RLHFOptions,), rl.PRESETS))


def test_what_may_change():
    of_training = {"resume", "out", "device", "parallel", "data", "cache", "test_images", "log_to", "profile"}
    of_training |= {"learning_rate", "matrix_learning_rate", "max_grad_norm", "gradient_checkpointing", "seeds"}
    of_training |= {"threads"}
    assert changeable(systems.ViLTOptions) == changeable(systems.CaptionOptions) == of_training
    assert changeable(systems.VQAOptions) == of_training | {"feature_cache"}
    of_rlhf = {"resume", "out", "cache", "device", "parallel", "save_every", "log_to", "learning_rate", "max_grad_norm"}
    of_rlhf |= {"profile", "threads"}
    assert changeable(rl.RLHFOptions) == of_rlhf


def test_old_names_of_the_programs(capsys):
    assert systems.read_command_line(["--fusion", "mean"]).connector == "mean"
    assert capsys.readouterr().err == "note: --fusion is now called --connector\n"
    old = "--preset vqa --data-dir x --checkpoint-every 3 --no-repeat-ngram 2 --freeze none"
    new = "--preset vqa --data x --save-every 3 --no-repeat-ngram-size 2 --freeze nothing"
    assert rl.read_command_line(old.split()) == rl.read_command_line(new.split())
    assert capsys.readouterr().err.count("is now called") == 4


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
        *(f"-m vqa_scratch {name} --help" for name in ("ask", "transcribe", "evaluate", "study", "export", "convert")),
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
    assert ("\n  Example" in ended.stdout and ended.stderr == "") if good else ended.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------ every option there is

EVERY_CLASS = (*systems.CLASSES, rl.RLHFOptions, GenerationOptions)


@pytest.mark.parametrize("options_class", EVERY_CLASS)
def test_every_option_is_documented_and_ruled_soundly(options_class):
    rules, kinds = rules_of(options_class), types_of(options_class)
    assert [f.name for f in fields(options_class) if f.name not in rules] == (
        ["eos_id", "suppress_tokens", "begin_suppress_tokens", "no_timestamps_token_id", "max_initial_timestamp_index"]
        if options_class is GenerationOptions
        else []
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
            check_dependencies(options_class, vars(options), given)


def test_every_preset_has_a_system_with_its_options():
    for preset in systems.PRESETS:
        build, kind = find(preset).build, systems.BY_PRESET[preset]
        assert kind in systems.CLASSES and preset in choices_of(kind, "preset")
        assert get_type_hints(build)["options"] is kind
    with pytest.raises(UserError, match="there is no preset shape; there are shapes, book, vilt"):
        find("shape")
