"""Runs that are killed or stopped go on to the same bits as a run that was left alone."""

import functools
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vqa_helpers import Ended, Started, small_flags, train_program

from vqa_scratch.storage import LOCK, hold
from vqa_scratch.training.checkpoint import load_checkpoint

# Checkpoints after steps 4, 8 and 10, evaluations after 3, 6, 9 and 10: so that they do not coincide.
STEPS, SAVE, EVALUATE = 10, 4, 3


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # lets the interpreter call its handler


def at_step(step: int, then=die) -> None:
    """Before the optimizer step of that number, call `then`."""
    import train

    original, calls = train.train_step, []

    def train_step(*args, **options):
        (optimizers,) = (a for a in args if isinstance(a, train.Optimizers))
        steps = [s["step"] for o in optimizers.optimizers for s in o.state.values() if "step" in s]
        if max(map(int, steps), default=0) + 1 == step and not calls:
            calls.append(step)
            then()
        return original(*args, **options)

    train.train_step = train_step


def within_checkpoint() -> None:
    """Half of the next checkpoint is on disk, then the process is gone."""

    def save(state, file):
        torch_save(state, file)
        file.flush()
        os.truncate(file.fileno(), file.tell() // 2)
        die()

    torch_save, torch.save = torch.save, save


def around_rename(name: str, after: bool) -> None:
    """Just before or just after the next file of that name takes its place."""
    replace = os.replace

    def dying(source, target):
        if Path(target).name == name:
            if after:
                replace(source, target)
            die()
        replace(source, target)

    os.replace = dying


def within_weights() -> None:
    from vqa_scratch.weights import files

    def save_file(tensors, path, **_):
        Path(path).write_bytes(b"half of it")
        die()

    files.save_file = save_file


def within_a_metrics_line() -> None:
    from vqa_scratch.training.progress import MetricsLog

    write, dump = MetricsLog.write, json.dumps

    def cut(self, step, **values):
        if step == 7:
            with open(self.path, "a") as file:
                file.write(dump({"step": step, **values})[:25])
            die()
        write(self, step, **values)

    MetricsLog.write = cut


def while_data_is_read() -> None:
    from vqa_scratch.systems.vqa import VQASystem

    VQASystem.read = lambda options: die()


MOMENTS = {
    "before anything is written": while_data_is_read,
    "before the first checkpoint": functools.partial(at_step, 3),
    "while model.safetensors is written": within_weights,
    "before model.safetensors' renaming": functools.partial(around_rename, "model.safetensors", False),
    "after model.safetensors' renaming": functools.partial(around_rename, "model.safetensors", True),
    "while the first checkpoint is written": within_checkpoint,
    "before the checkpoint's renaming": functools.partial(around_rename, "last.pt", False),
    "after the checkpoint's renaming": functools.partial(around_rename, "last.pt", True),
    "between two checkpoints": functools.partial(at_step, 6),
    "within a line of metrics.jsonl": within_a_metrics_line,
    "while the second checkpoint is written": within_checkpoint,
    "at the end, before summary.json": functools.partial(around_rename, "summary.json", False),
}


def with_dropout(prepare=None) -> None:
    """Small models are trained without; with it every step draws random numbers, which a resumed run must draw too."""
    from vqa_scratch.models.vqa import VQAModel

    make = VQAModel.__init__

    def dropping(self, *parts):
        make(self, *parts)
        dropouts = [module for module in self.modules() if isinstance(module, torch.nn.Dropout)]
        assert dropouts
        for module in dropouts:
            module.p = 0.1

    VQAModel.__init__ = dropping
    if prepare is not None:
        prepare()


def run(out: Path, flags: list[str], prepare=None) -> Ended:
    return Started(train_program, flags, functools.partial(with_dropout, prepare)).end()


def flags_for(data: Path, out: Path) -> list[str]:
    return small_flags(data, out, steps=STEPS, save_every=SAVE, eval_every=EVALUATE)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> Path:
    """The run that nobody disturbs."""
    out = tmp_path_factory.mktemp("alone") / "run"
    ended = run(out, flags_for(data, out))
    assert ended.code == 0, ended.err
    return out


def tensors_in(value, name="") -> dict[str, torch.Tensor]:
    """Every tensor of nested dictionaries and lists, by its path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {k: t for key, inner in pairs for k, t in tensors_in(inner, f"{name}/{key}").items()}


def assert_same_state(out: Path, alone: Path) -> None:
    """Weights, optimizer and generators bit for bit, at the same place."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, alone))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)
    last, last_alone = (load_checkpoint(folder / "checkpoints" / "last.pt") for folder in (out, alone))
    ours, theirs = tensors_in(last), tensors_in(last_alone)
    assert len(theirs) > 100 and ours.keys() == theirs.keys()
    assert [k for k in theirs if not torch.equal(ours[k], theirs[k])] == []
    for state in (last, last_alone):
        assert state["state"].pop("seconds") > 0
    assert last["state"] == last_alone["state"] and last["rng"]["python"] == last_alone["rng"]["python"]


def assert_same_run(out: Path, alone: Path) -> None:
    """The same state; the same steps, losses and figures, each once."""
    assert_same_state(out, alone)
    rows = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (out, alone)]
    for row in rows[0] + rows[1]:
        row.pop("seconds")
        row.pop("samples_per_second", None)
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0] if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows[0] if "val" in row] == [3, 6, 9, 10]
    figures = [json.loads((folder / "summary.json").read_text()) for folder in (out, alone)]
    assert figures[0]["accuracy_by_family"] == figures[1]["accuracy_by_family"]


