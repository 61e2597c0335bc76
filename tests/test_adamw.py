"""AdamW without torch's compiler: the same steps and states as torch's, and no program imports the compiler."""

import subprocess
import sys

import pytest
import torch
from vqa_helpers import ROOT, small_flags

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
