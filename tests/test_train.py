"""`python train.py` from its first line to summary.json, on a tiny budget."""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_helpers import command
from vqa_helpers import small_flags, small_options

import train
from vqa_scratch import systems
from vqa_scratch.connectors import connector_class
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.scenes import FAMILIES
from vqa_scratch.data.text import train_bpe, train_wordpiece
from vqa_scratch.data.vqa_v2 import read_vqa
from vqa_scratch.errors import UserError
from vqa_scratch.metrics import vqa_accuracy
from vqa_scratch.models.bert import Bert, BertConfig
from vqa_scratch.models.gpt2 import GPT2, GPT2Config
from vqa_scratch.models.vit import ConvStem, ViT, ViTConfig
from vqa_scratch.options import from_json, rules_of, to_json
from vqa_scratch.systems.finals import MARGIN, Pace, Pass, against_blind
from vqa_scratch.systems.options import PRESETS, VQAOptions
from vqa_scratch.systems.vqa import VQASystem
from vqa_scratch.systems.vqa_models import released_models
from vqa_scratch.training.checkpoint import load_checkpoint
from vqa_scratch.training.progress import Bar, Redrawn


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """30 steps: long enough for the loss to fall, short enough to wait for."""
    out = tmp_path_factory.mktemp("runs") / "run"
    flags = small_flags(data, out, steps=30, eval_every=15, save_every=15, log_every=5)
    assert train.main(train.read_command_line([f for f in flags if f != "--no-image-cache"])) is None
    return out


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_falls(run):
    losses = [row["loss"] for row in rows(run) if "loss" in row]
    # It starts at that of a uniform guess among 512 tokens, log 512 = 6.2, or a little below.
    assert 5 < losses[0] < 7 and losses[-1] < 0.7 * losses[0]


def test_token_limits_that_released_models_have_no_positions_for(tmp_path):
    """Said when the models are opened, not in the middle of training by the first long question."""
    text, decoder = train_wordpiece(["what is it"], 60), train_bpe([" what is it"], 300)
    sizes = {"dim": 16, "heads": 2, "layers": 1}
    parts = {
        "image_model": (ViT(ViTConfig(hidden=16, image_size=32, **sizes)), ImageProcessor(size=(32, 32))),
        "text_model": (Bert(BertConfig(layout="roberta", max_positions=22, pad_id=1, hidden=16, **sizes)), text),
        "decoder_model": (GPT2(GPT2Config(vocab_size=len(decoder), max_positions=30, **sizes)), decoder),
    }
    for name, (model, beside) in parts.items():
        model.save_pretrained(tmp_path / name)
        (beside.save_pretrained if name == "image_model" else beside.save)(tmp_path / name)
    paths = {name: str(tmp_path / name) for name in parts}

    def opened(**limits: int | bool):
        return released_models(VQAOptions(preset="book", init="pretrained", data=tmp_path, **paths, **limits), [])

    with pytest.raises(UserError, match="^--max-question-tokens 21 is more than the 20 positions of .*text_model$"):
        opened(max_question_tokens=21)  # a RoBERTa's first two rows are no positions
    with pytest.raises(UserError, match="^--max-answer-tokens 31 is more than the 30 positions of .*decoder_model$"):
        opened(max_question_tokens=20, max_answer_tokens=31)
    both = "^--max-question-tokens 20 and --max-answer-tokens 11 are more than the 30 positions of .*decoder_model$"
    with pytest.raises(UserError, match=both):
        opened(max_question_tokens=20, max_answer_tokens=11, question_prompt=True)
    opened(max_question_tokens=20, max_answer_tokens=30)
    model, tokenizers, _ = opened(max_question_tokens=20, max_answer_tokens=10, question_prompt=True)
    question, answer = "what is it " * 20, "it " * 20
    read = torch.tensor([tokenizers.prompt(question) + tokenizers.answer(answer)[:-1]])
    asked = torch.tensor([tokenizers.question(question)])
    assert read.shape == (1, 30) and asked.shape == (1, 20)
    model(torch.zeros(1, 3, 32, 32), asked, None, read)  # the longest there are


@pytest.mark.parametrize("name", ["image_model", "text_model", "decoder_model"])
def test_a_checkpoint_that_nobody_names_is_named(tmp_path, name):
    paths = dict.fromkeys(("image_model", "text_model", "decoder_model"), str(tmp_path)) | {name: None}
    with pytest.raises(UserError, match=f"^give --{name.replace('_', '-')}, a checkpoint to start from$"):
        released_models(VQAOptions(preset="book", init="pretrained", data=tmp_path, **paths), [])


