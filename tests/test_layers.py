"""Layers around attention: activations against the reference's, initialisation against its numbers."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from vqa_scratch.nn.layers import ACTIVATIONS, MLP, activation, init_weights
from vqa_scratch.nn.rms_norm import RMSNorm


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_that_configs_mean(name):
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    torch.testing.assert_close(activation(name)(x), ACT2FN[name](x), atol=1e-12, rtol=0)


def test_unknown_activation_is_named():
    with pytest.raises(ValueError, match="unknown activation 'swish'; known: gelu, gelu_new, "):
        activation("swish")


def test_mlp():
    mlp = MLP(3, 5, activation("gelu_new"), bias=False, dropout=0.5)
    x = torch.randn(4, 2, 3)
    expected = nn.functional.gelu(x @ mlp.up.weight.T, approximate="tanh") @ mlp.down.weight.T
    ratio = mlp(x) / expected
    kept = ratio.abs() > 1e-6
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 2.0))
    torch.testing.assert_close(mlp.eval()(x), expected)


def test_initial_weights():
    model = nn.Sequential(nn.Linear(200, 100), nn.Embedding(50, 100), nn.LayerNorm(8), nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    model.apply(lambda module: init_weights(module, 0.1))
    for layer in model[:2]:  # 20,000 and 5,000 draws: the deviation is known to 1 %
        assert abs(layer.weight.std() / 0.1 - 1) < 0.05 and abs(layer.weight.mean()) < 0.01
    assert model[0].bias.abs().max() == 0
    assert torch.equal(model[2].weight, torch.ones(8)) and torch.equal(model[2].bias, torch.zeros(8))


def test_rms_norm_and_its_gradients():
    """Against the formula in fp64, by autograd."""
    norm, x, grad = RMSNorm(24, 1e-3), torch.randn(2, 5, 24) * torch.logspace(-3, 1, 5)[:, None], torch.randn(2, 5, 24)
    with torch.no_grad():
        norm.weight.uniform_(-2, 2)
    x.requires_grad_()
    y = norm(x)
    got = [y, *torch.autograd.grad(y, (x, norm.weight), grad)]
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, norm.weight))
    exact_y = exact_x * (exact_x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * exact_weight
    exact = [exact_y, *torch.autograd.grad(exact_y, (exact_x, exact_weight), grad.double())]
    for ours, right in zip(got, exact, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-5)


def test_rms_norm_under_autocast_hands_on_what_a_linear_layer_would_make_of_it():
    norm, x = RMSNorm(24, 1e-6), torch.randn(2, 5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert torch.equal(y, norm(x).bfloat16())
