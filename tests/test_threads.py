"""What is timed to choose a number format and a number of threads, on clocks that the tests hand out."""

import contextlib
import itertools
import json
import os
import sys
import threading
import time

import pytest
import torch
from vqa_helpers import CPU, small_options, small_system

import train
from vqa_scratch import command_line, fastest
from vqa_scratch.systems.vqa import VQASystem
from vqa_scratch.training import threads as threads_module
from vqa_scratch.training.precision import Precision
from vqa_scratch.training.ranks import ALONE
from vqa_scratch.training.threads import CLEARLY, LOOK, PATIENCE, SHARE, Threads, choose_way, thread_counts


def test_the_first_way_that_none_is_clearly_faster_than():
    asked = []

    def seconds_of(way: str) -> float:
        asked.append(way)
        return {"plain": 1.0, "quick": 0.95, "slow": 2.0}[way]

    best, seconds = fastest.fastest(["plain", "quick", "slow"], seconds_of)
    assert best == "plain" and seconds == {"plain": 1.0, "quick": 0.95, "slow": 2.0}
    assert asked == ["plain", "quick", "slow", *["plain", "quick"] * 2], "in turn, and what is hopeless once"
    assert fastest.fastest(["plain", "quick"], {"plain": 1.11, "quick": 1.0}.__getitem__)[0] == "quick"
    assert fastest.fastest(["alone"], pytest.fail)[0] == "alone"


def test_a_neighbour_who_comes_meets_all_ways():
    """Each is judged by the best of its turns, so one slow turn decides nothing."""
    slow = iter([1.0, 9.0, 1.0, 0.5, 1.0, 0.5])
    assert fastest.fastest(["plain", "quick"], lambda way: next(slow))[0] == "plain"  # 9 is hopeless: not tried again
    slow = iter([1.4, 1.0, 1.0, 0.5, 1.0, 0.5])
    assert fastest.fastest(["plain", "quick"], lambda way: next(slow))[0] == "quick"
    slow = iter([0.04, 0.2, 0.04, 0.02, 0.04, 0.02])  # so brief that it is tried again
    assert fastest.fastest(["plain", "quick"], lambda way: next(slow))[0] == "quick"


