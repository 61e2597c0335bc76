"""Runs made before the redesign, in `old_runs/`: each opens and says what it said then, and one that was interrupted
goes on to the weights of the run that was not.

The folders hold what the older version wrote, untouched; `expected.json` what it answered about `scene.png`. They were
trained on the data set that `vqa_helpers.small_data` draws.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from run_helpers import command
from safetensors.torch import load_file
from vqa_helpers import Started, train_program

from vqa_scratch import systems
from vqa_scratch.errors import UserError
from vqa_scratch.models import VQAModel
from vqa_scratch.systems.older import MOVED, todays_moments, todays_names
from vqa_scratch.systems.options import read_command_line
from vqa_scratch.systems.run_folder import save_weights
from vqa_scratch.training.checkpoint import load_checkpoint, load_model_state
from vqa_scratch.training.optimizers import Optimizers

OLD = Path(__file__).parent / "old_runs"
SCENE = OLD / "scene.png"
EXPECTED = json.loads((OLD / "expected.json").read_text())
RUNS = ["vqa", "vqa-mean", "vilt", "caption"]
CLOSE = {"rel": 1e-5, "abs": 0}


def copied(name: str, folder: Path) -> Path:
    """A copy that may be written into."""
    return Path(shutil.copytree(OLD / name, folder / "run"))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_runs_are_here():
    assert EXPECTED.keys() == set(RUNS) and all((OLD / name / "model.safetensors").is_file() for name in RUNS)


@pytest.mark.parametrize(("name", "asked"), [(name, asked) for name in RUNS for asked in EXPECTED[name]])
def test_it_answers_as_it_did(name, asked):
    """Texts, and probabilities to rounding; a caption where nothing is asked, three answers where three were."""
    question, _, top = asked.partition(" top ")
    answers, notes = systems.load(OLD / name).ask(
        SCENE, None if question == "caption" else question, int(top or 0) or None
    )
    expected = EXPECTED[name][asked] if top else [EXPECTED[name][asked]]
    assert [answer.text for answer in answers] == [text for text, _ in expected] and notes == []
    assert [answer.probability for answer in answers] == [pytest.approx(chance, **CLOSE) for _, chance in expected]


def test_old_names_are_there():
    """A connector was called fusion, and a captioner said nothing of one; else this file would test little."""
    for name, connector in (("vqa", "tokens"), ("vqa-mean", "mean"), ("caption", None)):
        values = json.loads((OLD / name / "config.json").read_text())
        assert values["train"].get("fusion") == values["model"].get("fusion") == connector
        assert "connector" not in values["train"] and "connector" not in values["model"]
        assert any(key.startswith(MOVED) for key in load_file(OLD / name / "model.safetensors"))
        system = systems.load(OLD / name)
        assert isinstance(system.model, VQAModel) and system.sizes["connector"]["kind"] == (connector or "tokens")
        assert connector is None or system.options.connector == connector
        assert system.options.decoder_model is None, "it stood as an empty word"


@pytest.mark.parametrize("name", RUNS)
def test_what_it_saves_is_of_today(name, tmp_path):
    """Written again under the names of now, it opens to the same weights."""
    system = systems.load(OLD / name)
    system.save(tmp_path)
    save_weights(tmp_path / "model.safetensors", system.model)
    again = systems.load(tmp_path)
    ours, theirs = again.model.state_dict(), system.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert again.options == system.options
    assert not any(key.startswith(MOVED) for key in load_file(tmp_path / "model.safetensors"))
    assert "fusion" not in (tmp_path / "config.json").read_text()


def resumed(data: Path, out: Path, *more: str) -> list[str]:
    return ["--preset", "shapes", "--out", str(out), "--data", str(data), "--resume", *more]


def test_it_goes_on(data, tmp_path):
    """Stopped after step 7 of 8 by the older version and gone on with by this one, against the older one left alone:
    the loss of step 8, the weights, the answers. The older one's Muon took queries, keys and values as one matrix."""
    out = copied("vqa", tmp_path)
    ended = Started(train_program, resumed(data, out)).end()
    assert ended.code == 0 and "resuming after step 7" in ended.out, ended.err
    ours, whole = rows(out / "metrics.jsonl"), rows(OLD / "vqa_whole_metrics.jsonl")
    assert [(row["step"], row["samples"], "val" in row) for row in ours] == [
        (row["step"], row["samples"], "val" in row) for row in whole
    ]
    for mine, theirs in zip(ours, whole, strict=True):
        for key in {"loss", "grad_norm", "lr_factor"} & theirs.keys():
            assert mine[key] == pytest.approx(theirs[key], **CLOSE), (mine["step"], key)
    saved, expected = load_checkpoint(out / "checkpoints" / "last.pt"), load_file(OLD / "vqa_whole.safetensors")
    expected = todays_names(expected)
    assert saved["state"]["step"] == 8 and saved["model"].keys() == expected.keys()
    before = todays_names(load_checkpoint(OLD / "vqa" / "checkpoints" / "last.pt")["model"])
    apart = {name for name in expected if ".blocks." in name and name.endswith((".qkv.weight", ".kv.weight"))}

    def farthest(weights, names):
        return max(float((weights[name] - expected[name]).abs().max()) for name in names)

    alike = expected.keys() - apart
    moved = farthest(before, alike)
    assert farthest(saved["model"], alike) < 1e-5 < moved, "the last step moves weights by more than what is tolerated"
    assert len(apart) == 4 and 1e-5 < farthest(saved["model"], apart) < 0.02, "a step of Muon each, but not the same"
    assert systems.load(out).ask(SCENE, "what color is the square?")[0][0].text == ""


