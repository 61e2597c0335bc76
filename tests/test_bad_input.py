"""Bad input to `train.py`: one clear line, exit code 2, and nothing lost."""

import ctypes
import functools
import json
import os
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from test_resume import at_step
from vqa_helpers import Ended, Started, small_flags, train_program

import train
from vqa_scratch.command_line import run_program
from vqa_scratch.data.vqa_files import annotations_name, questions_name
from vqa_scratch.systems.assembly import grid_positions
from vqa_scratch.training.checkpoint import load_checkpoint
from vqa_scratch.training.progress import read_metrics


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """Stopped after step 6 of 10 by a kill, with a checkpoint of step 4."""
    out = tmp_path_factory.mktemp("runs") / "run"
    started(out, flags(data, out), functools.partial(at_step, 7))
    assert load_checkpoint(out / "checkpoints" / "last.pt")["state"]["step"] == 4
    return out


def flags(data: Path, out: Path, **changes) -> list[str]:
    return small_flags(data, out, **{"steps": 10, "save_every": 4, "eval_every": 3} | changes)


def started(out: Path, argv: list[str], prepare=None) -> Ended:
    return Started(train_program, argv, prepare).end()


def said(argv: list[str], capsys) -> str:
    """What `train.py` says about a command line that must fail: exit code 2, and one line that this returns."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_program(lambda: train.main(train.read_command_line(argv)))
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]  # bars aside
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def copy_of(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "run"))


def files_of(run: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "shape"], "did you mean 'shapes'?"),
        (["--preset", "zzz"], "'zzz' is not one of 'shapes', 'book'"),
        (["--minuts", "3"], "no such flag: --minuts; did you mean --minutes?"),
        (["--frobnicate"], "no such flag: --frobnicate"),
        (["--steps", "many"], "'many' is not a valid integer"),
        (["--steps", "0"], "--steps must be at least 1, not 0"),
        (["--minutes", "-1"], "--minutes must be above 0, not -1.0"),
        (["--steps", "3", "--minutes", "1"], "give --minutes or --steps, not both"),
        (["--steps", "+3"], "--steps +3 goes with --resume"),
        (["--resume", "--steps", "+3", "--minutes", "+1"], "give --steps or --minutes, not both"),
        (["--resume", "--steps", "+3", "--minutes", "1"], "give --steps or --minutes, not both"),
        (["--resume", "--steps", "+0"], "the N of --steps +N must be at least 1, not 0"),
        (["--resume", "--minutes=+nan"], "the N of --minutes +N must be a finite number, not nan"),
        (["--resume", "--minutes", "+-1"], "the N of --minutes +N must be above 0, not -1.0"),
        (["--resume", "--steps", "+x"], "'x' is not a valid integer"),
        (["--resume", "--test-images", "+5"], "'--test-images': '+5' has a plus sign"),
        (["--questions-per-step", "10", "--accumulate", "3"], "does not divide into --accumulate 3"),
        (["--decay-from", "1"], "--decay-from must be at least 0 and below 1, not 1.0"),
        (["--minutes", "nan"], "--minutes must be a finite number, not nan"),
        (["--learning-rate", "inf"], "--learning-rate must be a finite number, not inf"),
        (["--seed", "-1"], "--seed must be at least 0 and below 4294967296, not -1"),
        (["--seed", "4294967296"], "--seed must be at least 0 and below 4294967296, not 4294967296"),
        (["--warmup-steps", "-1"], "--warmup-steps must be at least 0, not -1"),
        (["--eval-questions", "0"], "--eval-questions must be at least 1, not 0"),
        (["--test-images", "0"], "--test-images must be at least 1, not 0"),
        (["--val-split", "auto", "--val-fraction", "1"], "--val-fraction must be above 0 and below 1, not 1.0"),
        (["--width", "0"], "--width must be at least 1, not 0"),
        (["--preset", "book"], "--preset book needs --data, the folder with the VQA v2 files"),
        (["--connector", "means"], "did you mean 'mean'?"),
        (["--preset", "book", "--image-model", ""], "--image-model must not be empty; leave it out"),
        (["--freeze", "encoder"], "did you mean 'encoders'?"),
        (["--precision", "fp16", "--device", "cpu", "--steps", "1"], "--precision fp16 needs a CUDA device"),
        (["extra"], "extra"),
    ],
)
def test_flags(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no run lies in the folder that --out names by default
    assert message in said(argv, capsys)


def test_sizes_that_do_not_fit(data, tmp_path, capsys):
    assert "width 30 does not divide into 4 heads" in said(flags(data, tmp_path / "r", width=30, heads=4), capsys)
    assert "power of two" in said(flags(data, tmp_path / "r", patch_size=1), capsys)
    grid_positions((33, 32), 8)
    assert "note: an image has 1,056 patches" in capsys.readouterr().err
    grid_positions((32, 32), 8)
    assert not capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ data


def changed_data(data: Path, folder: Path, name: str, content: bytes | None) -> Path:
    """A data folder in which one file is missing or holds something else."""
    folder.mkdir()
    for path in data.iterdir():
        if path.name != name:
            (folder / path.name).symlink_to(path)
        elif content is not None:
            (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", [questions_name("train2014"), annotations_name("val2014")])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "another"])
def test_json_files(data, tmp_path, capsys, name, damage):
    whole = (data / name).read_bytes()
    content = {"missing": None, "cut": whole[: len(whole) // 2], "empty": b"", "another": b"[1, 2]"}[damage]
    broken = changed_data(data, tmp_path / "data", name, content)
    line = said(flags(broken, tmp_path / "run"), capsys)
    words = {"missing": "not found", "cut": "is not valid JSON", "empty": "is not valid JSON", "another": "no list"}
    assert name in line and words[damage] in line
    assert not (tmp_path / "run").exists()


def test_no_data_folder(tmp_path, capsys):
    assert "is not a folder" in said(flags(tmp_path / "nowhere", tmp_path / "run"), capsys)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"GIF", "is not an image"), ("half", "truncated")]
)
def test_an_unreadable_image_is_named(data, tmp_path, capsys, cached, content, message):
    """Whether images are read before the first step or while training goes on."""
    broken = changed_data(data, tmp_path / "data", "train2014", None)
    shutil.copytree(data / "train2014", broken / "train2014")
    victim = sorted((broken / "train2014").iterdir())[5]
    victim.write_bytes(victim.read_bytes()[:150] if content == "half" else content)
    argv = flags(broken, tmp_path / "run")
    line = said([f for f in argv if not (cached and f == "--no-image-cache")], capsys)
    assert victim.name in line and message in line
    if content == "half":  # only decoding tells
        again = [*flags(broken, tmp_path / "again", steps=1, eval_every=1), "--verify-images"]
        train.main(train.read_command_line(again))
        assert f"the image cannot be read (first: {victim.name})" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ run folders


def test_a_run_is_not_overwritten(run, data, capsys):
    before = files_of(run)
    assert "already holds a run; add --resume" in said(flags(data, run), capsys)
    assert files_of(run) == before


def test_a_released_model_is_not_overwritten(data, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert "is not of a run, as the folder of a released model" in said(flags(data, tmp_path), capsys)
    assert files_of(tmp_path) == {tmp_path / "config.json": b'{"model_type": "vit"}'}


def test_a_run_of_another_preset(run, data, tmp_path, capsys):
    argv = ["--preset", "book", "--data", str(data), "--out", str(run), "--resume"]
    assert "is a run of preset shapes, not book" in said(argv, capsys)
    (tmp_path / "rlhf").mkdir()
    (tmp_path / "rlhf" / "config.json").write_text('{"preset": "mini-news"}')
    assert "is not the config of a run" in said(["--out", str(tmp_path / "rlhf"), "--resume"], capsys)


def test_a_run_goes_on_with_its_options(run, data, capsys):
    """A flag that would be without effect is refused; one that repeats the run's value is not."""
    line = said([*flags(data, run, width=64, steps=20), "--resume"], capsys)
    assert "was started with --steps 10, not 20, --width 32, not 64" in line
    line = said([*flags(data, run), "--resume", "--feature-cache"], capsys)
    assert "--feature-cache means nothing with --freeze nothing: it goes with --freeze encoders, " in line