def test_metrics_tell_what_happened(run):
    training = [row for row in rows(run) if "loss" in row]
    assert [row["step"] for row in training] == [1, 5, 10, 15, 20, 25, 30]
    for row in training:
        assert row.keys() >= {"samples", "seconds", "lr_factor", "samples_per_second", "token_accuracy", "grad_norm"}
    evaluations = [row for row in rows(run) if "val" in row]
    assert [row["step"] for row in evaluations] == [15, 30]
    assert all({"accuracy", "accuracy/color", "accuracy/count"} <= row["val"].keys() for row in evaluations)


def test_the_summary_has_its_keys(run):
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["baselines"]) == {"prior", "question_only", "shuffled_images"}
    assert summary["accuracy_by_family"].keys() == FAMILIES.keys() and 0 <= summary["accuracy"] <= 1
    assert 0 <= summary["holdout_accuracy"] <= 1
    for name in ("seconds", "samples_per_second", "peak_memory_gb"):
        assert summary[name] > 0
    assert summary["steps"] == 30 and 30 * 16 < summary["questions_seen"] <= 30 * 32


def test_every_file_of_the_run_folder_is_there(run):
    names = {p.name for p in run.iterdir()}
    expected = (
        "answers.json config.json model.safetensors metrics.jsonl summary.json curves.png samples.html checkpoints"
    )
    assert names == set(expected.split()) | {"text_tokenizer", "decoder_tokenizer", "preprocessor_config.json"}
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_ranking_stands_beside_generation(run, data):
    """Over the same questions: what the opened run chooses among the training answers, scored officially."""
    summary = json.loads((run / "summary.json").read_text())
    opened = systems.load(run, precision=summary["precision"])
    assert summary["generation_accuracy"] == summary["accuracy"]
    candidates = json.loads((run / "answers.json").read_text())
    assert summary["ranking_candidates"] == len(candidates) and opened.candidates == candidates
    samples = read_vqa(data, "test").samples
    assert summary["ranking_questions"] == len(samples)
    ranked = opened.answer(samples, ranked=True)
    assert {answer.text for answer in ranked.values()} <= set(candidates)
    total = sum(vqa_accuracy(ranked[s.question_id].text, s.answers) for s in samples) / len(samples)
    assert summary["ranking_accuracy"] == pytest.approx(total, abs=0.02)  # batches of another size round differently


def test_the_gallery_shows_what_was_answered(run):
    """A picture, a question, the answer with its probability and the annotators' answers for one of each family."""
    page = (run / "samples.html").read_text()
    assert page.count("<article>") == page.count("data:image/png;base64,") == len(FAMILIES)
    assert len(re.findall(r"\d+ % sure, accuracy [01]\.\d\d", page)) == len(FAMILIES)
    assert page.count("&times;") >= len(FAMILIES) and "http" not in page.replace("http-equiv", "")


def test_the_best_weights_answer_as_the_summary_says(run, data):
    """The folder alone gives the model back: its test accuracy is the one reported."""
    opened = systems.load(run)
    saved = load_checkpoint(run / "checkpoints" / "last.pt")
    best = [row for row in rows(run) if "val" in row]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["validation_accuracy"] == max(row["val"]["accuracy"] for row in best)
    if best[-1]["val"]["accuracy"] > best[0]["val"]["accuracy"]:
        state = opened.model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in saved["model"].items())
    assert not opened.model.training


def test_two_runs_are_equal(data, tmp_path):
    """The same seed gives the same weights; another seed gives others."""
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        options = small_options(data, tmp_path / name, seed=seed, steps=2, eval_questions=8, samples=1)
        train.main(options)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_a_time_budget_is_kept(data, tmp_path):
    """With --minutes the run ends in time, and its learning rate has fallen to about nothing by then."""
    options = small_options(data, tmp_path / "run", steps=None, minutes=0.1, eval_questions=8, samples=1)
    train.main(options)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    training = [row for row in rows(tmp_path / "run") if "loss" in row]
    factors = [row["lr_factor"] for row in training]
    assert factors[0] > factors[-1] and factors[4:] == sorted(factors[4:], reverse=True), "behind the warm-up"
    assert summary["steps"] >= 1


