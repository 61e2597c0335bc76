"""--seeds: several runs that differ in their seed alone, each exactly the run of that seed."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time

import pytest
from test_resume import assert_same_state
from vqa_helpers import ROOT, small_data, small_flags

from train import main
from vqa_scratch.errors import UserError
from vqa_scratch.systems.options import read_command_line
from vqa_scratch.systems.seeds import flags_of, run_seeds


def start(*flags):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "train.py", *map(str, flags)], cwd=ROOT, **pipes)


def ended(*flags):
    """(exit code, stdout, stderr)."""
    process = start(*flags)
    return (*process.communicate()[::-1], process.returncode)[::-1]


def test_each_is_the_run_of_its_seed(tmp_path):
    """Stopped in the first run, which goes on to the bits of a run that was left alone; then they are only shown."""
    out, alone = tmp_path / "runs", tmp_path / "alone"
    flags = small_flags(small_data(tmp_path / "data"), out, steps=8, save_every=2, eval_every=4, seed=3, samples=1)
    process = start(*flags, "--seeds", 2)
    deadline = time.monotonic() + 300
    while not (out / "seed3" / "checkpoints" / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and "0 of 2 seeds are done" in said, errors
    assert not (out / "seed3" / "summary.json").exists() and not (out / "seed4").exists()

    again = ("--out", out, "--seeds", 2, "--resume")
    code, said, errors = ended(*again)
    assert code == 0 and "resuming after step" in said, errors
    assert ended(*flags, "--out", alone)[0] == 0
    assert_same_state(out / "seed3", alone)
    config = json.loads((out / "seed4" / "config.json").read_text())["train"]
    assert config["seed"] == 4 and config["steps"] == 8 and config["seeds"] is None

    runs = [json.loads((out / f"seed{seed}" / "summary.json").read_text()) for seed in (3, 4)]
    record = json.loads((out / "seeds.json").read_text())
    values = [run["validation_accuracy"] for run in runs]
    figures = record["figures"]["validation_accuracy"]
    assert figures["mean"] == pytest.approx(statistics.fmean(values))
    assert figures["median"] == pytest.approx(statistics.median(values))
    assert figures["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)  # of a sample of two
    assert [run["seed"] for run in record["runs"]] == [3, 4] and "baselines/shuffled_images" not in said
    assert f"validation_accuracy      {figures['mean']:10.4f} {figures['std']:10.4f} {figures['median']:10.4f}" in said
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    before = {path: path.stat().st_mtime_ns for path in out.glob("seed*/**/*") if path.is_file()}
    code, said, _ = ended(*again)
    assert code == 0 and "validation_accuracy" in said and "resuming" not in said
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("seed*/**/*") if path.is_file()}

    for more, message in (
        ((), "already holds runs; add --resume"),
        (None, f"{out} holds the runs of --seeds; add --seeds to go on"),
        (("--resume", "--width", 48), f"{out} was started with --width 32, not 48"),
    ):
        argv = ["--out", str(out), "--seed", "3", *(() if more is None else ("--seeds", "2", *map(str, more)))]
        with pytest.raises(UserError) as caught:
            main(read_command_line(argv))
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_be(tmp_path, monkeypatch):
    def refused(message, *flags):
        with pytest.raises(UserError, match=message):
            run_seeds(read_command_line(["--out", str(tmp_path / "runs"), "--seeds", "3", *flags]), "train.py")

    refused("--seeds takes no \\+N: make each run longer by itself, with --out", "--resume", "--steps", "+3")
    refused("holds no runs of --seeds to go on with", "--resume")
    refused("--seed 4294967294 leaves no room for --seeds 3", "--seed", "4294967294")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == []
    (tmp_path / "runs" / "config.json").write_text('{"program": "train.py"}')
    refused("is a run itself")
    monkeypatch.setattr(os, "environ", os.environ | {"RANK": "0"})
    refused("leave out torchrun")


def test_the_flags_of_a_run(tmp_path):
    """They give the options back, whatever their types."""
    given = (
        "--preset book --data a,b --no-image-cache --compile --steps 7 --max-grad-norm inf --val-split auto --seeds 2"
    )
    options = read_command_line(given.split())
    flags = flags_of(options, 5, tmp_path / "-x")
    again = read_command_line(flags)
    differing = {name for name, value in vars(again).items() if value != getattr(options, name)}
    assert differing - {"given"} == {"seed", "out", "seeds"} and again.seed == 5 and again.seeds is None
    assert "--resume" not in flags
    (tmp_path / "-x").mkdir()
    (tmp_path / "-x" / "config.json").touch()
    assert flags_of(options, 5, tmp_path / "-x") == [*flags, "--resume"]