def test_nothing_to_resume(tmp_path, capsys):
    assert "no run folder" in said(["--out", str(tmp_path / "none"), "--resume"], capsys)
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in said(["--out", str(tmp_path / "empty"), "--resume"], capsys)


@pytest.mark.parametrize("damage", ["cut", "another shape", "no tensors"])
def test_a_damaged_checkpoint(run, data, tmp_path, capsys, damage):
    out = copy_of(run, tmp_path)
    last = out / "checkpoints" / "last.pt"
    if damage == "cut":
        last.write_bytes(last.read_bytes()[:5_000])
    else:
        state = load_checkpoint(last)
        state["model"]["decoder.norm.weight"] = torch.zeros(7)
        if damage == "no tensors":
            state["model"] = {}
        torch.save(state, last)
    line = said([*flags(data, out), "--resume"], capsys)
    expected = {
        "cut": "is not a whole torch file",
        "another shape": "decoder.norm.weight is (7,), the model has (32,)",
        "no tensors": "missing image.cls_token",
    }
    assert expected[damage] in line


def test_a_config_that_is_not_whole(run, data, tmp_path, capsys):
    out = copy_of(run, tmp_path)
    text = (out / "config.json").read_text()
    (out / "config.json").write_text(text[:100])
    assert "config.json is not valid JSON" in said([*flags(data, out), "--resume"], capsys)
    values = json.loads(text)
    values["train"]["wdith"] = 3
    (out / "config.json").write_text(json.dumps(values))
    assert "unknown fields wdith" in said([*flags(data, out), "--resume"], capsys)
    values["train"] = {}
    (out / "config.json").write_text(json.dumps(values))
    assert "is a run of preset train.py, not shapes" in said([*flags(data, out), "--resume"], capsys)


# ------------------------------------------------------------------------------------------------ disks


