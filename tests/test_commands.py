"""evaluate, export and convert on a run folder, and the errors of all command lines."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_helpers import by_hand, command, make_run, picture
from safetensors.torch import load_file, save_file
from vqa_helpers import ROOT

from vqa_scratch import systems
from vqa_scratch.command_line import run_program
from vqa_scratch.connectors import CONNECTORS, connector_class
from vqa_scratch.data.image_files import load_image
from vqa_scratch.data.vqa_files import annotations_name, questions_name
from vqa_scratch.data.vqa_v2 import read_vqa
from vqa_scratch.errors import UserError, note
from vqa_scratch.metrics import accuracy_by
from vqa_scratch.study.record import take_apart
from vqa_scratch.systems.scoring import QuestionOnly, TypePrior, blind


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    return make_run(data, tmp_path_factory.mktemp("conv") / "run", question_prompt=True)


# ------------------------------------------------------------------------------------------------ evaluate


def test_evaluate(run, data, tmp_path, capsys):
    """The figures against the metric applied to the submission; baselines from the train split."""
    command("evaluate", run, "--data", data, "--split", "val", "--submission", tmp_path / "answers.json")
    figures = json.loads((run / "evaluation.json").read_text())
    samples = read_vqa(data, "val").samples
    answers = {a["question_id"]: a["answer"] for a in json.loads((tmp_path / "answers.json").read_text())}
    assert answers.keys() == {s.question_id for s in samples}
    for key in ("answer_type", "question_type"):
        expected = accuracy_by(samples, answers, key)
        assert figures["accuracy"] == expected.overall.accuracy
        assert figures[f"accuracy_by_{key}"] == {k: g.accuracy for k, g in expected.groups.items()}
        assert figures["counts"][key] == {k: g.count for k, g in expected.groups.items()}
    train = read_vqa(data, "train").samples
    assert figures["baselines"]["prior"] == blind(samples, TypePrior(train))
    assert figures["baselines"]["question_only"] == blind(samples, QuestionOnly(train))
    assert figures["baselines"].keys() == {"prior", "question_only", "shuffled_images"}
    assert 0 <= figures["eos_rate"] <= 1 and 1 <= figures["mean_answer_tokens"] <= 8
    table = capsys.readouterr().out
    assert "what color is the" in table and f"{figures['accuracy']:.4f}" in table and "question only" in table


def test_evaluate_some(run, data):
    command("evaluate", run, "--data", data, "--split", "test", "--limit", 16)
    assert json.loads((run / "evaluation.json").read_text())["questions"] == 16


def without(data: Path, folder: Path, *names: str) -> Path:
    """A data folder that lacks some of the files."""
    folder.mkdir()
    for path in data.iterdir():
        if path.name not in names:
            (folder / path.name).symlink_to(path)
    return folder


def test_evaluate_without_a_train_split(run, data, tmp_path, capsys):
    """No silent gap: a note says which baselines are not known, and the file holds null."""
    folder = without(data, tmp_path / "data", questions_name("train2014"))
    command("evaluate", run, "--data", folder)
    printed = capsys.readouterr()
    baselines = json.loads((run / "evaluation.json").read_text())["baselines"]
    assert baselines["prior"] is None and baselines["question_only"] is None and baselines["shuffled_images"] >= 0
    assert printed.err.count("note: no prior and question-only baselines") == 1 and "not known" in printed.out


def test_evaluate_without_annotations(run, data, tmp_path, capsys):
    """Only the submission is written, and it has to be asked for."""
    folder = without(data, tmp_path / "data", annotations_name("test2015"))
    (run / "evaluation.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="has no answers to score by; give --submission FILE"):
        command("evaluate", run, "--data", folder, "--split", "test")
    command("evaluate", run, "--data", folder, "--split", "test", "--submission", tmp_path / "answers.json")
    assert len(json.loads((tmp_path / "answers.json").read_text())) == len(read_vqa(data, "test").samples)
    assert not (run / "evaluation.json").exists() and "nothing is scored" in capsys.readouterr().out


def test_an_incomplete_submission_is_refused(run, data, tmp_path):
    """Where an image is missing, its questions cannot be answered: known before anything is computed."""
    folder = without(data, tmp_path / "data", "val2014")
    (folder / "val2014").mkdir()
    for path in sorted((data / "val2014").iterdir())[1:]:
        (folder / "val2014" / path.name).symlink_to(path)
    with pytest.raises(UserError, match="8 are left out .8: the image is missing"):
        command("evaluate", run, "--data", folder, "--submission", tmp_path / "answers.json")
    with pytest.raises(UserError, match="leave out --limit or --submission"):
        command("evaluate", run, "--data", data, "--limit", 3, "--submission", tmp_path / "answers.json")
    assert not (tmp_path / "answers.json").exists()


# ------------------------------------------------------------------------------------------------ export


@pytest.mark.parametrize("stem", ["linear", "conv"])
@pytest.mark.parametrize("question_prompt", [True, False])
@pytest.mark.parametrize("connector", CONNECTORS)
def test_export(data, tmp_path, connector, question_prompt, stem, capsys, monkeypatch):
    """The towers load in transformers without a missing key, and the page's own program gives the run's answer."""
    import transformers as hf

    reads_text, reads_pixels = connector_class(connector).reads_text, connector_class(connector).reads_pixels
    if not reads_text and not question_prompt:
        pytest.skip("it would read no question")
    if reads_pixels and stem == "conv":
        pytest.skip("it has no image encoder")
    run = make_run(data, tmp_path / "run", connector=connector, stem=stem, question_prompt=question_prompt)
    out = tmp_path / "export"
    command("export", run, out)
    printed = capsys.readouterr()
    tokenizers = systems.load(run).tokenizers
    parts = {"text": tokenizers.text, "decoder": tokenizers.decoder}
    parts = {name: tokenizer for name, tokenizer in parts.items() if tokenizer is not None}
    wanted = [(hf.GPT2LMHeadModel, "decoder", {}), *[(hf.DistilBertModel, "text", {})] * ("text" in parts)]
    assert ("text" in parts) == (out / "text").exists() == reads_text
    if reads_pixels:
        assert not (out / "image" / "config.json").exists() and printed.err == ""
    elif stem == "linear":
        wanted.append((hf.ViTModel, "image", {"add_pooling_layer": False}))
        assert printed.err == ""
    else:
        assert printed.err.count("note: the image encoder has a convolutional stem") == 1
        assert not (out / "image" / "config.json").exists(), "nothing that transformers would take for a plain ViT"
    for kind, name, options in wanted:
        _, report = kind.from_pretrained(out / name, output_loading_info=True, **options)
        problems = {k: v for k, v in report.items() if v and k != "error_msgs"}
        assert problems == {}, (name, problems)
    for name, tokenizer in parts.items():
        theirs = hf.AutoTokenizer.from_pretrained(out / name)
        assert theirs(" is there a red circle?")["input_ids"] == tokenizer.encode(" is there a red circle?")
    hf.AutoImageProcessor.from_pretrained(out / "image")

    question, image = "what color is the square?", picture(data)
    program = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert question in program
    monkeypatch.chdir(out)
    (out / "picture.png").write_bytes(image.read_bytes())
    exec(compile(program, "README.md", "exec"), {"__name__": "readme"})
    said = capsys.readouterr().out.strip()
    command("ask", run, "--image", image, "--question", question)
    assert said == capsys.readouterr().out.split("  (probability")[0] == by_hand(run, image, question)[0] != ""


def test_export_over_the_run_is_refused(run):
    with pytest.raises(UserError, match="DIR must be another folder than RUN"):
        command("export", run, run / "decoder_tokenizer" / ".." / "text_tokenizer")
    with pytest.raises(UserError, match="DIR must be another folder than RUN"):
        command("export", run, run)


# ------------------------------------------------------------------------------------------------ convert


def test_convert(tmp_path, capsys):
    tensors = {"a.weight": torch.randn(3, 4), "b": torch.arange(3)}
    torch.save(tensors, tmp_path / "model.bin")
    command("convert", tmp_path / "model.bin", tmp_path / "model.safetensors")
    again = load_file(tmp_path / "model.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[k], tensors[k]) for k in tensors)
    out = capsys.readouterr().out
    assert hashlib.sha256((tmp_path / "model.bin").read_bytes()).hexdigest() in out and "2 tensors" in out


@pytest.mark.parametrize("content", [{"step": 3}, [torch.zeros(2)], {"a": {"b": torch.zeros(2)}}, {"p": Path("x")}])
def test_convert_takes_tensors_only(tmp_path, content):
    torch.save(content, tmp_path / "model.bin")
    with pytest.raises(UserError, match="model.bin .*tensors"):
        command("convert", tmp_path / "model.bin", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


# ------------------------------------------------------------------------------------------------ command lines


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["aks"], "no such command: aks; did you mean ask?"),
        (["frobnicate"], "no such command: frobnicate; there are ask, convert, data, evaluate, export"),
        (["ask", "x", "--imag", "y"], "no such flag: --imag; did you mean --image?"),
        (["evaluate", "x", "--data", "y", "--precision", "fp23"], "did you mean 'fp32'?"),
        (["evaluate", "x", "--data", "y", "--limit", "0"], "--limit"),
        (["ask", "nowhere", "--image", "y", "--question", "z"], "no run folder nowhere"),
        (["ask", __file__, "--image", "y", "--question", "z"], "is a file; a run is a folder"),
        (["convert", "nowhere.bin", "out"], "cannot read nowhere.bin"),
    ],
)
def test_errors_are_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run_program(lambda: command(*argv))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def test_the_program_as_it_is_started(run):
    """python -m vqa_scratch: help, and exit code 2 with one line."""
    for argv, code, text in ((["--help"], 0, "evaluate"), (["evalute"], 2, "error: no such command: evalute; did you")):
        done = subprocess.run(
            [sys.executable, "-m", "vqa_scratch", *argv], capture_output=True, text=True, cwd=ROOT, timeout=600
        )
        assert done.returncode == code and text in done.stdout + done.stderr
    assert done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------ broken runs


@pytest.mark.parametrize("content", ["{", '{"red": 1}', "[]", '["red", ""]'])
def test_a_broken_list_of_answers_is_one_line(run, data, tmp_path, content):
    broken = Path(shutil.copytree(run, tmp_path / "run"))
    (broken / "answers.json").write_text(content)
    with pytest.raises(UserError, match="answers.json is not (valid JSON|a list of answers)") as caught:
        command("ask", broken, "--image", picture(data), "--question", "is there a circle?", "--top", "2")
    assert "\n" not in str(caught.value)


def test_a_file_of_another_model_is_told_shortly(run, tmp_path):
    other = Path(shutil.copytree(run, tmp_path / "run"))
    save_file({"x": torch.zeros(1)}, other / "model.safetensors")
    with pytest.raises(UserError, match="does not fit the model: missing .* and [0-9]+ more$") as caught:
        systems.load(other)
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (lambda run: (run / "config.json").unlink(), "is not a run folder: it has no config.json"),
        (lambda run: (run / "config.json").write_text('{"program": "tr'), "config.json is not valid JSON"),
        (lambda run: (run / "config.json").write_text("[]"), "config.json must hold a JSON object, not a list"),
        (lambda run: (run / "config.json").write_text('{"program": "train.py"}'), "config.json"),
        (lambda run: (run / "model.safetensors").unlink(), "has no model.safetensors yet"),
        (lambda run: (run / "model.safetensors").write_bytes(b"1234"), "is not a whole safetensors file"),
        (lambda run: other_shapes(run), r"decoder.norm.weight is \(3,\), the model has \(32,\)"),
        (lambda run: (run / "text_tokenizer" / "tokenizer.json").write_text("{"), "the tokenizer in .* cannot be read"),
        (lambda run: (run / "preprocessor_config.json").write_text("{"), "is not valid JSON"),
    ],
)
def test_a_broken_run_is_one_line(run, tmp_path, breaking, message):
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    breaking(broken)
    with pytest.raises(UserError, match=message) as caught:
        systems.load(broken)
    assert "\n" not in str(caught.value)


def other_shapes(run: Path) -> None:
    tensors = load_file(run / "model.safetensors")
    save_file(tensors | {"decoder.norm.weight": torch.zeros(3)}, run / "model.safetensors")


def test_no_command_writes_over_what_it_reads(run, data, tmp_path):
    """Every one says so before it works, and leaves the file as it was."""
    folder, other = Path(shutil.copytree(data, tmp_path / "data")), Path(shutil.copytree(run, tmp_path / "other"))
    weights, question = tmp_path / "w.bin", folder / questions_name("val2014")
    torch.save({"w": torch.ones(2)}, weights)
    (tmp_path / "same.bin").symlink_to(weights)
    asked = ("--image", picture(data), "--question", "what color is the square?", "--out")
    lost, before = "would be lost", {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for argv in (
        ("convert", weights, weights),
        ("convert", weights, tmp_path / "same.bin"),
        ("evaluate", run, "--data", folder, "--submission", question),
        ("evaluate", run, "--data", folder, "--submission", folder / questions_name("train2014")),
        ("evaluate", run, "--data", folder, "--submission", other / "answers.json"),
        ("export", run, other),
        ("study", other, *asked, other),
        ("data", folder, "--out", question),
    ):
        with pytest.raises(UserError, match=lost):
            command(*argv)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(run, data, tmp_path, value):
    """Every command that opens them says so, and converts none."""
    out = Path(shutil.copytree(run, tmp_path / "run"))
    weights = load_file(out / "model.safetensors")
    name = next(name for name in weights if name.startswith("decoder.") and weights[name].ndim == 2)
    weights[name][1, 2] = value
    save_file(weights, out / "model.safetensors")
    torch.save({"w": torch.tensor([0.0, value])}, tmp_path / "w.bin")
    asked = ("--image", picture(data), "--question", "what color is the square?")
    for argv in (
        ("ask", out, *asked),
        ("evaluate", out, "--data", data),
        ("study", out, *asked, "--out", tmp_path / "study"),
        ("export", out, tmp_path / "out"),
        ("convert", tmp_path / "w.bin", tmp_path / "w.safetensors"),
    ):
        with pytest.raises(UserError, match="holds NaN or infinite numbers") as error:
            command(*argv)
        assert name in str(error.value) or argv[0] == "convert"
    assert not (tmp_path / "w.safetensors").exists()


def test_probabilities_that_are_no_numbers(run, data, monkeypatch, tmp_path):
    """Of weights that are finite, but whose states overflow."""
    system = systems.load(run)
    with torch.no_grad():
        for parameter in system.model.image.parameters():
            parameter.mul_(1e30)
    sample = read_vqa(data, "val").samples[0]
    said = "gives its answer the probability nan"
    with pytest.raises(UserError, match=said):
        system.ask(sample.image_path, sample.question)
    with pytest.raises(UserError, match=said):
        system.ask(sample.image_path, sample.question, top=2)
    with pytest.raises(UserError, match=said):
        system.answer([sample])
    with pytest.raises(UserError, match="a probability that is no number"):
        take_apart(system.subject(load_image(sample.image_path), sample.question))


def test_questions_that_are_cut_are_counted(run, data, tmp_path, capsys):
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    path = folder / questions_name("val2014")
    content = json.loads(path.read_text())
    content["questions"][0]["question"] = "is there a red circle " * 30
    path.write_text(json.dumps(content))
    note.cache_clear()
    command("evaluate", run, "--data", folder, "--limit", "8")
    assert "note: 1 questions are longer than " in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- completion


@pytest.mark.parametrize(
    "words, expected",
    [
        ("vqa-scratch ev", ["plain,evaluate"]),
        ("vqa-scratch evaluate --dev", ["plain,--device"]),
        ("vqa-scratch evaluate --device c", ["plain,cpu", "plain,cuda"]),
        ("vqa-scratch ask --im", ["plain,--image"]),
        ("vqa-scratch data --fe", ["plain,--fetch"]),
    ],
)
def test_the_shell_completes_commands_and_flags_without_torch(words, expected):
    """Click's protocol, as the script that `_VQA_SCRATCH_COMPLETE=bash_source vqa-scratch` prints speaks it."""
    program = (
        "import atexit, sys; sys.argv = ['vqa-scratch']; from vqa_scratch.__main__ import main\n"
        "atexit.register(lambda: print('torch' in sys.modules)); main()"
    )
    protocol = {"_VQA_SCRATCH_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | protocol, cwd=ROOT, capture_output=True, text=True
    )
    assert ended.stdout.splitlines() == [*expected, "False"] and ended.stderr == ""
