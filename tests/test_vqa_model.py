"""The joined model: sharing images and padding change nothing, pixels change something, freezing freezes."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from model_helpers import SIZES, decoder, joined, tiny_model

from vqa_scratch.connectors import CONNECTORS, connector_class
from vqa_scratch.errors import UserError
from vqa_scratch.models import Bert, BertConfig, ConvStem, ViT, ViTConfig
from vqa_scratch.models.patches import PixelPatches, PixelPatchesConfig
from vqa_scratch.models.vqa import FROZEN_PARTS, IGNORE, VQAModel, labelled_loss
from vqa_scratch.nn.states import ImageEncoder
from vqa_scratch.systems import assembly
from vqa_scratch.systems.options import VQAOptions

# Sums in another order differ by a few units in the last place of float64, about 1e-16, times the size of the sums.
EXACT = 1e-10


def inputs(questions: int, images: int, generator: int = 0) -> dict[str, torch.Tensor]:
    """Ragged questions and answers; every image is asked about."""
    g = torch.Generator().manual_seed(generator)
    lengths = torch.randint(2, 8, (questions,), generator=g)
    answers = torch.randint(1, 5, (questions,), generator=g)
    index = torch.cat([torch.arange(images), torch.randint(images, (questions - images,), generator=g)])
    labels = torch.randint(30, (questions, 5), generator=g)
    labels[torch.arange(5) >= answers[:, None]] = IGNORE
    return {
        "pixel_values": torch.randn(images, 3, 24, 24, generator=g, dtype=torch.float64),
        "input_ids": torch.randint(40, (questions, 7), generator=g),
        "attention_mask": torch.arange(7) < lengths[:, None],
        "decoder_input_ids": torch.randint(30, (questions, 5), generator=g),
        "labels": labels,
        "image_index": index,
    }


def gradients(model: VQAModel) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys() and one
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(params=CONNECTORS)
def model(request) -> VQAModel:
    return tiny_model(request.param).double()


@pytest.fixture(params=["tokens", "mean"])
def reader(request) -> VQAModel:
    """A model with a text encoder."""
    return tiny_model(request.param).double()


@pytest.mark.parametrize("order", ["even", "uneven"])
def test_an_image_is_encoded_once_for_all_its_questions(model, order):
    """Logits, loss and every gradient equal those of a batch in which each question brings its own copy."""
    batch = inputs(questions=12, images=4)
    if order == "even":
        batch["image_index"] = torch.arange(4).repeat_interleave(3)
    apart = batch | {"pixel_values": batch["pixel_values"][batch["image_index"]], "image_index": None}
    seen = []
    states = model.image.states
    model.image.states = lambda pixels: (seen.append(len(pixels)), states(pixels))[1]
    results = []
    for arguments in (batch, apart):
        model.zero_grad()
        output = model(**arguments)
        output.loss.backward()
        results.append((output.logits.detach(), output.loss.detach(), gradients(model)))
    (logits, loss, grads), (logits_apart, loss_apart, grads_apart) = results
    assert seen == [4, 12]
    assert (logits - logits_apart).abs().max() < EXACT and abs(loss - loss_apart) < EXACT
    assert len(grads) == len(list(model.parameters()))
    assert largest_difference(grads, grads_apart) < EXACT
    if assembly.sizes_of(model)["connector"]["kind"] != "mean":  # a softmax over one key has no gradient
        assert all(g.abs().max() > 0 for g in grads.values())


def test_question_order_is_free(model):
    """Questions of an image need not stand together."""
    batch = inputs(9, 3)
    order = torch.randperm(9)
    mixed = {k: v[order] if len(v) == 9 else v for k, v in batch.items()}
    assert (model(**batch).logits[order] - model(**mixed).logits).abs().max() < EXACT


def test_an_answer_does_not_depend_on_its_batch_mates(model):
    """A question alone, without padding, gives the logits it has beside longer ones."""
    batch = inputs(6, 6)
    batch["image_index"] = None
    together = model(**batch).logits
    for row in range(6):
        length = int(batch["attention_mask"][row].sum())
        alone = model(
            batch["pixel_values"][row : row + 1],
            batch["input_ids"][row : row + 1, :length],
            None,
            batch["decoder_input_ids"][row : row + 1],
        ).logits[0]
        assert (alone - together[row]).abs().max() < EXACT


def test_padding_may_hold_anything(reader):
    batch = inputs(6, 3)
    other = batch["input_ids"].clone()
    other[~batch["attention_mask"]] = 39
    assert (other != batch["input_ids"]).any()
    assert torch.equal(reader(**batch).logits, reader(**batch | {"input_ids": other}).logits)
    changed = batch["input_ids"].clone()
    changed[:, 1] = (changed[:, 1] + 1) % 40  # position 1 is never padding
    assert ((reader(**batch).logits - reader(**batch | {"input_ids": changed}).logits).abs().amax((1, 2)) > 1e-6).all()


def test_another_image_gives_other_logits(model):
    """Only to the questions about it."""
    batch = inputs(8, 4)
    pixels = batch["pixel_values"].clone()
    pixels[2] = -pixels[2]
    moved = (model(**batch).logits - model(**batch | {"pixel_values": pixels}).logits).abs().amax((1, 2))
    about = batch["image_index"] == 2
    assert (moved[about] > 1e-6).all() and (moved[~about] < EXACT).all()


def test_decoder_tokens_see_only_what_is_before_them(model):
    batch = inputs(5, 5)
    ids = batch["decoder_input_ids"].clone()
    ids[:, 3] = (ids[:, 3] + 1) % 30
    moved = (model(**batch).logits - model(**batch | {"decoder_input_ids": ids}).logits).abs().amax(2)
    assert (moved[:, :3] == 0).all() and (moved[:, 3] > 0).all()


def test_a_question_that_is_read_must_be_given(reader):
    with pytest.raises(ValueError, match="^this model reads questions: give it input_ids$"):
        reader(**inputs(3, 3) | {"input_ids": None, "attention_mask": None})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_pixels_are_named(model, bad):
    batch = inputs(3, 3)
    batch["pixel_values"][1, 2, 3, 4] = bad
    with pytest.raises(ValueError, match="^pixel_values holds NaN or infinite values$"):
        model(**batch)


def test_loss_is_the_mean_over_asked_tokens(model):
    """Against cross-entropy of the full logits; the tokens not asked for change nothing."""
    batch = inputs(5, 5)
    output = model(**batch)
    expected = F.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE)
    assert abs(output.loss - expected) < 1e-5  # the loss is computed in float32
    total, right = labelled_loss(output.hidden, output.head, batch["labels"])
    asked = batch["labels"] != IGNORE
    assert abs(total / asked.sum() - expected) < 1e-5
    assert right == ((output.logits.argmax(-1) == batch["labels"]) & asked).sum()


def test_labels_that_ask_for_nothing_are_refused(model):
    batch = inputs(2, 2)
    with pytest.raises(ValueError, match="labels ask for nothing"):
        model(**batch | {"labels": torch.full((2, 5), IGNORE)})


# ------------------------------------------------------------------------------------------------ freezing


@pytest.mark.parametrize("what", FROZEN_PARTS)
def test_freeze(what):
    """What is named stays; the connector and the decoder's cross-attention always train."""
    model = tiny_model("tokens")
    line = model.freeze(what)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    output = model(**{k: v.float() if v.is_floating_point() else v for k, v in inputs(6, 3).items()})
    output.loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    new = {name for name in before if ".cross." in name or ".norm_cross." in name or name.startswith("connector.")}
    for part in ("image", "text", "decoder"):
        inside = {name for name in before if name.startswith(f"{part}.")}
        if part in FROZEN_PARTS[what]:
            assert moved & inside == inside & new, part
            assert f"{part} {sum(before[n].numel() for n in inside & new):,} of" in line
        else:
            assert moved & inside == inside, part
    assert new <= moved
    assert {"connector.modality", "connector.places"} <= new


