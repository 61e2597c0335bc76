"""--profile: a trace of a few steps, and a run that is the same without it."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from test_resume import run, tensors_in
from torch.autograd import DeviceType
from vqa_helpers import small_data, small_flags

from vqa_scratch.training.checkpoint import load_checkpoint
from vqa_scratch.training.profile import HEAVIEST, SKIPPED, heaviest, profiling


def work(x):
    return (x @ x).relu().sum()


def named(path, name):
    return [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == name]


def test_the_calls_after_the_first_few(tmp_path, capsys):
    """Two matrix products among six, and the same results; the operators by their own time."""
    path, x = tmp_path / "trace.json", torch.randn(300, 300)
    with profiling(work, 2, path, on_disk=True) as step:
        results = [step(x) for _ in range(SKIPPED + 3)]
        said = capsys.readouterr().out.splitlines()  # as soon as the trace is there
    assert all(torch.equal(result, work(x)) for result in results)
    assert len(named(path, "aten::mm")) == len([e for e in named(path, "work") if e["ph"] == "X"]) == 2
    assert said[0] == f"profile of 2 steps: {path}, to be opened in ui.perfetto.dev or chrome://tracing"
    shares = [int(share) for share in re.findall(r" aten::\w+ (\d+)%", said[1])]
    assert said[1].startswith("heaviest operators: ") and "work" not in said[1]
    assert len(shares) == HEAVIEST and shares == sorted(shares, reverse=True) and sum(shares) <= 102
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_heaviest_by_their_own_time(on_gpu):
    """Of all operators' time, the step's own name and the GPU's kernels not counted."""

    def event(key, own, device=DeviceType.CPU, ours=False):
        times = {"self_device_time_total": own if on_gpu else 7, "self_cpu_time_total": 7 if on_gpu else own}
        return SimpleNamespace(key=key, device_type=device, is_user_annotation=ours, **times)

    events = [event(f"aten::{name}", own) for name, own in zip("abcdefg", (1, 40, 2, 30, 12, 10, 5), strict=True)]
    events += [event("work", 99, ours=True), event("kernel", 99, DeviceType.CUDA)]
    found = heaviest(SimpleNamespace(key_averages=lambda: events), on_gpu)
    assert found == ["aten::b 40%", "aten::d 30%", "aten::e 12%", "aten::f 10%", "aten::g 5%"]


def test_a_run_that_ends_on_the_way(tmp_path, capsys):
    path, x = tmp_path / "trace.json", torch.ones(2, 2)
    with pytest.raises(KeyboardInterrupt), profiling(work, 9, path, on_disk=True) as step:
        for _ in range(SKIPPED + 1):
            step(x)
        raise KeyboardInterrupt
    assert "profile of 1 steps" in capsys.readouterr().out and len(named(path, "aten::mm")) == 1
    path.unlink()
    with profiling(work, 2, path, on_disk=True) as step:
        for _ in range(SKIPPED):
            step(x)
    assert "no profile: it begins after 3 steps, and there were 3" in capsys.readouterr().out
    assert not path.exists()
    for number, on_disk in ((None, True), (2, False)):
        with profiling(work, number, path, on_disk) as step:
            assert step is work


def test_a_profiled_run_is_the_same_run(tmp_path):
    data, outs = small_data(tmp_path / "data"), (tmp_path / "plain", tmp_path / "profiled")
    for out, more in zip(outs, ([], ["--profile", "2"]), strict=True):
        ended = run(out, [*small_flags(data, out, steps=6, eval_every=3), *more])
        assert ended.code == 0 and ("trace.json" in ended.out) == bool(more), ended.err
    assert len([e for e in named(outs[1] / "trace.json", "step") if e["ph"] == "X"]) == 2
    a, b = (tensors_in(load_checkpoint(out / "checkpoints" / "last.pt")) for out in outs)
    assert a.keys() == b.keys() and len(a) > 100 and all(torch.equal(a[name], b[name]) for name in a)
