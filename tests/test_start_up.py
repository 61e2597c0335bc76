"""A short start: AdamW without the compiler of torch, and models that are checked without random numbers."""

import subprocess
import sys

import pytest
import torch
from vqa_helpers import ROOT, small_flags

from vqa_scratch.errors import UserError
from vqa_scratch.systems.options import VQAOptions
from vqa_scratch.systems.vqa import VQASystem
from vqa_scratch.training.adamw import AdamW

# What runs first of `train.py --steps 1` and of `ask`, and then says whether the compiler was imported.
STARTS = """
import sys
import train
from vqa_scratch import systems
train.main(train.read_command_line(sys.argv[2:]))
system = systems.load(sys.argv[1])
assert "torch._dynamo" not in sys.modules, "torch's compiler was imported"
assert "sympy" not in sys.modules and "vqa_scratch.rl.ppo" not in sys.modules
"""


@pytest.mark.parametrize("fused", [True, False])
def test_steps_and_states_are_those_of_torch(fused):
    def trained(kind):
        torch.manual_seed(0)
        layer = torch.nn.Linear(5, 3)
        optimizer = kind(layer.parameters(), lr=0.1, betas=(0.9, 0.98), weight_decay=0.3, fused=fused)
        for _ in range(3):
            layer(torch.randn(2, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        again = kind(layer.parameters(), lr=0.5, fused=fused)
        again.load_state_dict(optimizer.state_dict())
        layer(torch.randn(2, 5)).square().sum().backward()
        again.step()
        return [*layer.parameters(), *(v for state in again.state_dict()["state"].values() for v in state.values())]

    ours, theirs = trained(AdamW), trained(torch.optim.AdamW)
    assert len(ours) == len(theirs) == 8
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_no_program_imports_the_compiler(data, tmp_path):
    flags = small_flags(data, tmp_path / "run", steps=1, eval_questions=8, samples=1)
    command = [sys.executable, "-c", STARTS, str(tmp_path / "run"), *flags]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-500:]


def test_garbage_is_seldom_looked_for_while_torch_is_imported():
    """Which begins after the options were read."""
    program = (
        "import gc\nfrom vqa_scratch import command_line\n"
        "print(command_line.read_first(lambda argv: gc.get_threshold()))"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == "(700, 10, 1000)\n", ended.stderr


def test_options_are_checked_without_random_numbers():
    """The model's own rules speak, at any size; nothing is drawn, and afterwards it is again."""
    plain = {"connector": "prefix", "question_prompt": True}
    before = torch.get_rng_state()
    VQASystem.check(VQAOptions(preset="shapes", width=1024, heads=16, image_layers=12, decoder_layers=12, **plain))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(UserError, match="needs a width divisible by 4"):
        VQASystem.check(VQAOptions(preset="shapes", width=30, heads=2, **plain))
    assert torch.nn.Linear(3, 3).weight.std() > 0


def test_the_end_of_a_program_is_silent_beside_triton():
    """Its bindings report what was not collected, so then everything is."""
    pytest.importorskip("triton")
    program = (
        "from triton._C import libtriton\nfrom vqa_scratch.command_line import run_program\nrun_program(lambda: None)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
