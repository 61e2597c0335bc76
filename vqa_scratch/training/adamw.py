"""torch's AdamW without torch's compiler, whose import takes as long as that of torch itself.

torch has the compiler leave its optimizers alone, and imports it to tell it so, though nobody compiles. Here it is not
told: `--compile` is of the loss, and no optimizer is ever inside. What is computed stays the same.
"""

import inspect

import torch

for _name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):  # of every optimizer
    _method = inspect.unwrap(getattr(torch.optim.Optimizer, _name))
    setattr(_method, "__dynamo_disable", _method)  # noqa: B010  # where torch looks for what the compiler would make


class AdamW(torch.optim.AdamW):
    """Its `step` without the wrapper that imports the compiler; gradients of it are not wanted either way."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))  # type: ignore[assignment]