def test_killed_at_any_moment(data, alone, tmp_path):
    """One run, killed at each moment in turn, ends bit for bit where an undisturbed run does."""
    out, resume = tmp_path / "run", []
    for name, prepare in MOMENTS.items():
        ended = run(out, [*flags_for(data, out), *resume], prepare)
        assert ended.code == -signal.SIGKILL, f"{name}: {ended.code} {ended.err}"
        resume = ["--resume"]
    unfinished = list(out.rglob("*.tmp"))
    assert unfinished, "a kill in the middle of writing leaves a file of a temporary name"
    ended = run(out, [*flags_for(data, out), "--resume"])
    assert ended.code == 0, ended.err
    assert_same_run(out, alone)
    assert list(out.rglob("*.tmp")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_politely(data, alone, tmp_path, number):
    """SIGINT and SIGTERM end the step, save, and exit with 130 or 143; going on leads to the same bits."""
    out = tmp_path / "run"
    ended = run(out, flags_for(data, out), functools.partial(at_step, 6, functools.partial(send, int(number))))
    assert ended.code == 128 + number, ended.err
    again = f"resume with: python train.py --preset shapes --out {out} --resume"
    assert "stopped by signal" in ended.out and again in ended.out and ended.errors == []
    assert load_checkpoint(out / "checkpoints" / "last.pt")["state"]["step"] == 6
    ended = run(out, [*flags_for(data, out), "--resume"])
    assert ended.code == 0 and "resuming after step 6" in ended.out
    assert_same_run(out, alone)


def test_a_moved_run_goes_on_where_it_is(data, alone, tmp_path):
    old, new = tmp_path / "old" / "run", tmp_path / "new" / "run"
    run(old, flags_for(data, old), functools.partial(at_step, 6))
    new.parent.mkdir()
    old.rename(new)
    assert run(new, [*flags_for(data, new), "--resume"]).code == 0
    assert not old.exists()
    assert_same_run(new, alone)


def test_a_finished_run_is_only_reported_again(data, alone, tmp_path):
    before = (alone / "checkpoints" / "last.pt").read_bytes()
    ended = run(alone, [*flags_for(data, alone), "--resume"])
    assert ended.code == 0 and f"resuming after step {STEPS}" in ended.out
    assert (alone / "checkpoints" / "last.pt").read_bytes() == before


def test_more_steps_go_on_as_if_the_run_had_been_longer(data, alone, tmp_path):
    """Bit for bit, as long as the schedule is flat; the new total outlives a kill, after which --resume has no +. So
    does every other option that a run may change."""
    out, flat = tmp_path / "run", {"save_every": SAVE, "eval_every": 1, "warmup_steps": 0, "decay_from": 0.99}
    ended = run(out, [*small_flags(data, out, steps=4, **flat), "--steps", "+6"])
    assert ended.code == 2 and "error: --steps +6 goes with --resume" in ended.err and not out.exists()
    assert run(out, small_flags(data, out, steps=4, **flat)).code == 0
    again = ["--out", str(out), "--resume"]
    for moment in (while_data_is_read, functools.partial(at_step, 6)):  # before a checkpoint it is the same total again
        assert run(out, [*again, "--steps", "+6", "--test-images", "3"], moment).code == -signal.SIGKILL
    ended = run(out, [*again, "--steps", "+6"], functools.partial(at_step, 10))
    assert ended.code == -signal.SIGKILL and load_checkpoint(out / "checkpoints" / "last.pt")["state"]["step"] == 8
    ended = run(out, [*again, "--steps", "+6"])
    assert ended.code == 2 and f"error: {out} is not finished: go on with --resume alone" in ended.err
    ended = run(out, again)
    assert ended.code == 0 and "resuming after step 8" in ended.out, ended.err
    assert json.loads((out / "config.json").read_text())["train"]["test_images"] == 3
    longer = tmp_path / "longer"
    assert run(longer, small_flags(data, longer, steps=STEPS, **flat)).code == 0
    ours, theirs = (load_checkpoint(folder / "checkpoints" / "last.pt") for folder in (out, longer))
    ours["state"].pop("seconds"), theirs["state"].pop("seconds")
    assert ours["state"] == theirs["state"]
    ours, theirs = tensors_in(ours), tensors_in(theirs)
    assert ours.keys() == theirs.keys() and [k for k in theirs if not torch.equal(ours[k], theirs[k])] == []
    ended = run(out, [*again, "--steps=+1"])
    assert ended.code == 0 and "11 steps in all; the learning rate" in ended.out
    assert json.loads((out / "summary.json").read_text())["steps"] == 11
    ended = run(out, [*again, "--steps", "+0"])
    assert ended.code == 2 and "error: the N of --steps +N must be at least 1, not 0" in ended.err
    ended = run(out, [*again, "--steps", "++2"])
    assert ended.code == 2 and "two plus signs" in ended.err
    empty = tmp_path / "none"
    ended = run(empty, ["--out", str(empty), "--resume", "--steps", "+2"])
    assert ended.code == 2 and len(ended.errors) == 1 and not empty.exists()


def test_more_minutes_of_a_run_of_steps_and_back(data, tmp_path):
    """The total is what the checkpoint has and what is added; the options are in a file, which works the same."""
    out, file = tmp_path / "run", tmp_path / "more.toml"
    assert run(out, small_flags(data, out, steps=2)).code == 0
    file.write_text('minutes = "+0.05"\nresume = true\n')
    seconds = load_checkpoint(out / "checkpoints" / "last.pt")["state"]["seconds"]
    began = time.monotonic()
    ended = run(out, ["--out", str(out), "--config", str(file)])
    took = time.monotonic() - began
    assert ended.code == 0 and took < 9, (took, ended.err)  # 3 s, and what a busy machine adds
    length = json.loads((out / "config.json").read_text())["train"]
    assert length["minutes"] == pytest.approx(seconds / 60 + 0.05) and length["steps"] is None
    steps = load_checkpoint(out / "checkpoints" / "last.pt")["state"]["step"]
    assert steps > 2 and json.loads((out / "summary.json").read_text())["steps"] == steps
    ended = run(out, ["--out", str(out), "--resume", "--steps", "+1"])
    assert ended.code == 0 and f"{steps + 1} steps in all" in ended.out, ended.err
    length = json.loads((out / "config.json").read_text())["train"]
    assert length["minutes"] is None and length["steps"] == steps + 1


def test_one_process_in_a_folder(data, alone, tmp_path):
    """A second one is refused before it changes anything, whether it begins a run or goes on with one."""
    new, busy = tmp_path / "new", "another process is writing into"
    new.mkdir()
    for out, more in ((new, []), (alone, ["--resume"])):
        with hold(out):
            half = out / ".summary.json.1.tmp"  # which the process that holds the folder is writing
            half.touch()
            before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
            ended = run(out, [*flags_for(data, out), *more])
            assert ended.code == 2 and ended.errors[0].startswith(f"error: {busy} {out}"), ended.err
            assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
            half.unlink()
        (out / LOCK).unlink()


def test_a_run_that_cannot_begin_leaves_no_folder(data, tmp_path):
    out = tmp_path / "run"
    ended = run(out, [*flags_for(data, out), "--train-split", "nowhere"])
    assert ended.code == 2 and not out.exists()


def test_a_flag_with_another_value_than_the_runs_is_refused_even_if_it_is_the_default(data, alone):
    ended = run(alone, ["--preset", "shapes", "--out", str(alone), "--resume", "--width", "128"])
    assert ended.code == 2 and "was started with --width 32, not 128; a resumed run keeps" in ended.err


def test_interrupted_before_training(data, tmp_path):
    """Ctrl-C while data is read ends the program without a traceback."""
    out = tmp_path / "run"
    ended = run(out, flags_for(data, out), interrupt_reading)
    assert ended.code == 128 + signal.SIGINT and "Traceback" not in ended.err


def interrupt_reading() -> None:
    from vqa_scratch.systems.vqa import VQASystem

    VQASystem.read = lambda options: send(signal.SIGINT)
