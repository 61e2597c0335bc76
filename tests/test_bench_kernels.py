"""The benchmarks of the kernels: every side of the loss head is held to the plain one, and no GPU is said in a row."""

import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bench import attention, logprob, loss_head, processes
from vqa_scratch.errors import UserError

ROOT = Path(__file__).parent.parent
SMALL = loss_head.Case(tokens=40, width=8, vocabulary=300)


class Here:
    """A side in this process, asked as one in its own."""

    def __init__(self, side, build, *arguments):
        self.side, self.built = side, build(*arguments)

    def ask(self, name, *arguments, **options):
        if name == "peak":  # of all sides together
            return 0.5, 1.0
        return 0.5, getattr(self.built, name)(*arguments, **options)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    @contextmanager
    def contestants(sides):
        yield [Here(side, *built) for side, built in sides.items()]

    monkeypatch.setattr(processes, "contestants", contestants)


def test_the_loss_heads_agree_and_are_all_in_the_table():
    text = loss_head.run(SMALL, 2, "the command")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")]
    assert [row[1].strip() for row in rows[1:]] == ["-" * 22, *loss_head.LOSSES, "bare products"]
    assert "not installed" in text or "needs a GPU" in text
    assert "`the command`" in text and "Ours ran in torch" in text


def test_a_wrong_gradient_is_found(monkeypatch):
    def wrong(hidden, weight, labels):
        return loss_head.plain(hidden, weight, labels) + 1e-2 * weight.square().sum()

    monkeypatch.setitem(loss_head.LOSSES, "ours", wrong)
    with pytest.raises(UserError, match="loss head, ours: loss"):
        loss_head.run(SMALL, 1, "the command")


def test_peak_memory_is_of_the_inputs_and_what_followed():
    side = loss_head.Side("plain", SMALL)
    before = side.peak()
    held = torch.ones(50_000_000)
    assert side.peak() > before - 1e-9 and side.peak() + side.before > 0.8 * held.nbytes / 1e9


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_no_gpu_is_said():
    for text in (attention.run("the command", attention.CASES[:2]), logprob.run("the command")):
        assert "not measured: no GPU" in text
    with pytest.raises(UserError, match="there is no GPU here"):
        loss_head.run(loss_head.Case(device="cuda"), 1, "the command")
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bench/gpu.sh needs bash")
    done = subprocess.run([bash, str(ROOT / "bench/gpu.sh")], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2 and "there is no GPU here" in done.stderr