def fill_disk(limit: int) -> None:
    """From now on no file can grow beyond `limit` bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    ("limit", "name"), [(200_000, "model.safetensors"), (500_000, "last.pt"), (100, "metrics.jsonl")]
)
def test_a_full_disk(run, data, tmp_path, limit, name):
    """The file that could not be written is named, what was there is whole, and the run can go on later."""
    out = copy_of(run, tmp_path)
    weights, last = out / "model.safetensors", out / "checkpoints" / "last.pt"
    assert 200_000 < weights.stat().st_size < 500_000 < last.stat().st_size, "sizes that the limits rely on"
    before = load_checkpoint(last)["state"]
    ended = started(out, [*flags(data, out), "--resume"], functools.partial(full_disk_at, 6, limit))
    assert ended.code == 2 and len(ended.errors) == 1, ended.err
    assert "cannot write" in ended.errors[0] and name in ended.errors[0]
    assert load_checkpoint(last)["state"] == before and weights.stat().st_size > 200_000
    assert not list(out.rglob("*.tmp"))
    ended = started(out, [*flags(data, out), "--resume"])
    assert ended.code == 0, ended.err
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row] == list(range(1, 11))


def full_disk_at(step: int, limit: int) -> None:
    from vqa_scratch.systems.scoring import Report
    from vqa_scratch.systems.vqa import VQASystem

    # Better at every evaluation, so that the weights are written at each of them.
    scores = iter(range(1, 100))
    VQASystem.report = lambda self, split, *_, **__: Report(next(scores) / 100, 0.0, {}, {})
    at_step(step, functools.partial(fill_disk, limit))


def test_a_full_disk_for_the_image_cache(data, tmp_path):
    out = tmp_path / "run"
    argv = [f for f in flags(data, out) if f != "--no-image-cache"]
    ended = started(out, argv, functools.partial(fill_disk, 100_000))
    assert ended.code == 2 and len(ended.errors) == 1, ended.err
    assert "images-" in ended.errors[0] and "--no-image-cache" in ended.errors[0]
    left = [path.name for path in (tmp_path / "cache").iterdir() if not path.name.startswith("questions-")]
    assert left == [], "the questions were whole before the disk was full"


def without_privileges() -> None:
    """Root may write anywhere; without its capabilities it is a user as others are."""
    if os.geteuid() == 0:
        version, this_process = 0x20080522, 0
        assert ctypes.CDLL(None).capset(struct.pack("Ii", version, this_process), bytes(24)) == 0


def test_a_read_only_run_folder(run, data, tmp_path):
    """Nothing in it changes."""
    out = copy_of(run, tmp_path)
    before = files_of(out)
    paths = [out, *out.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    ended = started(out, [*flags(data, out), "--resume"], without_privileges)
    for path in paths:
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert ended.code == 2 and len(ended.errors) == 1, ended.err
    assert str(out) in ended.errors[0] and "Permission denied" in ended.errors[0]
    assert files_of(out) == before


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_run_folder_at_or_below_a_file(tmp_path, place, capsys):
    """Known before the data are read: there are none here."""
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'} is a file" in said(flags(tmp_path / "nowhere", tmp_path / place), capsys)


# ------------------------------------------------------------------------------------------------ before the work


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--width 100 --heads 3", "width 100 does not divide into 3 heads"),
        ("--patch-size 7", "image size 64 is not a multiple of the patch size 7"),
        ("--connector prefix --no-question-prompt", "gives the decoder the image alone"),
        ("--max-question-tokens 2", "--max-question-tokens must be at least 3, not 2"),
        ("--train-split nowhere --test-split elsewhere", "the built-in data set has no split nowhere, elsewhere; give"),
        ("--preset vilt --patch-size 16 --image-size 8", "image size 8 is not a multiple of the patch size 16"),
        ("--preset caption --width 30 --heads 2", "--width 30 is not divisible by 4"),
        ("--preset caption --vocabulary 100", "byte-level BPE has at least 259 tokens, not 100"),
        ("--preset caption --test-split elsewhere", "the built-in data set has no split elsewhere"),
    ],
)
def test_what_the_options_can_tell_is_said_before_anything_is_drawn(tmp_path, capsys, flags, message):
    argv = [*flags.split(), "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    assert message in said(argv, capsys)
    assert not list(tmp_path.iterdir()), "nothing was drawn"


@pytest.mark.parametrize("preset", ["shapes", "vilt", "caption"])
def test_all_missing_split_files_are_named_at_once(data, tmp_path, capsys, preset):
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    lost = [annotations_name("train2014"), questions_name("val2014"), questions_name("test2015")]
    more = ["--question-share", "0.5"] if preset == "caption" else []
    for name in lost:
        (folder / name).unlink()
    argv = ["--preset", preset, "--data", str(folder), "--out", str(tmp_path / "run"), "--steps", "1", *more]
    line = said(argv, capsys)
    assert all(name in line for name in lost) and "lacks the files of 3 splits" in line
    if preset == "caption":
        for path in folder.glob("scenes_*.json"):
            path.unlink()
        line = said(argv, capsys)
        assert "no captions of 3 splits" in line and all(f"captions_{s}.json" in line for s in ("train", "val", "test"))