def test_minutes_include_the_final_figures(data, tmp_path, monkeypatch, capsys):
    """Where answering is slow, the final figures take fewer questions, in time, and say how many."""
    quick = VQASystem.respond

    def slow(*args, **how):
        time.sleep(0.25)
        return quick(*args, **how)

    monkeypatch.setattr(VQASystem, "respond", slow)
    options = small_options(data, tmp_path / "run", steps=None, minutes=0.15, eval_questions=8, questions_per_step=2)
    train.main(options)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    some, wanted = map(int, summary["cut_short"]["test"].split(" of "))
    assert some < wanted == len(VQASystem.read(options).samples["test"])
    assert f"test {some} of {wanted}" in capsys.readouterr().out


def test_the_last_lines_say_what_to_do_next(data, tmp_path, capsys):
    """Their commands run as they stand, and a run that learned nothing says that a blind guess is as good."""
    out = tmp_path / "a run"
    train.main(small_options(data, out, steps=1, eval_questions=8, samples=1))
    lines = capsys.readouterr().out.splitlines()
    blind = next(line for line in lines if line.startswith("no better than blind"))
    assert "do not need the image" in blind and len(blind) < 300
    assert json.loads((out / "summary.json").read_text())["better_than_blind"] is False
    at = lines.index("next:")
    assert [shlex.split(line)[3] for line in lines[at + 1 :]] == ["ask", "study"]
    for line in lines[at + 1 :]:
        assert shlex.split(line)[:3] == ["python", "-m", "vqa_scratch"]
        command(*shlex.split(line)[3:])
    said = capsys.readouterr().out
    assert said.count("(probability ") == 2 and (out / "study" / "report.html").is_file()


def test_better_than_blind_is_more_than_luck():
    baselines = {"prior": 0.5, "shuffled_images": 0.55}
    assert against_blind("accuracy", 0.6, baselines, 10_000) == []
    (line,) = against_blind("accuracy", 0.6, baselines, 100)
    assert line.startswith("too few to say") and "0.550 (shuffled images); of 100 scored, chance makes 0.138" in line
    assert against_blind("accuracy", 0.55, baselines, 10**9)[0].startswith("no better than blind")
    for share in (0.5, 1.0):  # one or both of two questions, of which the baselines have none
        assert "of 2 scored" in against_blind("accuracy", share, {"prior": 0.0}, 2)[0]


def test_the_pace_of_each_kind_of_pass_is_measured():
    """Each final pass gets its share of the time, by what its kind takes a sample; what one leaves goes to the rest."""
    passes = [Pass("", "val", 10), Pass("test", "test", 100), Pass("ranking", "test", 10, ranked=True)]
    pace = Pace(seconds={("", False): 0.1, ("", True): 3.0}, left=passes[1:])
    assert pace.needed(passes) == pytest.approx(MARGIN * (1 + 10 + 30))
    now = time.perf_counter()
    pace.ends = now + 80
    assert pace.begin("test") - now == pytest.approx(80 / 4, abs=0.1)
    pace.end(passes[1], now - 20, answered=40)
    assert pace.seconds["", False] == pytest.approx(0.5, abs=0.01) and pace.cut == {"test": "40 of 100"}
    assert [pace.fitting(passes[1], until, 64) for until in (None, now - 1, now + 5.6, now + 99)] == [64, 1, 10, 64]
    assert pace.begin("ranking") - now == pytest.approx(80, abs=0.1) and pace.left == []


def test_the_bar_moves_every_second_and_says_nothing_of_the_first_step(capsys):
    """Its speed is that of the last seconds, from the end of the first step on."""
    steps = iter([(0.5, 0), (1.5, 64), (2.5, 64), (3.5, 192), (20.5, 192), (21.5, 256)])
    progress = train.Progress()
    bar = Bar(lambda: 0.5, progress, [], "questions")
    bar.first, speeds = 0, []
    assert bar.interval == 0.5, "the first step is awaited"
    for now, progress.samples in steps:
        speeds.append(bar.speed(now))
    assert bar.interval == 1.0
    assert speeds == [None, None, None, 64.0, 64.0, pytest.approx(64 / 18)]
    with Bar(lambda: 0.5, train.Progress(step=1), [{"step": 1, "loss": 9.0, "token_accuracy": 0.0}], "questions"):
        time.sleep(2.5)
    shown = capsys.readouterr().err.split("\r")
    assert [f"00:0{second}<" in "".join(shown) for second in (0, 1, 2)] == [True] * 3
    assert "50.0%" in shown[-1] and "step 1" in shown[-1] and "loss" not in shown[-1] and "/s" not in "".join(shown)
    with Bar(lambda: 0.5, train.Progress(step=2), [{"step": 2, "loss": 9.0, "token_accuracy": 0.5}], "pairs"):
        pass
    assert "loss 9.000, right 0.50" in capsys.readouterr().err, "of whatever the loss counts, tokens or not"


