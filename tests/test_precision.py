"""Devices and number formats: what is picked, what autocast is told, and loss scaling."""

import ast
import warnings

import pytest
import torch
from test_training import optimizers
from vqa_helpers import CPU, ROOT, small_options, small_system

from train import train_step
from vqa_scratch.errors import UserError
from vqa_scratch.systems.vqa import VQASystem
from vqa_scratch.training.precision import Precision, formats, pick_device


@pytest.fixture(scope="module")
def make(data, tmp_path_factory):
    """A function that builds a small system, ready to train."""
    options = small_options(data, tmp_path_factory.mktemp("run") / "run")
    questions = VQASystem.read(options)
    return lambda: small_system(options, questions)


def test_devices_and_formats():
    assert pick_device("cpu") == CPU
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda is not available here; this machine has .*cpu"):
            pick_device("cuda")
    with pytest.raises(UserError, match="--precision fp16 needs a CUDA device, not cpu"):
        formats("fp16", CPU)
    with pytest.raises(UserError, match="there is no precision 'fp8'; there are fp32, bf16, fp16"):
        formats("fp8", CPU)
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert formats("bf16", CPU) == ("bf16",) and formats("auto", CPU) == ("fp32", "bf16")[: 1 + native]
    assert formats("auto", torch.device("mps")) == ("fp32",)


def test_precision_on_a_gpu(monkeypatch):
    """bf16 where the GPU itself has it, not where torch imitates it. Autocast is told which: its default is fp16."""
    for native in (True, False):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, native=native: native or including_emulation,
        )
        assert formats("auto", torch.device("cuda")) == ("bf16" if native else "fp32",)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no GPU
        precision = Precision("bf16", torch.device("cuda"))
        assert precision.autocast().fast_dtype == torch.bfloat16 and not precision.scaler.is_enabled()


def test_bf16_keeps_weights_in_fp32(make):
    system = make()
    batch = system.batch(system.epoch(0)[0])
    fp32 = system.loss(batch)[0]
    system.precision = Precision("bf16", CPU)
    loss, _, _ = train_step(system.loss, batch, optimizers(system.model), system.precision)
    _, tokens = batch.counts
    assert loss == pytest.approx(fp32.item() / tokens, rel=0.02) and loss != fp32 / tokens
    assert all(p.dtype == torch.float32 for p in system.model.parameters())


def test_loss_scaling_changes_nothing_but_steps_it_leaves_out(make):
    """Scaled gradients are clipped at their true size, as without scaling; infinite ones are not stepped with."""
    found = []
    for scale in (None, 2.0**10, 2.0**127):
        system = make()
        before = [p.detach().clone() for p in system.model.parameters()]
        if scale is not None:
            system.precision.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        batch = system.batch(system.epoch(0)[0])
        _, _, norm = train_step(system.loss, batch, optimizers(system.model), system.precision, max_grad_norm=0.01)
        found.append([norm, *(p.detach().clone() for p in system.model.parameters())])
    for plain, scaled in zip(*found[:2], strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-6)  # powers of two: only tiny numbers may round
    assert not found[2][0].isfinite() and system.precision.scaler.get_scale() == 2.0**126
    assert all(torch.equal(a, b) for a, b in zip(found[2][1:], before, strict=True))


def test_the_names_of_number_formats_are_in_one_table():
    """Nobody else says which dtype "bf16" is, in the package or in the benchmarks."""
    tables = []
    for folder in ("vqa_scratch", "kernels", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Dict) and "'bf16': torch.bfloat16" in ast.unparse(node):
                    tables.append(path.name)
    assert tables == ["precision.py"]


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_a_precision_holds_its_autocast_ready_made(kind):
    precision = Precision(kind, CPU)
    for _ in range(2):  # a new context each time
        with precision.autocast():
            assert (torch.randn(2, 3) @ torch.randn(3, 2)).dtype == precision.dtype
            assert torch.is_autocast_enabled("cpu") is (kind == "bf16")
    assert not torch.is_autocast_enabled("cpu")
