"""A linear layer that adds its gradient in place: the same gradients as `nn.Linear`, in the same tensor."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vqa_scratch.models.t5 import T5, T5Config
from vqa_scratch.nn import summing_linear
from vqa_scratch.nn.summing_linear import SummingLinear
from vqa_scratch.rl import large_tables


def twins(rows=(2, 2)):
    """(ours, torch's, x of each): the same numbers."""
    torch.manual_seed(5)
    ours, theirs = SummingLinear(6, 9, bias=False), nn.Linear(6, 9, bias=False)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(*rows, 6)
    return ours, theirs, x.clone().requires_grad_(), x.clone().requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_several_passes_add_up(dtype):
    """Sums of products in fp32 may round once less. In bf16 one rounding is 2**-8 of a sum of order 10."""
    ours, theirs, x, y = twins()
    for layer, given in ((ours, x), (theirs, y)):
        for number in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                out = layer(given)
            assert out.dtype == dtype
            out.backward(torch.linspace(-1, number, out.numel()).view(out.shape).to(dtype))
    atol = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=0, atol=atol)
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=atol)


class Products(TorchDispatchMode):
    """How often oneDNN's linear layer is called."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.mkldnn._linear_pointwise.default
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not summing_linear.HAS_ONE_DNN, reason="this torch has no oneDNN, or no MKL to be slower")
@pytest.mark.parametrize("rows", [(7,), (2, 3), (0,)])
def test_products_with_a_weight_are_those_of_one_dnn(rows):
    """Output and gradient of x; those of sums of 9 numbers near 1 differ by their order alone, 1e-6."""
    ours, theirs, x, y = twins(rows)
    with Products() as products:
        out = ours(x)
        out.backward(torch.ones_like(out))
        with torch.no_grad():
            assert torch.equal(ours(x), out)
    expected = theirs(y)
    expected.backward(torch.ones_like(expected))
    assert products.number == 3
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-6)
    with Products() as products, torch.autocast("cpu", torch.bfloat16):
        ours(x).sum().backward()
    assert products.number == 0


class Watch(TorchDispatchMode):
    """Where tensors of one shape lie that operations hand back."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.places = shape, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape == self.shape:
            self.places.add(result.data_ptr())
        return result


def sums_in_place(head, function, x):
    """A second backward pass through `function` adds to `head`'s gradient and makes no other table of its size."""
    function(x).sum().backward()
    first, place, out = head.weight.grad.clone(), head.weight.grad.data_ptr(), function(x).sum()
    with Watch(head.weight.shape) as watch:
        out.backward()
    torch.testing.assert_close(head.weight.grad, 2 * first)
    return head.weight.grad.data_ptr() == place and watch.places <= {place, head.weight.data_ptr()}


def test_the_sum_stays_where_it_is():
    ours, theirs, x, y = twins()
    assert sums_in_place(ours, ours, x)
    assert not sums_in_place(theirs, theirs, y)


def test_the_head_of_a_t5_sums_in_place(monkeypatch):
    monkeypatch.setattr(large_tables, "LARGE_WEIGHT", 31 * 24)
    model = T5(T5Config(vocab_size=31, dim=24, head_dim=8, hidden=16, encoder_layers=1, decoder_layers=1, heads=2))
    large_tables.speed_up_linears(model)
    assert sums_in_place(model.lm_head, model.logits, torch.randn(2, 2, 24, requires_grad=True))


def test_frozen_it_has_no_gradient_and_without_gradients_the_same_output():
    ours, theirs, x, y = twins()
    ours.weight.requires_grad_(False), theirs.weight.requires_grad_(False)
    ours(x).sum().backward(), theirs(y).sum().backward()
    assert ours.weight.grad is None
    torch.testing.assert_close(x.grad, y.grad)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(y), rtol=0, atol=1e-6)


def test_only_large_layers_without_a_bias_are_exchanged(monkeypatch):
    monkeypatch.setattr(large_tables, "LARGE_WEIGHT", 50)
    layers = [nn.Linear(6, 9, bias=False), nn.Linear(6, 2, bias=False), nn.Linear(6, 9)]
    model = nn.Sequential(*layers)
    names = list(model.state_dict())
    large_tables.speed_up_linears(model)
    assert [type(layer) is SummingLinear for layer in layers] == [True, False, False]
    assert list(model.state_dict()) == names
