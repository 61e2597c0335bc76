"""Options from a TOML file, and logs for TensorBoard and Weights & Biases."""

import json
import sys
from types import SimpleNamespace

import pytest

from vqa_scratch.errors import UserError
from vqa_scratch.rl.options import read_command_line as read_rlhf
from vqa_scratch.systems.options import read_command_line as read_train
from vqa_scratch.training.progress import MetricsLog


def toml(tmp_path, text):
    path = tmp_path / "options.toml"
    path.write_text(text)
    return str(path)


def test_options_come_from_a_file_and_flags_win(tmp_path):
    path = toml(tmp_path, 'preset = "vilt"\nlearning-rate = 1e-3\nimage_cache = false\nsteps = 7\nout = "runs/x"\n')
    options = read_train(["--config", path, "--steps", "9"])
    assert (options.preset, options.learning_rate, options.image_cache, options.steps) == ("vilt", 1e-3, False, 9)
    assert read_rlhf(["--config", toml(tmp_path, "iterations = 3\n")]).iterations == 3
    more = read_rlhf(["--config", toml(tmp_path, 'iterations = "+3"\n'), "--resume"])
    assert more.more == {"iterations": 3} and "iterations" not in more.given
    with pytest.raises(UserError, match=r"--iterations \+3 goes with --resume"):
        read_rlhf(["--config", toml(tmp_path, 'iterations = "+3"\n')])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate = 1e-3\n", "no such flag: --lerning-rate; did you mean --learning-rate?"),
        ("steps = [1]\n", "steps is a list; an option is a text, number or bool"),
        ("steps = \n", "is not TOML"),
        ('optimizer = "adam"\n', "did you mean 'adamw'"),
        ("warmup_steps = -1\n", "--warmup-steps"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        read_train(["--config", toml(tmp_path, text)])
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_train(["--config", str(tmp_path / "none.toml")])


def test_tensorboard_gets_every_number(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = MetricsLog(tmp_path / "metrics.jsonl", also="tensorboard")
    log.write(3, loss=0.5, val={"accuracy": 0.25}, note="text")
    log.write(4, loss=0.4)
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss")] == [(3, 0.5), (4, 0.4)]
    assert [(e.step, e.value) for e in events.Scalars("val/accuracy")] == [(3, 0.25)]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["note"] == "text"


def test_wandb_gets_the_same(tmp_path, monkeypatch):
    """Its module is a stand-in; the real one needs an account."""
    sent, made = [], {}
    run = SimpleNamespace(log=lambda values, step: sent.append((step, values)))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **how: made.update(how) or run))
    MetricsLog(tmp_path / "run" / "metrics.jsonl", also="wandb").write(1, loss=2.0, val={"accuracy": 1})
    assert sent == [(1, {"loss": 2.0, "val/accuracy": 1})] and made["id"] == "run"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="needs it: pip install"):
        MetricsLog(tmp_path / "other" / "metrics.jsonl", also="wandb")