def test_a_bar_is_looked_at_twice_a_second():
    """So it moves at least once in each, and shows the first step soon, on a clock that the test hands out."""
    waited, drawn = [], []
    bar = Redrawn(lambda: drawn.append(len(waited)))
    bar.over = SimpleNamespace(wait=lambda seconds: waited.append(seconds) or len(waited) == 3)
    bar._run()
    assert waited == [0.5] * 3 and drawn == [1, 2]


@pytest.mark.parametrize("changes", [{"connector": "mean", "stem": "linear", "accumulate": 4}, {"freeze": "encoders"}])
def test_options_reach_the_model(data, tmp_path, changes, capsys):
    options = small_options(data, tmp_path / "run", steps=1, eval_questions=8, samples=1, **changes)
    train.main(options)
    model = systems.load(tmp_path / "run").model
    assert type(model.connector) is connector_class(options.connector)
    assert isinstance(model.image.patch_embed, ConvStem) == (options.stem == "conv")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("trainable: "))
    assert ("image 0 of" in line) == (options.freeze == "encoders")


def test_val_split_auto_holds_out_images(data, tmp_path):
    """Training questions and validation questions share no image; the figures can come from the val split."""
    options = small_options(data, tmp_path / "run", val_split="auto", val_fraction=0.3, test_split="val")
    parts = VQASystem.read(options).samples
    images = {name: {s.image_id for s in samples} for name, samples in parts.items()}
    assert not images["train"] & images["val"] and images["val"] and images["train"]
    assert not images["test"] & (images["train"] | images["val"]), "the val split of the files is the test set"


# ------------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize("same", [False, True])
def test_the_final_figures_can_be_those_of_some_images(data, tmp_path, same):
    """The first ones, with all their questions; also where the test split is the val split, which stays whole."""
    split = "val" if same else "test"
    samples = VQASystem.read(small_options(data, tmp_path / "run", test_images=3, test_split=split)).samples
    whole = read_vqa(data, split).samples
    first = list(dict.fromkeys(s.image_id for s in whole))[:3]
    assert samples["test"] == [s for s in whole if s.image_id in first] != whole
    assert samples["val"] == read_vqa(data, "val").samples


def test_flags_win_over_the_preset_and_the_preset_over_defaults():
    options = train.read_command_line(["--preset", "book", "--data", "x", "--questions-per-step", "10", "--no-compile"])
    assert (options.questions_per_step, options.optimizer, options.minutes) == (10, PRESETS["book"]["optimizer"], 10.0)
    assert train.read_command_line([]).optimizer == "muon"
    assert train.read_command_line(["--steps", "5"]).minutes is None


OUTLIVES = """
import sys, time, train
from vqa_scratch.training.progress import Bar
with Bar(lambda: 0.5, train.Progress(step=1), [], "questions"):
    time.sleep(2.5)
open(sys.argv[1], "w").write("done")
"""


def test_a_run_outlives_the_reader_of_its_output(tmp_path):
    """A bar that cannot be written held a lock of tqdm for ever: the run neither ended nor obeyed a signal."""
    command = [sys.executable, "-c", OUTLIVES, str(tmp_path / "done")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=Path(train.__file__).parent) as process:
        process.stderr.read(1)  # the bar is there
        process.stderr.close()
        try:
            process.wait(timeout=30)
        finally:
            process.kill()
    assert (tmp_path / "done").read_text() == "done"


def test_every_preset_has_a_run_folder_of_its_own():
    """So that the recipes can follow each other."""
    flags = {"book": ["--data", "x"], "vilt-b32": ["--data", "x"], "coco": ["--data", "x", "--image-model", "y"]}
    folders = [train.read_command_line(["--preset", name, *flags.get(name, [])]).out for name in PRESETS]
    assert len(set(folders)) == len(PRESETS) == 9


