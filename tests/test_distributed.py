"""Several ranks against one process: the same weights, steps and figures; what ends one of them ends all."""

import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_resume import at_step, die, send
from vqa_helpers import ROOT, Ended, Started, small_flags, small_options, train_program

import train
from vqa_scratch.errors import UserError
from vqa_scratch.training.checkpoint import load_checkpoint

STEPS, SAVE, EVALUATE = 6, 2, 5
# Name -> options. 32 questions are 4 images of 8; some steps have 2 images. In "empty" every step is a single image, so
# one of two ranks never has a part.
CASES = {
    "muon": {"accumulate": 2},
    "empty": {"questions_per_step": 8, "optimizer": "adamw", "freeze": "encoders"},
    "fsdp": {"accumulate": 2, "parallel": "fsdp"},  # "muon" in parts
}


def flags(data: Path, out: Path, **changes) -> list[str]:
    return small_flags(data, out, **{"steps": STEPS, "save_every": SAVE, "eval_every": EVALUATE} | changes)


def in_double() -> None:
    """float64, where sums in another order leave no trace: in float32 Adam makes steps of rounding errors."""
    from vqa_scratch.data.images import ImageProcessor
    from vqa_scratch.models.vqa import VQAModel

    make, normalize = VQAModel.__init__, ImageProcessor.normalize

    def doubled(self, *parts):
        make(self, *parts)
        self.double()

    VQAModel.__init__ = doubled
    ImageProcessor.normalize = lambda self, pixels: normalize(self, pixels).double()


def prepared(*prepare) -> None:
    in_double()
    for each in prepare:
        each()


def on_rank(rank: int, then) -> None:
    if int(os.environ["RANK"]) == rank:
        then()


def one(argv: list[str], *prepare) -> Ended:
    return Started(train_program, argv, functools.partial(prepared, *prepare)).end()


