"""The gated feed-forward layer: its backward pass against finite differences and autograd, and what it keeps."""

import pytest
import torch
import torch.nn.functional as F

from vqa_scratch.models.t5 import GatedMLP
from vqa_scratch.nn import taps
from vqa_scratch.nn.gated import gated_mlp
from vqa_scratch.nn.layers import ACTIVATIONS, activation

ROWS, DIM, HIDDEN = (2, 3), 5, 7


def inputs(dtype=torch.float64):
    """x, gate, up, down; no gate is near 0, where relu has no derivative."""
    torch.manual_seed(3)
    shapes = ((*ROWS, DIM), (HIDDEN, DIM), (HIDDEN, DIM), (DIM, HIDDEN))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def plain(x, gate, up, down, act):
    return F.linear(act(F.linear(x, gate)) * F.linear(x, up), down)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_and_gradients(name):
    act, given = activation(name), inputs()
    torch.testing.assert_close(gated_mlp(*given, act), plain(*given, act), rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda *tensors: gated_mlp(*tensors, act), given)


@pytest.mark.parametrize("frozen", range(4))
def test_what_is_frozen_gets_no_gradient_and_leaves_the_others_as_they_are(frozen):
    act, given = activation("gelu_new"), inputs()
    grad = torch.randn(*ROWS, DIM, dtype=torch.float64)
    all_four = torch.autograd.grad(plain(*given, act), given, grad)
    given[frozen].requires_grad_(False)
    gated_mlp(*given, act).backward(grad)
    for number, (tensor, right) in enumerate(zip(given, all_four, strict=True)):
        if number == frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, right)


def test_under_autocast_it_computes_what_autocast_does():
    """To the bit but for x, whose gradient is rounded once less; bf16 rounds to one part in 2**8."""
    act, given = activation("gelu_new"), inputs(torch.float32)
    grad, results = torch.randn(*ROWS, DIM).bfloat16(), []
    for function in (gated_mlp, plain):
        with torch.autocast("cpu", torch.bfloat16):
            y = function(*given, act)
        results.append([y, *torch.autograd.grad(y, given, grad)])
    (y, dx, *dweights), (plain_y, plain_dx, *plain_dweights) = results
    assert y.dtype == torch.bfloat16 and dx.dtype == torch.float32
    torch.testing.assert_close([y, *dweights], [plain_y, *plain_dweights], rtol=0, atol=0)
    torch.testing.assert_close(dx, plain_dx, rtol=0, atol=float(plain_dx.abs().max()) / 2**7)


def test_a_second_derivative_is_refused():
    given = inputs()
    (dx,) = torch.autograd.grad(gated_mlp(*given, torch.tanh).square().sum(), given[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_two_tensors_of_the_inner_width_are_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        gated_mlp(*inputs(), activation("gelu_new"))
    assert [tuple(tensor.shape) for tensor in kept].count((*ROWS, HIDDEN)) == 2


class Doubled:
    """A trace that doubles one tap."""

    def __init__(self, label):
        self.name = f"encoder.0.mlp.{label}"

    def wants(self, name):
        return name == self.name

    def __call__(self, name, tensor):
        return 2 * tensor


@pytest.mark.parametrize("label", ["pre", "post", "out"])
def test_a_trace_can_replace_every_tap(label):
    mlp, (x, *_) = GatedMLP(DIM, HIDDEN, torch.relu), inputs(torch.float32)
    mlp.tap_prefix = "encoder.0.mlp"
    untouched = mlp(x)
    with taps.activate(Doubled(label)):  # doubling is linear from each of the three on, relu included
        torch.testing.assert_close(mlp(x), 2 * untouched)
