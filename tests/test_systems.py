"""The contract of `systems/base.py`, for every system: built, trained, killed, gone on with, opened, asked, studied,
exported, and the same on two ranks as on one. A new system gets these tests by a line in `SYSTEMS`."""

import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from ranks import run_ranks
from run_helpers import command, make_run
from safetensors.torch import load_file
from test_resume import at_step, die, send
from voice_helpers import make_voice_run, small_recordings
from vqa_helpers import CPU, Started, small_data, train_program

from train import train_step
from vqa_scratch import systems
from vqa_scratch.data.vqa_files import annotations_name
from vqa_scratch.data.vqa_v2 import read_vqa
from vqa_scratch.errors import UserError
from vqa_scratch.options import flag
from vqa_scratch.systems.options import BY_PRESET, read_command_line
from vqa_scratch.training.checkpoint import load_checkpoint
from vqa_scratch.training.optimizers import Optimizers
from vqa_scratch.training.precision import Precision

# Name -> options. Every connector is here once, so that none can need something of a system that others do not.
VQA = {
    "preset": "shapes",
    "width": 16,
    "heads": 2,
    "image_layers": 1,
    "decoder_layers": 1,
    "questions_per_step": 32,
    "eval_questions": 16,
}
WITH_TEXT = VQA | {"text_encoder": True, "text_layers": 1, "question_loss": False}
AUGMENTED = {"flip": 0.5, "rotate": 10, "contrast": 0.1}
SYSTEMS = {
    "tokens": WITH_TEXT,
    "mean": VQA | {"connector": "mean"},
    "prefix": VQA | {"connector": "prefix"} | AUGMENTED,
    "patches": {k: v for k, v in VQA.items() if k != "image_layers"} | {"connector": "patches"},
    "qformer": VQA | {"connector": "qformer", "queries": 4, "heads": 4},
    "resampler": VQA | {"connector": "resampler", "queries": 4},
    "vilt": {
        "preset": "vilt",
        "width": 16,
        "heads": 2,
        "layers": 1,
        "min_answer_count": 2,
        "questions_per_step": 32,
        "eval_questions": 16,
        **AUGMENTED,
    },
    "caption": {
        "preset": "caption",
        "width": 16,
        "heads": 2,
        "decoder_layers": 1,
        "image_width": 16,
        "captions_per_step": 16,
        "question_share": 0.4,
        "questions_per_step": 16,
        "eval_captions": 6,
        "eval_questions": 8,
    },
    "clip": {
        "preset": "clip",
        "width": 16,
        "heads": 2,
        "image_layers": 1,
        "text_layers": 1,
        "projection": 8,
        "pairs_per_step": 8,
        **AUGMENTED,
    },
    "voice": {
        "preset": "voice",
        "width": 16,
        "heads": 2,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "utterances_per_step": 8,
        "eval_utterances": 4,
    },
}
SYSTEMS["spoken"] = {"preset": "spoken", "spoken_texts": 24, "questions_per_step": 16, "eval_questions": 8}
HEARS = {"voice"}  # systems whose samples are recordings
BEGINS: dict[str, dict[str, Path]] = {}  # the runs that a system begins with: more of its options
# What a system does not do, so that the tests of it are skipped, and why.
LACKS = {
    "clip": {
        "answers": "it says nothing about an image: it finds images and texts",
        "study": "it has no answer to explain",
        "a program that answers": "it says nothing about an image",
    },
    "voice": dict.fromkeys(("images", "answers", "study", "a program that answers"), "it hears; see test_voice.py"),
    "spoken": dict.fromkeys(("answers", "study", "a program that answers"), "it is asked aloud; see test_spoken.py"),
}
STEPS = 4
QUESTION = "what color is the square?"


def flags(name: str, data: Path, out: Path, **changes) -> list[str]:
    """The command line of a small run: checkpoints after every second step, one evaluation before the last."""
    data = data if name not in HEARS else data / "recordings"
    shared = {"data": data, "out": out, "cache": out.parent / "cache", "device": "cpu", "precision": "fp32"}
    shared |= {"steps": STEPS, "warmup_steps": 2, "eval_every": 3, "save_every": 2, "log_every": 1, "samples": 4}
    values = shared | SYSTEMS[name] | BEGINS.get(name, {}) | changes
    argv = []
    for option, value in values.items():
        argv += [flag(option if value else f"no_{option}")] if isinstance(value, bool) else [flag(option), str(value)]
    return argv if name in HEARS else [*argv, "--no-image-cache"]