def two(argv: list[str], *prepare) -> list[Ended]:
    return run_ranks(2, train_program, argv, functools.partial(prepared, *prepare))


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """Runs of one process, made when first asked for: name of a case -> folder."""

    @functools.cache
    def run(name: str) -> Path:
        out = tmp_path_factory.mktemp("alone") / name
        ended = one(flags(data, out, **CASES[name]))
        assert ended.code == 0, ended.err
        return out

    return run


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(out: Path, other: Path) -> None:
    """Weights and optimizer state after the last step, every logged figure, and the final report."""
    ours, theirs = (load_checkpoint(folder / "checkpoints" / "last.pt") for folder in (out, other))
    assert ours["model"].keys() == theirs["model"].keys()
    for name, tensor in theirs["model"].items():
        assert tensor.dtype == torch.float64
        # Logits meet the loss in float32, token by token; float64 sums after that differ in the last digits.
        torch.testing.assert_close(ours["model"][name], tensor, rtol=0, atol=1e-9, msg=name)
    for mine, its in zip(ours["optimizers"], theirs["optimizers"], strict=True):
        for index, state in its["state"].items():
            for key, value in state.items():
                torch.testing.assert_close(mine["state"][index][key], value, rtol=1e-6, atol=1e-9)
    for state in (ours["state"], theirs["state"]):
        assert state.pop("seconds") > 0
    assert ours["state"] == theirs["state"]
    timing = {"seconds", "samples_per_second"}
    for a, b in zip(rows(out), rows(other), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - timing:
            assert a[key] == (pytest.approx(b[key], rel=1e-6)), key
    figures = [json.loads((folder / "summary.json").read_text()) for folder in (out, other)]
    for key in ("accuracy", "holdout_accuracy", "accuracy_by_family", "questions_seen", "steps"):
        assert figures[0][key] == figures[1][key]
    assert figures[0]["baselines"] == pytest.approx(figures[1]["baselines"])


# --------------------------------------------------------------------------------------------- the same as one


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process(data, alone, tmp_path, name):
    out = tmp_path / "run"
    main, other = two(flags(data, out, **CASES[name]))
    assert (main.code, other.code) == (0, 0), main.err + other.err
    assert_same_run(out, alone("muon" if name == "fsdp" else name))
    assert f"2 ranks, {CASES[name].get('parallel', 'ddp')}" in main.out
    assert (other.out, other.err) == ("", ""), "one rank speaks"
    assert "Warning" not in main.err


@pytest.mark.parametrize("parallel", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_gradient_checkpointing_on_two_ranks(data, alone, tmp_path, parallel):
    """Blocks that are computed again, in the middle of the exchange of gradients, with accumulation."""
    out = tmp_path / "run"
    main, other = two([*flags(data, out, **CASES["muon"] | {"parallel": parallel}), "--gradient-checkpointing"])
    assert (main.code, other.code) == (0, 0), main.err + other.err
    assert_same_run(out, alone("muon"))


# What tests/test_systems.py does not say: the other systems and connectors with a part of every tensor on each rank.
OTHERS = {
    "vilt": "--preset vilt --layers 1 --min-answer-count 2 --questions-per-step 32 --eval-questions 40",
    "caption": "--preset caption --decoder-layers 1 --image-width 16 --captions-per-step 16 --questions-per-step 32",
    "prefix": "--connector prefix --image-layers 1 --decoder-layers 1 --questions-per-step 32 --eval-questions 40",
    "patches": "--connector patches --decoder-layers 1 --questions-per-step 32 --eval-questions 40",
    "resampler": "--connector resampler --image-layers 1 --decoder-layers 1 --questions-per-step 32 --eval-every 3",
    "qformer": "--connector qformer --image-layers 1 --decoder-layers 1 --questions-per-step 32 --eval-questions 40",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_other_systems_in_parts(data, tmp_path, name):
    """Losses of the first steps and the final accuracy, in float32, so less exactly than above."""
    argv = [*OTHERS[name].split(), "--width", "32", "--heads", "2", "--warmup-steps", "2"]
    argv += "--steps 3 --eval-every 3 --log-every 1 --samples 4 --device cpu --precision fp32 --no-image-cache".split()
    argv += ["--optimizer", "adamw", "--data", str(data), "--cache", str(tmp_path / "cache")]

    def told(out: Path, ended: list[Ended]) -> tuple[list[float], float]:
        assert [process.code for process in ended] == [0] * len(ended), ended[0].err + ended[-1].err
        assert "Warning" not in ended[0].err
        summary = json.loads((out / "summary.json").read_text())
        return [row["loss"] for row in rows(out) if "loss" in row], summary["accuracy"]

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    losses, accuracy = told(whole, [Started(train_program, [*argv, "--out", str(whole)]).end()])
    ours = told(parts, run_ranks(2, train_program, [*argv, "--out", str(parts), "--parallel", "fsdp"]))
    assert ours[0] == pytest.approx(losses, rel=1e-4) and ours[1] == pytest.approx(accuracy, abs=0.05)


@pytest.mark.parametrize(("first", "then"), [(two, one), pytest.param(one, two, marks=pytest.mark.slow)])
def test_another_number_of_ranks_goes_on(data, alone, tmp_path, first, then):
    """SIGTERM reaches one process in step 3: all stop after it with one checkpoint, and the others go on from there."""
    out = tmp_path / "run"
    argv = flags(data, out, **CASES["muon"])
    stop = functools.partial(at_step, 3, functools.partial(send, int(signal.SIGTERM)))
    ended = first(argv, stop if first is one else functools.partial(on_rank, 1, stop))
    for process in [ended] if first is one else ended:
        assert process.code == 128 + signal.SIGTERM and process.errors == [], process.err
    assert load_checkpoint(out / "checkpoints" / "last.pt")["state"]["step"] == 3
    ended = then([*argv, "--resume"])
    for process in [ended] if then is one else ended:
        assert process.code == 0, process.err
    assert_same_run(out, alone("muon"))


def strange_clock() -> None:
    """A clock that runs a billion times too fast."""
    import time

    clock, began = time.perf_counter, time.perf_counter()
    time.perf_counter = lambda: began + 1e9 * (clock() - began)


def test_the_main_ranks_clock_decides(data, tmp_path):
    """Under --minutes the other rank's clock is off; both take the same steps at the same learning rates."""
    out = tmp_path / "run"
    argv = flags(data, out, steps=None, minutes=0.1, eval_every=1000)
    ended = two(argv, functools.partial(on_rank, 1, strange_clock))
    assert [process.code for process in ended] == [0, 0], ended[0].err + ended[1].err
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] >= 1 and rows(out)[-1]["step"] == summary["steps"]
    assert rows(out)[-1]["seconds"] < 1e5, "the other clock's seconds are not those of the run"


# ------------------------------------------------------------------------------------------------- ends


def test_a_rank_that_dies_ends_the_run(data, alone, tmp_path):
    """Rank 1 is killed in step 4. Rank 0 says so in one line, the checkpoint of step 2 is whole and goes on."""
    out = tmp_path / "run"
    argv = flags(data, out, **CASES["muon"])
    main, other = two(argv, functools.partial(on_rank, 1, functools.partial(at_step, 4, die)))
    assert other.code == -signal.SIGKILL
    assert main.code == 2 and len(main.errors) == 1, main.err
    assert "a rank is gone without a word" in main.errors[0] and "--resume" in main.errors[0]
    assert load_checkpoint(out / "checkpoints" / "last.pt")["state"]["step"] == 2
    ended = one([*argv, "--resume"])
    assert ended.code == 0, ended.err
    assert_same_run(out, alone("muon"))


def breaking_loss(step: int) -> None:
    """The loss of that step is NaN on this rank."""
    from vqa_scratch.systems.vqa import VQASystem

    loss, calls = VQASystem.loss, []

    def broken(self, batch):
        calls.append(1)
        value, right = loss(self, batch)
        return (value * math.nan if len(calls) == step else value), right

    VQASystem.loss = broken


def test_a_loss_that_is_no_number_on_one_rank_stops_all(data, tmp_path):
    """One message, one report with the questions of both ranks, and the last good checkpoint."""
    out = tmp_path / "run"
    main, other = two(flags(data, out), functools.partial(on_rank, 1, functools.partial(breaking_loss, 4)))
    assert (main.code, other.code) == (2, 2)
    assert len(main.errors) == 1 and "the loss of step 4 is nan" in main.errors[0] and other.errors == []
    report = json.loads((out / "bad_batch.json").read_text())
    assert report["step"] == 4 and len(set(report["ids"])) == len(report["ids"]) > 8
    assert load_checkpoint(out / "checkpoints" / "last.pt")["state"]["step"] == 2


def broken_image() -> None:
    from vqa_scratch.systems.vqa import VQASystem

    def batch(self, key):
        raise UserError("picture.png is no image")

    VQASystem.batch = batch


def test_an_error_of_one_rank_names_it(data, tmp_path):
    main, other = two(flags(data, tmp_path / "run"), functools.partial(on_rank, 1, broken_image))
    assert other.code == 2 and other.errors == ["error: rank 1: picture.png is no image"]
    assert main.code == 2 and main.errors == []


def test_an_error_of_all_ranks_is_told_once(data, tmp_path):
    wrong = flags(data, tmp_path / "run", train_split="none")
    main, other = two(wrong)
    assert (main.code, other.code) == (2, 2) and len(main.errors) == 1 and other.errors == []
    main, other = two([*flags(data, tmp_path / "run"), "--bathc", "8"])
    assert (main.code, other.code) == (2, 2) and len(main.errors) == 1 and (other.out, other.err) == ("", "")


# ------------------------------------------------------------------------------------------------- flags


def test_what_does_not_go_with_fsdp(data, tmp_path):
    with pytest.raises(UserError, match="--parallel fsdp does not go with --compile"):
        small_options(data, tmp_path, parallel="fsdp", compile=True)
    with pytest.raises(UserError, match="--parallel fsdp does not go with --feature-cache"):
        small_options(data, tmp_path, parallel="fsdp", feature_cache=True, freeze="encoders")
    with pytest.raises(UserError, match="--parallel fsdp cuts the model over processes"):
        train.main(small_options(data, tmp_path / "run", parallel="fsdp"))


# ------------------------------------------------------------------------------------------------- torchrun


def under_torchrun(argv: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *argv], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_passes_a_signal_on(data, tmp_path, number):
    """Both ranks stop after the same step with one whole checkpoint, within the time that torchrun gives them."""
    out = tmp_path / "run"
    process = under_torchrun(flags(data, out, steps=100_000, save_every=100_000, eval_every=100_000))
    while not (out / "metrics.jsonl").exists() or len(rows(out)) < 5:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and said.count(f"stopped by signal {int(number)} after step") == 1
    assert load_checkpoint(out / "checkpoints" / "last.pt")["state"]["step"] == rows(out)[-1]["step"]


@pytest.mark.slow
def test_torchrun_ends_a_run_whose_rank_dies(data, alone, tmp_path):
    out = tmp_path / "run"
    argv = flags(data, out, steps=100_000, eval_every=100_000)
    process = under_torchrun(argv)
    while not (out / "checkpoints" / "last.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    os.kill(max(map(int, children.stdout.split())), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "exitcode  : -9" in errors
    assert load_checkpoint(out / "checkpoints" / "last.pt")["state"]["step"] % SAVE == 0
