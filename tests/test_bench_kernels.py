"""The benchmarks of the kernels: every side of the loss head is held to the plain one, and no GPU is said in a row."""

import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bench import attention, logprob, loss_head, processes, results, suite
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


def test_a_case_that_fails_takes_no_other_with_it(monkeypatch, capsys):
    """One of three cases of attention gives a wrong output; a peer that fails costs its own row alone."""
    cases = attention.CASES[:3]

    def measure(way, case, dense):
        if case == cases[1] and way == "ours":
            raise UserError("attention, this case: off by 1.0e+00")
        if way == "EFFICIENT_ATTENTION":
            raise RuntimeError("No available kernel. Aborting execution.\nmore")
        return {"ours": (1e-3, 2e-3, 1.0), "FlexAttention": (3e-3, 5e-3, 2.0)}.get(way, (2e-3, 3e-3, 1.0))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(attention, "measure", measure)
    monkeypatch.setattr(attention, "ours", lambda case: "ours")
    monkeypatch.setattr(attention, "flex", lambda case: "FlexAttention")
    monkeypatch.setattr(attention, "sdpa", lambda case, backend: backend)
    text = attention.run("the command", cases)
    assert f"| {cases[1].name}" in text and "failed: attention, this case: off by 1.0e+00" in text
    assert text.count("not measured: RuntimeError: No available kernel. Aborting execution.") == 2
    assert text.count("2.00x (goal") == 2 and text.count("5.000 ms") == 2  # ours and FlexAttention, of two cases
    assert "a card" in text and "off by 1.0e+00" in capsys.readouterr().err
    with pytest.raises(UserError, match="attention: a case failed; the table says which"):
        results.present("attention", text, False)
    assert "2.00x (goal" in capsys.readouterr().out
    assert {f.reached for f in suite.figures("attention", text)} == {"yes"}
    late = attention.run("the command", cases, seconds=0)
    assert late.count("not measured: no time left") == 2 and late.count("2.00x (goal") == 2


STUB = """#!/bin/bash
echo "$*" >>"$LOG"
case "$*" in
"-c "*) exit 0 ;;
"-m bench --help") printf '  attention\\n  t5-bias\\n  loss-head\\n  decode\\n  train-step\\n' ;;
*--collect-only*) printf 'tests/x.py::test_one[a b-fp32]\\ntests/x.py::test_two\\n' ;;
*"test_one"*) echo "a check that fails"; exit 1 ;;
*"bench attention"*) echo "a table of attention"; exit 2 ;;
*"bench t5-bias"*) echo "half a table"; exec sleep 30 ;;
*) echo "done: $*" ;;
esac
"""


def test_one_part_of_gpu_sh_that_fails_or_hangs_does_not_stop_the_others(tmp_path):
    bash = shutil.which("bash")
    if bash is None or shutil.which("timeout") is None:
        pytest.skip("bench/gpu.sh needs bash and timeout")
    python, script, log = tmp_path / "python", tmp_path / "bench" / "gpu.sh", tmp_path / "log"
    python.write_text(STUB)
    python.chmod(0o755)
    script.parent.mkdir()
    script.write_text((ROOT / "bench/gpu.sh").read_text().replace('bench "T5\'s bias" 30', 'bench "T5\'s bias" 1'))
    environment = os.environ | {"PYTHON": str(python), "LOG": str(log)}
    done = subprocess.run([bash, str(script), "--write"], capture_output=True, text=True, env=environment)
    asked, said = log.read_text().splitlines(), done.stdout
    assert done.returncode == 1, done.stderr
    first = next(line for line in asked if line.startswith("-m pytest"))
    assert "--collect-only" in first and first.endswith("-k fp32"), "fp32 comes first"
    assert "-m pytest --tb=short tests/x.py::test_one[a b-fp32]" in asked and "a check that fails" in said
    for part in ("a table of attention", "half a table", "done: -m bench loss-head", "done: -m bench train-step"):
        assert part in said
    assert 'left out, this checkout has no "bench logprob"' in said
    assert all(line.endswith("--write") for line in asked if line.startswith("-m bench ") and "help" not in line)
    failed = said.splitlines()[-1].partition("failed: ")[2]
    assert failed == (
        "[kernels against fp64, in fp32] [the other tests of the kernels] [attention] [T5's bias: cut off after 1 s]"
    )
    done = subprocess.run(
        [bash, str(script)], capture_output=True, text=True, env=environment | {"SECONDS_IN_ALL": "0"}
    )
    assert done.returncode == 1 and "[attention: no time left]" in done.stdout