def run(argv: list[str], *prepare) -> None:
    ended = Started(train_program, argv, *prepare).end()
    assert ended.code == 0, ended.err


def with_recordings(folder: Path, seed: int = 0) -> Path:
    """The data of the systems that hear, beside those about images."""
    if not (folder / "recordings").is_dir():
        small_recordings(folder / "recordings", seed)
    return folder


@pytest.fixture(scope="module", autouse=True)
def recordings(data):
    with_recordings(data)
    typed = make_run(data, data / "runs" / "vqa", width=16)
    BEGINS["spoken"] = {"start_from": typed, "voice_model": make_voice_run(data / "runs" / "voice")}


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """name -> the folder of a finished run, made when first asked for."""

    @functools.cache
    def folder(name: str) -> Path:
        out = tmp_path_factory.mktemp(name) / "run"
        run(flags(name, data, out))
        return out

    return folder


@pytest.fixture(params=SYSTEMS)
def name(request) -> str:
    return request.param


def needs(name: str, what: str) -> None:
    """Skip a test of what this system does not do."""
    if reason := LACKS.get(name, {}).get(what):
        pytest.skip(reason)


def picture(data: Path) -> Path:
    return sorted((data / "test2015").glob("*.png"))[0]


def same(a: Path, b: Path) -> None:
    """All weights and moments of two runs are equal to the bit."""
    for file in ("model.safetensors",):
        ours, theirs = load_file(a / file), load_file(b / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    ours, theirs = (load_checkpoint(folder / "checkpoints" / "last.pt") for folder in (a, b))
    for key in ("model", "optimizers"):
        assert equal(ours[key], theirs[key]), key


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_every_system_is_here():
    assert {options["preset"] for options in SYSTEMS.values()} == {
        next(p for p, c in BY_PRESET.items() if c is kind) for kind in set(BY_PRESET.values())
    }


def test_a_run_leaves_what_it_says(finished, name):
    folder = finished(name)
    summary = json.loads((folder / "summary.json").read_text())
    system = systems.load(folder)
    assert summary["steps"] == STEPS and 0 <= summary["accuracy"] <= 1 and summary[f"{system.unit}_seen"] > 0
    left = {path.name for path in folder.iterdir()}
    own = set() if system.hears else {"preprocessor_config.json"}
    assert {"config.json", "model.safetensors", "metrics.jsonl"} | own <= left


def test_steps_lower_the_loss_of_their_batch(data, tmp_path, name):
    """A loss of the wrong sign, or of something that no parameter moves, would not fall."""
    options = read_command_line([*flags(name, data, tmp_path / "run"), "--optimizer", "adamw"])
    kind = systems.find(options.preset)
    samples = kind.read(options)
    system = kind.build(options, samples, Precision("fp32", CPU))
    system.train_on(samples)
    system.trial()(Precision("bf16", CPU))
    assert all(parameter.grad is None for parameter in system.model.parameters())
    batch = system.batch(system.epoch(0)[0])
    rates = {"kind": "adamw", "learning_rate": 3e-3, "matrix_learning_rate": 0.0, "weight_decay": 0.0}
    optimizers = Optimizers(system.model, **rates)
    losses = [float(train_step(system.loss, batch, optimizers, system.precision)[0]) for _ in range(8)]
    assert losses[-1] < 0.95 * losses[0]


def test_training_images_change_only_if_they_should(data, tmp_path, name):
    """The same images for the same key, others in the next epoch; those that are only answered stay as they are."""
    needs(name, "images")
    options = read_command_line(flags(name, data, tmp_path / "run"))
    kind = systems.find(options.preset)
    system = kind.build(options, samples := kind.read(options), Precision("fp32", CPU))
    system.train_on(samples)
    key = system.epoch(0)[0]
    train = system.splits["train"]
    plain, shown = train.questions.batch(key.rows, train.images).images, system.batch(key).images
    assert torch.equal(plain, shown) != ("flip" in SYSTEMS[name] or name == "caption") and plain.dtype == shown.dtype
    assert ("names_side" in vars(system)) == (system.augment is not None), "read where nothing is mirrored"
    assert torch.equal(shown, system.batch(key).images)
    later = system.batch(key._replace(seed=(options.seed, 1, 1, 0))).images
    assert torch.equal(shown, later) == torch.equal(plain, shown)
    system.augment = lambda *args: pytest.fail("an image that is only answered was changed")
    system.evaluate()


@pytest.mark.parametrize("step", [2, 4])
def test_a_killed_run_goes_on_to_the_same_bits(finished, data, tmp_path, name, step):
    """Killed before step 2, when there is no checkpoint yet, and before step 4, behind one."""
    out = tmp_path / "run"
    ended = Started(train_program, flags(name, data, out), functools.partial(at_step, step, die)).end()
    assert ended.code == -9
    run([*flags(name, data, out), "--resume"])
    same(out, finished(name))


def test_augmentation_goes_with_images_that_are_read_each_time(data, tmp_path):
    flags_of = {
        "--feature-cache keeps one encoding": ["--freeze", "image_encoder", "--feature-cache", "--rotate", "3"],
        "a released ViLT pads its images": ["--preset", "vilt-b32", "--data", str(data), "--brightness", "0.1"],
    }
    for message, argv in flags_of.items():
        options = read_command_line([*argv, "--out", str(tmp_path / "run")])
        with pytest.raises(UserError, match=message):
            systems.find(options.preset).check(options)
    text = ["--text-encoder", "--no-question-loss", "--freeze", "text_encoder"]
    only_text = read_command_line([*text, "--feature-cache", "--rotate", "3"])
    systems.find(only_text.preset).check(only_text)


def test_a_run_goes_on_with_its_own_tokenizers(finished, data, tmp_path, name):
    """Data that changed in the meantime change the batches, never the ids of words or the list of answers.

    Of a run without hashes of its data, as older versions left it; others are refused.
    """
    out = tmp_path / "run"
    ended = Started(
        train_program, flags(name, data, out), functools.partial(at_step, 4, functools.partial(send, 15))
    ).end()
    assert ended.code == 128 + 15
    before = {path.relative_to(out): path.read_bytes() for path in out.rglob("*tokenizer*/*")}
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "data"}))
    other = with_recordings(small_data(tmp_path / "other", seed=7), seed=7)
    run([*flags(name, other, out), "--resume"])
    after = {path.relative_to(out): path.read_bytes() for path in out.rglob("*tokenizer*/*")}
    assert before and before == after
    system, first = systems.load(out), systems.load(finished(name))
    if "answers" not in LACKS.get(name, {}):
        assert system.ask(picture(data), None if name == "caption" else QUESTION)[0]
    if system.tokenizers.text is not None:
        assert system.tokenizers.question(QUESTION) == first.tokenizers.question(QUESTION)
    if "decoder" in system.tokenizers.by_name:
        assert system.tokenizers.answer("yes") == first.tokenizers.answer("yes")


