"""Key maps: every tensor finds its place in both directions, and every disagreement is named in one error."""

import pytest
import torch
from torch import nn

from vqa_scratch.errors import UserError
from vqa_scratch.weights import maps
from vqa_scratch.weights.convert import load_into, to_hf


class Toy(nn.Module):
    """Two layers with a fused and a turned projection, and a head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(4, 6), "up": nn.Linear(4, 3)}) for _ in range(2))
        self.head = nn.Linear(3, 2)


TOY = maps.KeyMap(
    prefix="toy.",
    write_prefix=True,
    body=(
        *maps.linear("blocks.{}.qkv", "layer.{}.q", "layer.{}.k", "layer.{}.v"),
        *maps.linear("blocks.{}.up", "layer.{}.up", transposed=True),
    ),
    head=maps.linear("head", "classifier.0"),
    dropped=("layer.{}.mask", "pooler.weight"),
    tied={"copy.weight": "layer.0.up.weight"},
)


def toy_file():
    tensors = {}
    for layer in range(2):
        for name in "qkv":
            tensors[f"toy.layer.{layer}.{name}.weight"] = torch.randn(2, 4)
            tensors[f"toy.layer.{layer}.{name}.bias"] = torch.randn(2)
        tensors[f"toy.layer.{layer}.up.weight"] = torch.randn(4, 3)
        tensors[f"toy.layer.{layer}.up.bias"] = torch.randn(3)
    return tensors | {"classifier.0.weight": torch.randn(2, 3), "classifier.0.bias": torch.randn(2)}


def test_load_joins_turns_and_drops_and_export_is_its_inverse():
    source = toy_file()
    extra = {"toy.layer.0.mask": torch.ones(9), "pooler.weight": torch.ones(2)}
    extra["copy.weight"] = source["toy.layer.0.up.weight"].clone()
    model, tensors = Toy(), source | extra
    assert load_into(model, tensors, TOY) == []
    assert set(tensors) == set(extra)  # what was copied was let go
    for layer, block in enumerate(model.blocks):
        for part in ("weight", "bias"):
            joined = torch.cat([source[f"toy.layer.{layer}.{name}.{part}"] for name in "qkv"])
            assert torch.equal(getattr(block["qkv"], part), joined)
        assert torch.equal(block["up"].weight, source[f"toy.layer.{layer}.up.weight"].T)
    exported = to_hf(model, TOY)
    assert exported.keys() == source.keys()
    for key, tensor in exported.items():
        assert torch.equal(tensor, source[key]) and tensor.is_contiguous()
    storages = {tensor.untyped_storage().data_ptr() for tensor in exported.values()}
    assert len(storages) == len(exported)


def test_heads_of_any_layout_are_read_past_but_for_ones_own():
    """`classifier.0` is this model's, and in the table of heads that others carry."""
    heads = {key: torch.randn(2) for key in maps.HEADS if not key.startswith("classifier.0")}
    source, model = toy_file(), Toy()
    assert len(heads) > 30 and load_into(model, source | heads, TOY) == []
    assert torch.equal(model.head.weight, source["classifier.0.weight"])
    del source["classifier.0.weight"]
    with pytest.raises(UserError, match="missing: classifier.0.weight; unexpected: head.weight"):
        load_into(model, source | heads | {"head.weight": torch.randn(2)}, TOY)
    for name, key_map in vars(maps).items():
        if isinstance(key_map, maps.KeyMap):
            assert not set(key_map.dropped) & set(maps.HEADS), f"{name} repeats a head"


def test_prefix_may_be_absent_and_old_endings_are_understood():
    source = {key.removeprefix("toy."): tensor for key, tensor in toy_file().items()}
    source["layer.1.up.beta"] = source.pop("layer.1.up.bias")
    model = Toy()
    load_into(model, dict(source), TOY)
    assert torch.equal(model.blocks[1]["up"].bias, source["layer.1.up.beta"])


def test_half_precision_files_are_read_into_our_precision():
    source = {key: tensor.half() for key, tensor in toy_file().items()}
    model = Toy()
    load_into(model, dict(source), TOY)
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight, source["classifier.0.weight"].float())


def test_every_disagreement_is_named_in_one_error():
    source = toy_file()
    del source["toy.layer.0.k.bias"], source["classifier.0.bias"]
    source["toy.layer.2.q.weight"] = torch.randn(2, 4)  # a layer too many
    source["stranger"] = torch.randn(2)
    source["layer.0.q.weight"] = torch.randn(2, 4)  # also there with the prefix
    source["toy.layer.1.v.weight"] = torch.randn(3, 4)
    source["toy.layer.1.up.weight"] = torch.randn(3, 4)  # not turned
    source["toy.layer.1.q.bias"] = torch.ones(2).long()
    source["copy.weight"] = torch.randn(4, 3)
    model = Toy()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(UserError) as error:
        load_into(model, source, TOY, source="the file")
    assert error.value.args[0] == (
        "the file does not fit Toy: "
        "missing: layer.0.k.bias, classifier.0.bias; "
        "unexpected: toy.layer.2.q.weight, stranger; "
        "present twice: toy.layer.0.q.weight and layer.0.q.weight; "
        "wrong: toy.layer.1.v.weight is (3, 4), should be (2, 4), "
        "toy.layer.1.q.bias is torch.int64, should be torch.float32, "
        "toy.layer.1.up.weight is (3, 4), should be (4, 3), "
        "copy.weight differs from toy.layer.0.up.weight, but this model shares the two"
    )
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def test_optional_parameters_are_all_there_or_all_absent():
    optional = maps.linear("blocks.{}.up", "layer.{}.up", transposed=True)
    source = {key: tensor for key, tensor in toy_file().items() if ".up." not in key}
    left = load_into(Toy(), dict(source), TOY, optional=optional)
    assert left == [f"blocks.{layer}.up.{part}" for layer in range(2) for part in ("weight", "bias")]
    source["toy.layer.0.up.bias"] = torch.randn(3)
    with pytest.raises(UserError, match=r"missing: layer.0.up.weight, layer.1.up.weight, layer.1.up.bias$"):
        load_into(Toy(), source, TOY, optional=optional)


def test_buffers_belong_to_a_checkpoint_unless_they_are_not_saved():
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(2))
            self.register_buffer("scratch", torch.zeros(2), persistent=False)

    key_map = maps.KeyMap(body=(maps.Entry("mean", ("running",)),))
    model = Buffered()
    load_into(model, {"running": torch.ones(2)}, key_map)
    assert model.mean.tolist() == [1, 1]
    assert list(to_hf(model, key_map)) == ["running"]