def test_every_field_is_a_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        train.read_command_line(["--help"])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in page for name in rules_of(VQAOptions))


def test_a_flag_of_another_system_says_whose_it_is():
    """Nothing is read and ignored."""
    with pytest.raises(UserError, match="^--connector means nothing here: it is a flag of --preset shapes$"):
        train.read_command_line(["--preset", "vilt", "--connector", "mean"])
    with pytest.raises(UserError, match="^--fusion means nothing here: it is a flag of --preset shapes$"):
        train.read_command_line(["--preset", "caption", "--fusion", "mean"])  # its old name
    with pytest.raises(UserError, match="^--captions-per-image means nothing here: it is a flag of --preset caption$"):
        train.read_command_line(["--captions-per-image", "3"])


BOOK = "--preset book --data x"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (f"{BOOK} --width 64", "--width means nothing with --preset book: it goes with --preset shapes$"),
        (f"{BOOK} --width 128", "--width means nothing with --preset book"),  # its default, but given
        (
            f"{BOOK} --init random --stem linear --heads 2",
            "--heads, --stem mean nothing with --preset book: they go with --preset shapes$",
        ),
        (
            f"{BOOK} --init random --decoder-model gpt2",
            "--decoder-model means nothing with --init random: it goes with --init pretrained$",
        ),
        (
            "--init pretrained",
            "--init pretrained means nothing with --preset shapes: it goes with --preset",
        ),
        (
            "--image-model x --text-model y",
            "--image-model, --text-model mean nothing with --preset shapes: they go with",
        ),
        (
            "--preset coco --data x --image-model y --width 64",
            "--width means nothing with --preset coco: it goes with --preset caption$",
        ),
        ("--preset caption --image-model x", "--image-model means nothing with --init random"),
        (
            "--queries 4",
            "--queries means nothing with --connector tokens: it goes with --connector qformer or resampler$",
        ),
        (
            "--connector patches --stem linear --image-layers 2",
            "--image-layers, --stem mean nothing with --connector patches$",
        ),
        (
            "--connector patches --freeze all --feature-cache",
            "--feature-cache means nothing with --connector patches$",
        ),
        (
            f"{BOOK} --connector patches --init pretrained --image-model x",
            "--image-model means nothing with --connector patches$",
        ),
        ("--val-fraction 0.1", "--val-fraction means nothing with --val-split val: it goes with --val-split auto$"),
        (
            "--optimizer adamw --matrix-learning-rate 1",
            "--matrix-learning-rate means nothing with --optimizer adamw: it goes with --optimizer muon$",
        ),
        (
            "--freeze decoder --feature-cache",
            "--feature-cache means nothing with --freeze decoder: it goes with --freeze encoders, .* or all$",
        ),
        ("--preset caption --decoder-model gpt2", "--decoder-model means nothing with --init random"),
        (
            "--preset caption --init pretrained --image-model x --decoder-model y --vocabulary 99 --heads 2",
            "--heads, --vocabulary mean nothing with --init pretrained",
        ),
        ("--preset vilt --model x --width 64", "--width means nothing with --model x: it goes without --model$"),
    ],
)
def test_a_flag_that_nothing_would_read_is_refused(argv, message):
    with pytest.raises(UserError, match=f"^{message}"):
        train.read_command_line(argv.split())


@pytest.mark.parametrize(
    "argv",
    [
        "--width 64 --stem linear --init random",
        f"{BOOK} --decoder-model y",
        f"{BOOK} --init random --steps 1",
        "--preset coco --data x --image-model y --decoder-model z",
        "--preset coco --data x --init random --vocabulary 99",
        "--preset vilt --width 64",
        "--connector qformer --queries 4",
        "--connector resampler --queries 4",
        "--connector patches --patch-size 16 --freeze decoder",
        "--val-split auto --val-fraction 0.1",
        "--resume --feature-cache",  # the run may have been begun with frozen encoders; `settle` knows
    ],
)
def test_a_flag_that_something_reads_is_not(argv):
    train.read_command_line(argv.split())


def test_a_near_preset_is_named():
    with pytest.raises(UserError, match="'boko' is not one of .*; did you mean 'book'?"):
        train.read_command_line(["--out", "x", "--preset", "boko"])


def test_options_round_trip(tmp_path):
    options = VQAOptions(data=tmp_path, steps=3, connector="mean")
    assert from_json(VQAOptions, json.loads(json.dumps(to_json(options))), "here") == options