def test_an_opened_run_answers_as_it_was_trained(finished, data, name):
    """`evaluate`'s way through the run gives the accuracy that the run itself reports."""
    needs(name, "answers")
    from vqa_scratch.systems.scoring import score

    folder = finished(name)
    system, summary = systems.load(folder), json.loads((folder / "summary.json").read_text())
    samples = read_vqa(data, "test").samples
    answers = system.answer(samples)
    told = summary["answers"]["accuracy"] if name == "caption" else summary["accuracy"]
    assert score(samples, answers, lambda sample: "all").accuracy == pytest.approx(told, abs=1e-6)
    sample = samples[0]
    (alone,), _ = system.ask(sample.image_path, sample.question)
    assert alone.text == answers[sample.question_id].text
    assert alone.probability == pytest.approx(answers[sample.question_id].probability, abs=1e-5)


def test_what_it_cannot_do_is_one_line(finished, data, name):
    system = systems.load(finished(name))
    preset = SYSTEMS[name]["preset"]
    if name != "caption":
        with pytest.raises(UserError, match=f"is a run of preset {preset}, which describes no images"):
            system.describe(data, "test", 3)
    if not system.writes:
        with pytest.raises(UserError, match=f"is a run of preset {preset}, which .* does not write its answers"):
            system.policy(None, torch.float32)