def test_it_goes_on_as_it_was_begun(data, tmp_path):
    """The options in its config.json hold, the renamed one among them."""
    out = copied("vqa", tmp_path)
    ended = Started(train_program, resumed(data, out, "--connector", "mean")).end()
    assert ended.code == 2 and "was started with --connector tokens, not mean" in ended.err
    ended = Started(train_program, resumed(data, out, "--fusion", "tokens")).end()
    assert ended.code == 0 and "note: --fusion is now called --connector" in ended.err
    assert read_command_line(["--fusion", "mean"]).connector == "mean"


def old_order(names: Iterable[str]) -> tuple[list[str], list[str], list[str]]:
    """How the older version sorted parameters: hidden matrices, other weights, the rest, each in the model's order."""
    hidden, wide, rest = [], [], []
    for name in names:
        table = any(word in name for word in ("position", "token", "modality", "places"))
        matrix = name.endswith("weight") and "norm" not in name
        (hidden if ".blocks." in name and matrix else wide if matrix and not table else rest).append(name)
    return hidden, wide, rest


@pytest.mark.parametrize("frozen", ["nothing", "encoders"])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_moments_find_their_parameters(kind, frozen):
    """An optimizer numbers its parameters, and their order has changed. Here the moment of each is its own weights."""
    system, weights = systems.load(OLD / "vqa"), load_checkpoint(OLD / "vqa" / "checkpoints" / "last.pt")["model"]
    load_model_state(system.model, todays_names(weights), "the checkpoint")
    system.model.freeze(frozen)
    optimizers = Optimizers(system.model, kind=kind, learning_rate=1.0, matrix_learning_rate=1.0, weight_decay=0.0)
    free = {name for name, parameter in system.model.named_parameters() if parameter.requires_grad}
    hidden, wide, rest = old_order(name for name in weights if todays_names({name: None}).keys() <= free)
    numbered = [hidden, wide + rest] if kind == "muon" else [hidden + wide + rest]
    states = optimizers.state_dict()
    for state, names in zip(states, numbered, strict=True):
        assert len(names) == sum(len(group["params"]) for group in state["param_groups"])
        state["state"] = {
            number: {"moment": weights[name], "step": torch.ones(())} for number, name in enumerate(names)
        }
    optimizers.load_state_dict(todays_moments(states, system.model, weights))
    found = [pair for optimizer in optimizers.optimizers for pair in optimizer.state.items()]
    assert len(found) == len(free) > 20
    assert all(torch.equal(state["moment"], parameter) for parameter, state in found)


# ------------------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize("name", RUNS)
def test_ask(name, capsys):
    question = "what color is the square?"
    command("ask", OLD / name, "--image", SCENE, "--question", question)
    text, chance = EXPECTED[name][question]
    assert capsys.readouterr().out == f"{text or '(nothing)'}  (probability {chance:.3f})\n"


@pytest.mark.parametrize("name", RUNS)
def test_evaluate(name, data, tmp_path, capsys):
    """A finished run gets the accuracy that its summary tells."""
    run = copied(name, tmp_path)
    command("evaluate", run, "--data", data, "--split", "test")
    figures = json.loads((run / "evaluation.json").read_text())
    assert figures["questions"] == 48 and "question only" in capsys.readouterr().out
    if (run / "summary.json").is_file():
        summary = json.loads((run / "summary.json").read_text())
        summary = summary["answers"] if name == "caption" else summary
        assert figures["accuracy"] == pytest.approx(summary["accuracy"], **CLOSE)
        shuffled = (some["baselines"]["shuffled_images"] for some in (figures, summary))
        assert next(shuffled) == pytest.approx(next(shuffled), **CLOSE)


def test_evaluate_captions(data, tmp_path):
    run = copied("caption", tmp_path)
    command("evaluate", run, "--data", data, "--split", "test", "--captions")
    figures, summary = (json.loads((run / f"{n}.json").read_text()) for n in ("evaluation", "summary"))
    for key in ("accuracy", "object_recall", "bleu", "eos_rate"):
        assert figures[key] == pytest.approx(summary[key], **CLOSE), key


@pytest.mark.parametrize("name", RUNS)
def test_export(name, tmp_path, capsys):
    command("export", OLD / name, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").is_file() and "written to" in capsys.readouterr().out
    if name != "vilt":
        held, saved = load_file(tmp_path / "out" / "connector.safetensors"), load_file(OLD / name / "model.safetensors")
        assert held and all(torch.equal(tensor, saved[key]) for key, tensor in held.items())


# ------------------------------------------------------------------------------------------------ rlhf.py


def test_a_tuned_policy_opens():
    """`rlhf.py` wrote it like a run of train.py, without the list of answers."""
    folder = OLD / "rlhf-vqa" / "policy"
    system = systems.load(folder)
    assert system.options.connector == "tokens" and system.candidates == []
    assert system.ask(SCENE, "what color is the square?")[0][0].text == ""
    with pytest.raises(UserError, match="has no answers.json to choose from, so leave out --top"):
        system.ask(SCENE, "what color is the square?", 3)
    with pytest.raises(UserError, match="is a run of rlhf.py, not of train.py"):
        systems.load(folder.parent)
