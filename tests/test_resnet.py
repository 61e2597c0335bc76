"""The ResNet against torchvision's, on random weights saved to a file; and what its norms do."""

import pytest
import torch
import torchvision
from helpers import assert_close
from safetensors.torch import save_file
from torch import nn

from vqa_scratch.errors import UserError
from vqa_scratch.models.resnet import FrozenBatchNorm, ResNet, ResNetConfig, group_norm
from vqa_scratch.weights.files import read_safetensors

SMALL = ResNetConfig(block="basic", depths=(1, 1), widths=(16, 32))


def reference(name: str) -> nn.Module:
    """torchvision's model with random weights and statistics, in eval mode; its own start keeps the scale."""
    model = getattr(torchvision.models, name)(weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def features(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """What torchvision's model pools: (B, dim, h, w)."""
    x = model.maxpool(model.relu(model.bn1(model.conv1(pixels))))
    return model.layer4(model.layer3(model.layer2(model.layer1(x))))


@pytest.mark.parametrize(("name", "suffix"), [("resnet50", "safetensors"), ("resnet50", "pth"), ("resnet18", "pth")])
@torch.no_grad()
def test_features_equal_torchvisions(name, suffix, tmp_path):
    theirs = reference(name)
    file = tmp_path / f"weights.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(dict(theirs.state_dict()), file)
    ours = ResNet.from_pretrained(file)
    pixels = torch.randn(2, 3, 97, 64)  # a side that no stage divides
    wanted = features(theirs, pixels)
    # Fifty layers without a norm on their sum let the values grow; the tolerance is a share of them.
    assert_close(ours(pixels) / wanted.abs().max(), wanted / wanted.abs().max())
    pooled = ours(pixels).mean((2, 3))
    logits = theirs(pixels)
    assert_close(theirs.fc(pooled) / logits.abs().max(), logits / logits.abs().max())


@torch.no_grad()
def test_a_224_pixel_image_has_49_places():
    model = ResNet(ResNetConfig())
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 2048, 7, 7)
    assert (model.config.dim, model.config.grid(224), model.config.grid(64)) == (2048, 7, 2)


@torch.no_grad()
def test_two_stages_keep_an_eighth():
    model = ResNet(SMALL, group_norm)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 32, 8, 8)
    assert (SMALL.dim, SMALL.stride, SMALL.grid(64)) == (32, 8, 8)


def test_the_frozen_norm_is_batch_norm_in_eval():
    """Also while training, and its gradients too."""
    torch.manual_seed(0)
    theirs, ours = nn.BatchNorm2d(5), FrozenBatchNorm(5)
    for name, tensor in theirs.state_dict().items():
        if name != "num_batches_tracked":
            tensor.uniform_(0.5, 1.5)
            ours.state_dict()[name].copy_(tensor)
    theirs.eval(), ours.train()
    x = torch.randn(3, 5, 4, 4)
    # 1e-6: one rounding more or less of values of size 1.
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-6)
    for model in (theirs, ours):
        model(x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("norm", [FrozenBatchNorm, group_norm])
def test_an_image_does_not_know_its_neighbours(norm):
    """In training mode: batch norm with statistics of the batch would fail this."""
    model = ResNet(SMALL, norm).train()
    a, b, c = torch.randn(3, 1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(torch.cat([a, b]))[0], model(torch.cat([a, 3 * c]))[0], atol=1e-5, rtol=1e-5)


def test_weights_are_written_as_they_are_read(tmp_path):
    theirs = reference("resnet18")
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    ResNet.from_pretrained(tmp_path / "a.pth").save_pretrained(tmp_path / "b.safetensors")
    written = read_safetensors(tmp_path / "b.safetensors")
    kept = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.") and "num_batches" not in k}
    assert written.keys() == kept.keys() and all(torch.equal(written[k], v) for k, v in kept.items())


def test_files_that_do_not_fit_are_named(tmp_path):
    file = tmp_path / "x.pth"
    torch.save({"embeddings.weight": torch.zeros(2)}, file)
    with pytest.raises(UserError, match="not a ResNet in torchvision's layout"):
        ResNet.from_pretrained(file)
    weights = dict(reference("resnet18").state_dict())
    del weights["layer2.0.bn1.weight"]
    weights["layer9.weight"] = torch.zeros(1)
    torch.save(weights, file)
    with pytest.raises(UserError, match=r"missing: layer2\.0\.bn1\.weight; unexpected: layer9\.weight"):
        ResNet.from_pretrained(file)


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="block must be one of basic, bottleneck"):
        ResNetConfig(block="wide")
    with pytest.raises(ValueError, match="as many"):
        ResNetConfig(depths=(1, 2))
    with pytest.raises(ValueError, match="pixel_values must be"):
        ResNet(SMALL, group_norm)(torch.zeros(1, 1, 64, 64))