def test_study_shows_the_weights_that_ran(finished, data, tmp_path, name):
    """On the page and in its files, whatever the system reads the image with."""
    needs(name, "study")
    asked = [] if name == "caption" else ["--question", QUESTION]
    command("study", finished(name), "--image", picture(data), *asked, "--out", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    (answer, *_), _ = systems.load(finished(name)).ask(picture(data), QUESTION if asked else None)
    assert summary["answer"].strip() == answer.text
    assert max(summary["certificate"][k] for k in ("mass", "output", "softmax")) <= 1e-5
    assert summary["certificate"]["rows"] > 0 and (tmp_path / "out" / "report.html").stat().st_size > 10_000


def test_the_exported_readme_says_what_the_run_says(finished, data, tmp_path, capsys, monkeypatch, name):
    """Its program, run as it stands with the models of `transformers`, gives the answer of `ask`; also with a question
    of one's own, with one that is cut, and with a photo that lies on its side."""
    needs(name, "a program that answers")
    system = systems.load(finished(name))
    with torch.no_grad():  # so short a training leaves few different answers
        for parameter in system.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    system.export(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    program = re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.S)[1]
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = "" if name == "caption" else QUESTION
    for question, turned in ((shown, None), ("how many circles are there?", exif), ("is there a red " * 30, None)):
        Image.open(picture(data)).save("picture.png", exif=turned)
        own = program.replace(f'question = "{shown}"', f'question = "{question}"')
        assert (own != program) == (question != shown)
        capsys.readouterr()
        exec(compile(own, "README.md", "exec"), {"__name__": "readme"})
        (answer, *_), _ = system.ask(Path("picture.png"), question or None)
        said = capsys.readouterr().out.split("\n")[0]
        assert (said[:20].strip() if name == "vilt" else said) == (answer.text or "(nothing)")


def test_two_ranks_are_one(finished, data, tmp_path, name):
    """The same losses to 1e-6 and weights to what Adam makes of rounding errors."""
    out = tmp_path / "run"
    for ended in run_ranks(2, train_program, flags(name, data, out)):
        assert ended.code == 0, ended.err
    logs = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (out, finished(name))
    ]
    (first, *_), (alone, *_) = ([row["loss"] for row in log if "loss" in row] for log in logs)
    assert first == pytest.approx(alone, rel=1e-5)
    assert [row["samples"] for row in logs[0]] == [row["samples"] for row in logs[1]]


@pytest.mark.parametrize("name", ["tokens", "vilt", "caption"])
def test_a_run_keeps_to_its_data(name, data, finished, tmp_path):
    """They may be moved, not changed: neither one answer nor the name of one image."""
    out, moved = finished(name), Path(shutil.copytree(data, tmp_path / "moved"))
    resumed = [*flags(name, moved, out), "--resume"]
    kept = json.loads((out / "config.json").read_text())["data"]
    assert {split: hashes["samples"] > 0 for split, hashes in kept.items()} == dict.fromkeys(kept, True)
    run(resumed)
    answers = moved / annotations_name("train2014")
    content = json.loads(answers.read_text())
    for answer in content["annotations"][0]["answers"]:
        answer["answer"] = "nothing"
    answers.write_text(json.dumps(content))
    said = Started(train_program, resumed).end()
    assert said.code == 2 and "made with: train has other samples. A resumed run needs the same" in said.err, said.err
    content["annotations"].pop()
    answers.write_text(json.dumps(content))
    samples = kept["train"]["samples"]
    said = Started(train_program, resumed).end()
    assert said.code == 2 and f"train had {samples:,} samples, now {samples - 1:,}" in said.err, said.err
    assert len(said.err.splitlines()[-1]) < 300

    config = json.loads((out / "config.json").read_text())
    older = Path(shutil.copytree(out, tmp_path / "older"))
    (older / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "data"}))
    run([*flags(name, moved, older), "--resume"])


def test_the_final_figures_of_a_resumed_run_may_be_on_fewer_images(data, finished):
    out = finished("tokens")
    run([*flags("tokens", data, out, test_images=3), "--resume"])
