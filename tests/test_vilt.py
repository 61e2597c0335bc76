"""ViLT: parity with `transformers` through saved files, images of many sizes, and what must not matter."""

import json
import random

import pytest
import torch
import transformers as hf
from helpers import assert_close, saved

from vqa_scratch.errors import UserError
from vqa_scratch.models import ViLT, ViLTClassifier, ViLTConfig
from vqa_scratch.models.vilt import answer_loss
from vqa_scratch.weights.files import read_checkpoint, write_checkpoint


def config(**changes) -> hf.ViltConfig:
    """A small reference; weights large enough (see `helpers`) that a wrong place or mask shows."""
    values = {
        "vocab_size": 50,
        "max_position_embeddings": 12,
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "image_size": 24,
        "patch_size": 8,
        "initializer_range": 0.2,
        "layer_norm_eps": 1e-12,
    }
    return hf.ViltConfig(**values | changes)


def random_tables(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    """The reference starts its class token and position table at zero, which would hide them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position_embeddings" in name or "cls_token" in name:
                parameter.normal_(std=0.5)
    return model


def inputs(sizes: list[tuple[int, int]], patch: int = 8, words: int = 9, seed: int = 0) -> dict:
    """One question of some length on an image of each size, padded to the largest; sizes in patches."""
    rng = torch.Generator().manual_seed(seed)
    height, width = (patch * max(size[axis] for size in sizes) for axis in (0, 1))
    pixels = torch.randn(len(sizes), 3, height, width, generator=rng)
    mask = torch.zeros(len(sizes), height, width, dtype=torch.long)
    for row, (h, w) in enumerate(sizes):
        mask[row, : h * patch, : w * patch] = 1
    lengths = torch.randint(2, words + 1, (len(sizes),), generator=rng)
    lengths[0] = words
    return {
        "pixel_values": pixels,
        "pixel_mask": mask,
        "input_ids": torch.randint(1, 50, (len(sizes), words), generator=rng),
        "attention_mask": (torch.arange(words) < lengths[:, None]).long(),
        "token_type_ids": torch.randint(0, 2, (len(sizes), words), generator=rng),
    }


SIZES = [
    [(3, 3)],  # the size of the table
    [(2, 5)],
    [(1, 1), (1, 6)],  # a single patch beside a strip of them
    [(3, 3), (2, 4), (4, 2), (1, 3)],
    [(5, 4)] * 3,
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False, "hidden_act": "relu"}], ids=["plain", "other"])
def test_pooled_output_equals_the_reference(tmp_path, sizes, changes):
    """The reference shuffles patches by lot, so only what does not depend on their order can be compared."""
    theirs = saved(random_tables(hf.ViltModel(config(**changes))), tmp_path)
    ours = ViLT.from_pretrained(tmp_path)
    batch = inputs(sizes)
    with torch.no_grad():
        assert_close(ours(**batch), theirs(**batch).pooler_output)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_logits_and_loss_equal_the_reference(tmp_path, sizes):
    labels = [f"answer {i}" for i in range(7)]
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    theirs = saved(random_tables(hf.ViltForQuestionAnswering(config(**names))), tmp_path)
    ours = ViLTClassifier.from_pretrained(tmp_path)
    assert ours.labels == tuple(labels)
    batch = inputs(sizes, seed=1)
    targets = torch.rand(len(sizes), 7).round(decimals=1)
    with torch.no_grad():
        wanted = theirs(**batch, labels=targets)
        logits = ours(**batch)
        assert_close(logits, wanted.logits)
        torch.testing.assert_close(answer_loss(logits, targets) / len(sizes), wanted.loss, atol=1e-5, rtol=1e-5)


def test_random_sizes(tmp_path):
    """Many shapes of model and of image."""
    draw = random.Random(0)
    for trial in range(12):
        heads, patch, grid = draw.choice((1, 2, 3)), draw.choice((2, 4, 8)), draw.choice((1, 2, 5))
        changes = {
            "num_attention_heads": heads,
            "hidden_size": 8 * heads,
            "num_hidden_layers": draw.choice((1, 2)),
            "patch_size": patch,
            "image_size": patch * grid,
            "type_vocab_size": 2,
        }
        theirs = saved(random_tables(hf.ViltModel(config(**changes))), tmp_path / str(trial))
        sizes = [(draw.randint(1, 6), draw.randint(1, 6)) for _ in range(3)]
        batch = inputs(sizes, patch, seed=trial)
        with torch.no_grad():
            assert_close(ViLT.from_pretrained(tmp_path / str(trial))(**batch), theirs(**batch).pooler_output)


def test_the_checkpoint_of_masked_words_loads(tmp_path):
    """Layout of dandelin/vilt-b32-mlm: its head is read past, pooler included where the file has one."""
    theirs = saved(random_tables(hf.ViltForMaskedLM(config())), tmp_path)
    batch = inputs([(3, 3), (2, 2)])
    with torch.no_grad():
        assert_close(ViLT.from_pretrained(tmp_path)(**batch), theirs.vilt(**batch).pooler_output)
    with pytest.raises(UserError, match="no head over answers"):
        ViLTClassifier.from_pretrained(tmp_path)


def test_old_files_with_buffers_load(tmp_path):
    """pytorch_model.bin of the released checkpoints holds a buffer of position ids."""
    saved(random_tables(hf.ViltForQuestionAnswering(config())), tmp_path)
    settings, tensors = read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    tensors["vilt.embeddings.text_embeddings.position_ids"] = torch.arange(12)[None]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert len(ViLTClassifier.from_pretrained(tmp_path).labels) == settings.get("num_labels", 2)


@pytest.mark.parametrize("kind", [hf.ViltModel, hf.ViltForQuestionAnswering])
def test_export_goes_round(tmp_path, kind):
    """Key for key and bit for bit, and the reference accepts the file without a word of missing keys."""
    saved(random_tables(kind(config(num_labels=5))), tmp_path / "theirs")
    own = ViLT if kind is hf.ViltModel else ViLTClassifier
    own.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    before, after = read_checkpoint(tmp_path / "theirs")[1], read_checkpoint(tmp_path / "ours")[1]
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    _, report = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


# ------------------------------------------------------------------------------------------------ invariants


@pytest.fixture
def model() -> ViLT:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "dim": 24, "layers": 2, "heads": 2, "hidden": 40, "image_size": 24, "patch_size": 8}
    return ViLT(ViLTConfig(**sizes, init_std=0.2)).eval()


def test_images_shared_by_questions(model):
    """`image_index` is the same as giving each question a copy of its image."""
    batch = inputs([(3, 3), (2, 2), (2, 2), (3, 3), (2, 2)])
    index = torch.tensor([0, 0, 1, 1, 1])
    few = {name: batch.pop(name)[:2] for name in ("pixel_values", "pixel_mask")}
    with torch.no_grad():
        shared = model(**batch, **few, image_index=index)
        copied = model(**batch, **{name: tensor[index] for name, tensor in few.items()})
    torch.testing.assert_close(shared, copied)


def test_padding_does_not_matter(model):
    """Neither words nor pixels beyond the masks, nor the company an image is in."""
    batch = inputs([(2, 3), (3, 2)])
    with torch.no_grad():
        before = model(**batch)
        batch["pixel_values"] = batch["pixel_values"].masked_fill(~batch["pixel_mask"].bool()[:, None], 7.0)
        batch["input_ids"] = batch["input_ids"].masked_fill(~batch["attention_mask"].bool(), 9)
        torch.testing.assert_close(model(**batch), before)
        alone = {name: tensor[:1] for name, tensor in batch.items()}
        alone |= {"pixel_values": alone["pixel_values"][:, :, :16], "pixel_mask": None}
        torch.testing.assert_close(model(**alone), before[:1])


def test_places_matter(model):
    """Mirrored patches are another picture."""
    batch = inputs([(3, 3)])
    flipped = batch | {"pixel_values": batch["pixel_values"].unflatten(3, (3, 8)).flip(3).flatten(3)}
    with torch.no_grad():
        assert (model(**batch) - model(**flipped)).abs().max() > 1e-2


def test_targets_pull_the_logits():
    """The loss of one label is its binary cross-entropy; at its minimum the sigmoid is the soft target."""
    targets = torch.tensor([[0.3, 0.0, 1.0, 0.6]])
    logits = torch.zeros(1, 4, requires_grad=True)
    answer_loss(logits, targets).backward()
    torch.testing.assert_close(logits.grad, 0.5 - targets)
    assert answer_loss(torch.zeros(1, 4), targets).item() == pytest.approx(4 * 0.6931472)


# ------------------------------------------------------------------------------------------------- bad input


def test_bad_input(model, tmp_path):
    batch = inputs([(3, 3)])
    with pytest.raises(ValueError, match="does not divide into patches of 8x8"):
        model(**batch | {"pixel_values": torch.zeros(1, 3, 24, 20), "pixel_mask": None})
    with pytest.raises(ValueError, match="pixel_mask is"):
        model(**batch | {"pixel_mask": torch.ones(1, 16, 24)})
    with pytest.raises(ValueError, match="position table serves 40"):
        model(batch["pixel_values"], torch.ones(1, 41, dtype=torch.long))
    with pytest.raises(UserError, match="max_image_length = 100; here it can only be -1"):
        ViLTConfig.from_hf({"model_type": "vilt", "max_image_length": 100})
    with pytest.raises(UserError, match="two modalities"):
        ViLTConfig(modalities=1)
    with pytest.raises(UserError, match="different labels"):
        ViLTClassifier(model, ("yes", "yes"))


def test_labels_must_fit_the_head(tmp_path):
    saved(hf.ViltForQuestionAnswering(config(num_labels=3)), tmp_path)
    settings, tensors = read_checkpoint(tmp_path)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    write_checkpoint(tmp_path, json.loads(json.dumps(settings)) | {"id2label": {"0": "yes"}}, tensors)
    with pytest.raises(UserError, match="names 1 classes, the head has 3"):
        ViLTClassifier.from_pretrained(tmp_path)