def test_freeze_can_be_undone():
    model = tiny_model("tokens")
    model.freeze("all")
    model.freeze("nothing")
    assert all(p.requires_grad for p in model.parameters())


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="freeze must be one of nothing, encoders.*got 'encoder'"):
        tiny_model().freeze("encoder")


# ------------------------------------------------------------------------------------------------ building


@pytest.mark.parametrize("stem", ["conv", "linear"])
@pytest.mark.parametrize("kind", CONNECTORS)
def test_sizes_round_trip(kind, stem):
    """A model assembled from its JSON takes the state dict of the first; so does one with a convolutional stem."""
    config = ViTConfig(image_size=24, patch_size=8, dim=16, layers=1, heads=2, hidden=32, activation="relu")
    image: ImageEncoder = ViT(config, ConvStem(3, 16, 8) if stem == "conv" else None)
    if connector_class(kind).reads_pixels:
        image = PixelPatches(PixelPatchesConfig(8))
    text = Bert(BertConfig(layout="roberta", vocab_size=20, dim=24, layers=1, heads=2, hidden=32, pad_id=1))
    words, writer = (text, decoder(True)) if kind in ("tokens", "mean") else (None, decoder(False))
    model = joined(kind, image, words, writer, **SIZES.get(kind, {}))
    sizes = json.loads(json.dumps(assembly.sizes_of(model)))
    again = assembly.assemble(sizes).eval()
    again.load_state_dict(model.state_dict())
    arguments = torch.randn(1, 3, 24, 24), torch.tensor([[0, 5, 2]]), None, torch.tensor([[1, 2]])
    assert json.loads(json.dumps(assembly.sizes_of(again))) == sizes
    assert sizes["image"].get("stem") == (stem if isinstance(image, ViT) else None)
    assert (sizes["text"] is None) == (words is None)
    assert torch.equal(model(*arguments).logits, again(*arguments).logits)


def test_wrong_parts_are_refused():
    model = tiny_model("mean")
    with pytest.raises(ValueError, match="needs cross-attention"):
        VQAModel(model.image, model.text, model.connector, decoder(False))
    with pytest.raises(UserError, match="--connector must be tokens, .*, qformer or resampler, not 'sum'"):
        VQAOptions(connector="sum")
