"""The contrastive losses: closed forms, the reference, every pair by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from clip_helpers import captions, small
from helpers import STD
from test_clip import config_of
from torch import nn
from transformers import CLIPModel, SiglipModel

from vqa_scratch.models import CLIP
from vqa_scratch.systems.retrieval import retrieval
from vqa_scratch.training.contrastive import clamp_scale_, info_nce, sigmoid_loss, twins
from vqa_scratch.training.parameter_groups import split_parameters

LN10, BIAS = torch.tensor([math.log(10)]), torch.tensor([-10.0])


def unit(rows, width=8, dtype=torch.float32):
    return F.normalize(torch.randn(rows, width, dtype=dtype), dim=1)


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 7, 300])
def test_info_nce_without_spread_is_ln_b(rows):
    same = unit(1).expand(rows, -1)
    for scale in (0.0, 2.6592, 4.6):
        losses, _ = info_nce(same, same, torch.tensor([scale]))
        torch.testing.assert_close(losses, torch.full((rows,), math.log(rows)), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 64, 512])
def test_sigmoid_loss_at_its_start(rows):
    """Images and texts at right angles, scale 10, bias -10: softplus(10) for the own text, softplus(-10) for others."""
    images, texts = torch.eye(2)[:1].expand(rows, -1), torch.eye(2)[1:].expand(rows, -1)
    expected = math.log1p(math.exp(10)) + (rows - 1) * math.log1p(math.exp(-10))
    assert expected == pytest.approx(10.0 + 4.54e-5 * rows, abs=1e-4)
    # the tolerance is fp32's: 512 terms are added to 10
    assert sigmoid_loss(images, texts, LN10, BIAS)[0].mean().item() == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_reference(tmp_path, kind):
    theirs = {"clip": CLIPModel, "siglip": SiglipModel}[kind](config_of(kind)).eval()
    for name, parameter in theirs.named_parameters():
        parameter.normal_(std=1.0 if "class_emb" in name or "logit" in name else STD)
    theirs.save_pretrained(tmp_path)
    ours, pixels, (ids, _) = CLIP.from_pretrained(tmp_path), torch.randn(4, 3, 24, 24), captions()
    out = ours(pixels, ids)
    rest = (ours.logit_scale,) if kind == "clip" else (ours.logit_scale, ours.logit_bias)
    losses, right = (info_nce if kind == "clip" else sigmoid_loss)(*out[:2], *rest)
    expected = theirs(input_ids=ids, pixel_values=pixels, return_loss=True).loss
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(right, out.logits_per_image.argmax(1) == torch.arange(4))


def test_every_pair_by_hand_with_twins_left_out():
    """From the definition, one logit at a time; captions 0, 2 and 5 are the same, and so are 1 and 3."""
    images, texts = unit(6, dtype=torch.float64), unit(6, dtype=torch.float64)
    keys = torch.tensor([7, -3, 7, -3, 0, 7])
    left_out = twins(keys)
    assert not left_out.diagonal().any() and left_out.sum() == 6 + 2 and torch.equal(left_out, left_out.T)
    scale, bias = torch.tensor([1.3], dtype=torch.float64), torch.tensor([-2.0], dtype=torch.float64)
    for mask in (None, left_out):
        nce, sigmoid, first = [], [], []
        for i in range(6):
            others = [j for j in range(6) if j == i or mask is None or keys[i] != keys[j]]
            logit = {(a, b): math.exp(1.3) * float(images[a] @ texts[b]) for a in range(6) for b in range(6)}
            rows = math.log(sum(math.exp(logit[i, j]) for j in others))
            columns = math.log(sum(math.exp(logit[j, i]) for j in others))
            nce.append((rows + columns) / 2 - logit[i, i])
            first.append(max(others, key=lambda j: logit[i, j]) == i)
            signs = {j: 1 if i == j else -1 for j in others}
            sigmoid.append(sum(math.log1p(math.exp(-signs[j] * (logit[i, j] - 2.0))) for j in others))
        found = info_nce(images, texts, scale, left_out=mask), sigmoid_loss(images, texts, scale, bias, left_out=mask)
        for (losses, right), wanted in zip(found, (nce, sigmoid), strict=True):
            torch.testing.assert_close(losses, torch.tensor(wanted, dtype=torch.float64))
            assert right.tolist() == first


def test_pairs_of_one_image_are_twins_too():
    texts, images = torch.tensor([1, 2, 3, 1]), torch.tensor([5, 5, 6, 7])
    expected = [[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert twins(texts, images).int().tolist() == expected
    assert torch.equal(twins(texts) | twins(images), twins(texts, images))


def test_gradients_by_finite_differences():
    left_out = twins(torch.tensor([1, 2, 1, 3]))
    values = [x.requires_grad_() for x in (unit(4, 3, torch.float64), unit(4, 3, torch.float64))]
    values += [x.double().requires_grad_() for x in (LN10, BIAS)]
    assert torch.autograd.gradcheck(lambda x, y, t, _: info_nce(x, y, t, left_out=left_out)[0], values)
    assert torch.autograd.gradcheck(lambda *x: sigmoid_loss(*x, left_out=left_out)[0], values)


def test_bf16_embeddings_lose_nothing_in_the_loss():
    images, texts = unit(5).bfloat16(), unit(5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = info_nce(images, texts, LN10), sigmoid_loss(images, texts, LN10, BIAS)
    assert torch.equal(found[0][0], info_nce(images.float(), texts.float(), LN10)[0])
    assert torch.equal(found[1][0], sigmoid_loss(images.float(), texts.float(), LN10, BIAS)[0])
    assert {losses.dtype for losses, _ in found} == {torch.float32}


def test_the_scale_is_clamped_after_the_step():
    scale = nn.Parameter(torch.tensor([4.6]))
    optimizer = torch.optim.SGD([scale], lr=1.0)
    for gradient, after in ((-1.0, math.log(100)), (0.5, math.log(100) - 0.5), (-0.2, math.log(100) - 0.3)):
        scale.grad = torch.tensor([gradient])
        optimizer.step()
        clamp_scale_(scale)
        assert scale.item() == pytest.approx(after) and scale.requires_grad


def test_what_decays():
    """Scale and bias, tables and norms do not; the projections of the heads do."""
    for kind in ("clip", "siglip"):
        model = small(kind)
        hidden, wide, rest = split_parameters(model)
        names = {id(p): name for name, p in model.named_parameters()}
        assert all(".blocks." in names[id(p)] for p in hidden)
        decays = {"clip": {"image.patch_embed.weight", "image_head.projection.weight", "text_head.weight"}}
        decays["siglip"] = {"image.patch_embed.weight", "text_head.weight"} | {
            f"image_head.{name}.weight" for name in ("cross.qkv", "cross.out", "mlp.up", "mlp.down")
        }
        assert {names[id(p)] for p in wide} == decays[kind]
        assert "logit_scale" in {names[id(p)] for p in rest}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_it_learns_pairs_by_heart(kind):
    """Model, loss, clamp and scores together: 16 images and their captions find each other after 60 steps."""
    torch.manual_seed(0)
    model, pixels, (ids, _) = small(kind), torch.randn(16, 3, 12, 12), captions([6] * 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        images, texts, _ = model(pixels, ids)
        if model.logit_bias is None:
            each, right = info_nce(images, texts, model.logit_scale)
        else:
            each, right = sigmoid_loss(images, texts, model.logit_scale, model.logit_bias)
        optimizer.zero_grad()
        each.mean().backward()
        optimizer.step()
        clamp_scale_(model.logit_scale)
        losses.append(each.mean().item())
    assert right.all() and losses[-1] < 0.1 * losses[0] and model.logit_scale.exp() <= 100.001
    with torch.no_grad():
        images, texts, _ = model(pixels, ids)
    figures = retrieval(images, texts, [str(number) for number in range(16)])
    assert figures["accuracy"] == figures["image_to_text"]["median_rank"] == 1