def test_numbers_of_threads_to_choose_from(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for torchs, wanted in ((1, [1]), (2, [2, 1]), (6, [6, 4, 2, 1]), (8, [8, 4, 2, 1])):
        monkeypatch.setattr(torch, "get_num_threads", lambda torchs=torchs: torchs)
        assert thread_counts(None, CPU, fixed=False) == wanted
    assert thread_counts(3, CPU, fixed=False) == [3]
    assert thread_counts(None, CPU, fixed=True) == thread_counts(None, torch.device("cuda"), fixed=False) == [8]
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert thread_counts(None, CPU, fixed=False) == [8]


# What is faster depends on who else is there: seconds of a part of a step, by format and threads.
IDLE = {("fp32", 2): 0.21, ("bf16", 2): 0.13, ("fp32", 1): 0.35, ("bf16", 1): 0.20}
BESIDE = {("fp32", 2): 2.0, ("bf16", 2): 1.9, ("fp32", 1): 0.40, ("bf16", 1): 0.23}
NO_BF16 = {("fp32", 2): 0.21, ("bf16", 2): 0.20, ("fp32", 1): 0.35, ("bf16", 1): 0.34}


@pytest.mark.parametrize("keeps_up", [True, False])
@pytest.mark.parametrize(
    ("table", "best"), [(IDLE, ("bf16", 2)), (BESIDE, ("bf16", 1)), (NO_BF16, ("fp32", 2))], ids=["idle", "busy", "tie"]
)
def test_the_way_that_is_fastest_beside_what_else_runs(monkeypatch, table, best, keeps_up):
    """Threads that do not keep up with one in small products are not timed in a step."""
    used, best = [2], best if keeps_up else ("fp32" if table is NO_BF16 else "bf16", 1)
    monkeypatch.setattr(threads_module, "timed", lambda work, precision: table[precision.kind, used[-1]])
    threads = Threads([2, 1], "questions", use=used.append, keep_up=lambda count: keeps_up)
    precision, why = choose_way(("fp32", "bf16"), threads, CPU, lambda: pytest.fail, ALONE)
    assert (precision.kind, threads.counts[threads.at]) == best == (precision.kind, used[-1])
    assert why.startswith(f"precision {best[0]} on {best[1]} thread") and f"takes {table[best]:.2f} s, " in why
    assert (2 in used[1:]) == keeps_up and ("on 2 threads" in why) == keeps_up


def test_without_a_choice_nothing_is_timed():
    used = []
    threads = Threads([3], "questions", use=used.append)
    precision, why = choose_way(("bf16",), threads, CPU, lambda: pytest.fail("timed"), ALONE)
    assert (precision.kind, why, used) == ("bf16", "precision bf16 on 3 threads", [3])


class Machine:
    """Steps of 512 samples on a machine whose neighbours come and go; `rate(threads, busy)` is samples a second.

    The pace is looked at as train.py does.
    """

    def __init__(self, counts, rate):
        self.said, self.used, self.rate, self.clock, self.samples = [], [max(counts)], rate, 0.0, 0
        self.gate = []
        self.threads = Threads(counts, "questions", self.said.append, self.used.append, self.keep_up)

    def keep_up(self, threads: int) -> bool:
        self.gate.append(threads)
        return self.rate(threads, self.busy) >= self.rate(1, self.busy)

    def run(self, seconds: float, busy: int) -> float:
        """Samples a second over so many seconds."""
        began, before, self.busy = self.clock, self.samples, busy
        while self.clock < began + seconds:
            took = 512 / self.rate(self.used[-1], busy)
            self.clock, self.samples = self.clock + took, self.samples + 512
            if self.clock >= self.threads.due:
                self.threads.look(512, self.clock - took, self.clock)
        return (self.samples - before) / (self.clock - began)


def two_cores(threads: int, busy: int) -> float:
    """As measured: two threads wait for each other beside a neighbour, one has a core, or two thirds of one."""
    if threads == 2:
        return 112 if busy else 1200
    return 500 if busy == 2 else 750


def test_fewer_threads_beside_a_neighbour_and_all_when_he_is_gone():
    machine = Machine([2, 1], two_cores)
    assert machine.run(60, busy=0) == pytest.approx(1200) and machine.used == [2], "nothing is tried while all is well"
    machine.run(20, busy=1)
    assert machine.used[-1] == 1 and machine.said[0] == "1 thread instead of 2: 750 questions/s instead of 112"
    assert machine.run(600, busy=1) == pytest.approx(750) and 40 < len(machine.gate) < 70, "asked, and not tried"
    machine.run(100, busy=0)
    assert machine.used[-1] == 2 and machine.said[-1] == "2 threads instead of 1: 1200 questions/s instead of 750"
    assert machine.run(60, busy=0) == pytest.approx(1200) and len(machine.said) == 2


def test_beside_one_busy_process_a_core_the_rate_is_above_two_fifths():
    machine = Machine([2, 1], two_cores)
    machine.run(60, busy=0)
    machine.run(30, busy=2)
    assert machine.run(300, busy=2) > 0.39 * 1200


def test_on_many_cores_numbers_that_are_no_better_are_passed_over():
    def rate(threads: int, busy: int) -> float:
        return 100 * threads if threads <= 16 - busy else 30

    machine = Machine([16, 8, 4, 2, 1], rate)
    machine.run(60, busy=0)
    machine.run(120, busy=13)
    assert machine.used[-1] == 2
    machine.run(600, busy=0)
    assert machine.used[-1] == 16 and [line.split()[0] for line in machine.said] == ["2", "4", "8", "16"]


def test_a_pace_that_falls_for_all_numbers_is_left_alone():
    """One try, and no other as long as the pace stays."""
    machine = Machine([2, 1], lambda threads, busy: (1200 if threads == 2 else 750) / (1 + busy))
    machine.run(60, busy=0)
    machine.run(300, busy=3)
    assert machine.used == [2, 1, 2] and machine.said == []
    machine.run(60, busy=0)
    machine.run(60, busy=3)
    assert machine.used == [2, 1, 2, 1, 2], "a pace that came back may fall again"


def test_a_try_upward_waits_as_long_as_it_costs():
    """Where threads keep up with small products, and not in a step."""
    machine = Machine([2, 1], two_cores)
    machine.keep_up = machine.threads.keep_up = lambda threads: True
    machine.threads.take(0)
    machine.run(PATIENCE + 512 / 750, busy=1)
    machine.run(0.1, busy=1)
    assert machine.used[-2:] == [2, 1] and machine.threads.way == 0
    lost = 512 / 112 - 512 / 750
    assert machine.threads.rest == pytest.approx(lost / SHARE, rel=0.1) and CLEARLY < 750 / 112
    assert machine.run(600, busy=1) >= 750 * (1 - 2 * SHARE)


def test_a_trial_changes_nothing(data, tmp_path):
    """It goes through the loss of the run, in the format it is given, and leaves weights, gradients and chance.

    The first batch of this epoch is what was left over, two images; the trial is an eighth of a whole one.
    """
    system = small_system(small_options(data, tmp_path / "run", questions_per_step=256))
    seen, loss = [], system.loss

    def watched(batch):
        torch.rand(3)
        seen.append((len(batch.images), torch.is_autocast_enabled("cpu")))
        return loss(batch)

    system.loss = watched
    weights = {name: tensor.clone() for name, tensor in system.model.state_dict().items()}
    cut, state, work = dict(system.tokenizers.cut), torch.get_rng_state(), system.trial()
    for kind in ("fp32", "bf16"):
        work(Precision(kind, CPU))
    assert [len(system.batch(key).images) for key in system.epoch(0)] == [2, 22]
    eighth = -(-22 // 8)
    assert seen == [(eighth, False), (eighth, True)]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in system.model.state_dict().items())
    assert all(parameter.grad is None for parameter in system.model.parameters())
    assert torch.equal(state, torch.get_rng_state()) and cut == system.tokenizers.cut


def test_a_resumed_run_keeps_the_format_that_was_faster_once(data, tmp_path, monkeypatch, capsys):
    """--threads is obeyed, and may change."""
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(train, "formats", lambda name, device: ("fp32", "bf16") if name == "auto" else (name,))
    table = {"fp32": 1.0, "bf16": 0.5}
    monkeypatch.setattr(threads_module, "timed", lambda work, precision: table[precision.kind])
    monkeypatch.setattr(train, "draw_panels", lambda *args: None)
    out = tmp_path / "run"
    flags = {"eval_questions": 8, "samples": 0, "precision": "auto", "threads": 1}
    train.main(small_options(data, out, steps=1, **flags))
    assert "precision bf16 on 1 thread: a part of a step takes 0.50 s, fp32 on 1 thread 1.00" in capsys.readouterr().out
    table["bf16"] = 9.0
    train.main(train.read_command_line(["--out", str(out), "--resume", "--steps", "+1", "--threads", "2"]))
    assert "precision bf16 on 2 threads\n" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["train"]["threads"] == 2
    assert json.loads((out / "summary.json").read_text())["precision"] == "bf16"


def end_of_training(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize(("tick", "looked_at"), [(0.1, 2), (2.5, 6)])
def test_of_short_steps_one_in_two_seconds_is_looked_at(data, tmp_path, monkeypatch, tick, looked_at):
    """Each step of two seconds or more; a step takes a tick of the clock, and as long goes by to the next."""
    looks, ticks, look = [], itertools.count(), Threads.look
    monkeypatch.setattr(Threads, "look", lambda threads, *step: looks.append(step) or look(threads, *step))
    monkeypatch.setattr(train, "thread_counts", lambda *given: [2, 1])
    monkeypatch.setattr(train, "choose_way", lambda *given: (Precision("fp32", CPU), ""))
    monkeypatch.setattr(train, "train_step", lambda *args, **named: (torch.ones(()),) * 3)
    monkeypatch.setattr(train, "draw_panels", lambda *args: None)
    monkeypatch.setattr(train, "load_weights", end_of_training)
    monkeypatch.setattr(train, "Bar", lambda *args: contextlib.nullcontext())  # which looks at the clock every second
    options = small_options(data, tmp_path / "run", steps=6, questions_per_step=64, eval_questions=8, samples=0)
    monkeypatch.setattr(time, "perf_counter", lambda: tick * next(ticks))  # a look at the clock takes so long
    with pytest.raises(KeyboardInterrupt):
        train.main(options)
    assert all(samples > 0 and ended - began == pytest.approx(tick) for samples, began, ended in looks)
    ends = [ended for *_, ended in looks]
    assert len(looks) == looked_at and all(b - a >= LOOK for a, b in zip(ends, ends[1:], strict=False))


def test_time_that_was_kept_back_for_too_much_is_trained_in(data, tmp_path, monkeypatch):
    """An evaluation beside other work makes the final figures seem long; the next one finds that they are not."""
    answers, ticks = iter([0.5, 1e6]), itertools.count()
    monkeypatch.setattr(VQASystem, "seconds_to_finish", lambda system, at_most: next(answers, 0.5))
    monkeypatch.setattr(VQASystem, "evaluate", lambda system: {"accuracy": 0.0})
    monkeypatch.setattr(train, "draw_panels", lambda *args: None)
    monkeypatch.setattr(train, "load_weights", end_of_training)
    monkeypatch.setattr(train, "Bar", lambda *args: contextlib.nullcontext())  # which looks at it every second
    monkeypatch.setattr(time, "perf_counter", lambda: 0.2 * next(ticks))  # a look at the clock takes so long
    options = small_options(data, tmp_path / "run", steps=None, minutes=0.5, eval_every=2, eval_questions=8, samples=0)
    with pytest.raises(KeyboardInterrupt):
        train.main(options)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row["step"] for row in rows if "val" in row]
    assert evaluated[:2] == [2, 3] and evaluated[-1] > 3, "after the second step there seemed to be no time left"
    assert 20 < rows[-1]["seconds"] < 30, "and then trains on to the end of its half minute"


@pytest.mark.parametrize("bars", [0, 1])
def test_a_program_counts_its_seconds_where_no_bar_does(monkeypatch, bars):
    written, ticks, done = [], iter([1, 1]), threading.Event()

    def sleep(seconds: float) -> None:
        if next(ticks, 0) != seconds:
            done.set()
            threading.Event().wait()  # for the end of the tests

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(os, "write", lambda stream, text: written.append((stream, text)))
    from tqdm import tqdm

    with tqdm(total=1, disable=False, file=open(os.devnull, "w")) if bars else contextlib.nullcontext():  # noqa: SIM115
        command_line.count_seconds("train.py")
        assert done.wait(60)
    assert written == ([] if bars else [(2, b"train.py: 0 s\r")] * 2)
