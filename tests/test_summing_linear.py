"""A linear layer that adds its gradient in place: the same gradients as `nn.Linear`, in the same tensor."""

import pytest
import torch
from torch import nn

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


def test_the_sum_stays_where_it_is():
    ours, _, x, _ = twins()
    ours(x).sum().backward()
    first, place = ours.weight.grad.clone(), ours.weight.grad.data_ptr()
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made.append(result)
            return result

    out = ours(x).sum()
    with Watch():
        out.backward()
    assert ours.weight.grad.data_ptr() == place
    torch.testing.assert_close(ours.weight.grad, 2 * first)
    places = {t.data_ptr() for t in made if isinstance(t, torch.Tensor) and t.shape == ours.weight.shape}
    assert places <= {place, ours.weight.data_ptr()}  # no other table of this size was made


def test_frozen_or_without_gradients_it_is_a_plain_layer():
    ours, theirs, x, y = twins()
    ours.weight.requires_grad_(False), theirs.weight.requires_grad_(False)
    ours(x).sum().backward(), theirs(y).sum().backward()
    assert ours.weight.grad is None
    torch.testing.assert_close(x.grad, y.grad)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(y), rtol=0, atol=0)


def test_only_large_heads_that_learn_are_exchanged(monkeypatch):
    monkeypatch.setattr(large_tables, "LARGE_TABLE", 50)
    layers = [nn.Linear(6, 9, bias=False), nn.Linear(6, 2, bias=False), nn.Linear(6, 9), nn.Linear(6, 9, bias=False)]
    layers[3].weight.requires_grad_(False)
    model = nn.Sequential(*layers)
    names = list(model.state_dict())
    large_tables.add_up_in_place(model)
    assert [type(layer) is SummingLinear for layer in layers] == [True, False, False, False]
    assert list(model.state_dict()) == names
