"""Gradient checkpointing: the same loss and gradients with fewer tensors kept, in every system."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from vqa_helpers import CPU, small_options, small_system

from vqa_scratch.errors import UserError
from vqa_scratch.systems import find
from vqa_scratch.systems.options import CaptionOptions, ViLTOptions
from vqa_scratch.training.precision import Precision
from vqa_scratch.training.recompute import recompute_blocks

LAYERS = 3
SIZES = {"width": 32, "heads": 2, "steps": 1, "device": "cpu", "precision": "fp32", "image_cache": False}


def system_of(name, data, out):
    """A system with several layers and dropout, always of the same weights."""
    torch.manual_seed(0)
    if name in ("caption", "vilt"):
        own = {"caption": (CaptionOptions, {"decoder_layers": LAYERS, "image_blocks": 2, "captions_per_step": 8})}
        own["vilt"] = (ViLTOptions, {"layers": LAYERS, "questions_per_step": 32, "min_answer_count": 1})
        kind, sizes = own[name]
        options = kind(data=data, cache=out / "cache", out=out / "run", **SIZES | sizes)
        found = find(options.preset)
        read = found.read(options)
        system = found.build(options, read, Precision("fp32", CPU))
        system.train_on(read)
    else:
        layers = {f"{part}_layers": LAYERS for part in ("image", "text", "decoder")}
        system = small_system(small_options(data, out / "run", connector=name, **layers))
    dropouts = [module for module in system.model.modules() if isinstance(module, torch.nn.Dropout)]
    for module in dropouts:
        module.p = 0.2
    assert dropouts
    system.model.train()
    return system


def step(system, precision="fp32"):
    """(loss, gradients by name, bytes that are kept for the backward pass: saved tensors and the inputs of blocks)."""
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = [
        block.register_forward_pre_hook(lambda _, inputs: [keep(x) for x in inputs if torch.is_tensor(x)] and None)
        for blocks in system.model.modules()
        if isinstance(blocks, torch.nn.ModuleList)
        for block in blocks
    ]
    batch = system.batch(system.epoch(0)[0])
    torch.manual_seed(1)  # of the dropout
    with saved_tensors_hooks(keep, lambda tensor: tensor), Precision(precision, CPU).autocast():
        loss, _ = system.loss(batch)
    torch.rand(7)  # what happens in between must not matter
    loss.backward()
    for hook in hooks:
        hook.remove()
    return loss, {n: p.grad for n, p in system.model.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("name", ["tokens", "mean", "prefix", "patches", "qformer", "resampler", "vilt", "caption"])
def test_the_same_gradients_for_less(data, tmp_path, name):
    """To the bit, as the same operations run twice; with three layers less than 0.7 of the memory, whatever the parts
    around the blocks keep."""
    system = system_of(name, data, tmp_path)
    loss, gradients, kept = step(system)
    system = system_of(name, data, tmp_path)
    recompute_blocks(system.model)
    again, others, fewer = step(system)
    assert torch.equal(again, loss) and others.keys() == gradients.keys()
    assert [n for n in gradients if not torch.equal(others[n], gradients[n])] == []
    assert fewer < 0.7 * kept, (fewer, kept)
    assert list(system.model.state_dict()) == list(system_of(name, data, tmp_path).model.state_dict())


def test_under_autocast(data, tmp_path):
    runs = []
    for again in (False, True):
        system = system_of("tokens", data, tmp_path)
        if again:
            recompute_blocks(system.model)
        runs.append(step(system, "bf16"))
    (loss, gradients, kept), (other, others, fewer) = runs
    assert torch.equal(loss, other) and all(torch.equal(others[n], g) for n, g in gradients.items())
    assert fewer < 0.7 * kept


def test_not_with_compile(data, tmp_path):
    with pytest.raises(UserError, match="--gradient-checkpointing does not go with --compile"):
        small_options(data, tmp_path, gradient_checkpointing=True, compile=True)
