"""The captioner: one forward pass for training and generation, loss on the text alone, keys that are places."""

import json

import pytest
import torch
from model_helpers import decoder, greedy, tiny_captioner

from vqa_scratch.errors import UserError
from vqa_scratch.models import VQAModel
from vqa_scratch.models.vqa import IGNORE, VQAOutput
from vqa_scratch.nn.connecting import Conditioning
from vqa_scratch.systems import assembly
from vqa_scratch.systems.options import CaptionOptions


@pytest.fixture
def model() -> VQAModel:
    return tiny_captioner()


def given(model: VQAModel, image: torch.Tensor) -> Conditioning:
    """What the decoder is given for some images."""
    return model.connector(model.image.states(image), None)


def run(model: VQAModel, image: torch.Tensor, *ids: torch.Tensor, **more) -> VQAOutput:
    """The model without a question: images, decoder tokens, labels."""
    return model(image, None, None, *ids, **more)


def pixels(number: int, side: int = 64) -> torch.Tensor:
    return torch.randn(number, 3, side, side)


def test_every_place_is_a_key(model):
    (memory,) = given(model, pixels(2)).memory
    assert memory.states.shape == (2, 64, 32) and memory.mask is None
    (memory,) = given(model, pixels(1, 96)).memory  # another image size: the table of places is resized
    assert memory.states.shape == (1, 144, 32)


def test_queries_and_keys_learn(model):
    """With one key, or copies of one, the softmax is constant and both gradients vanish (1e-10 or so)."""
    ids = torch.tensor([[1, 5, 6, 7]])
    run(model, pixels(1), ids, ids).loss.backward()
    cross = model.decoder.blocks[0].cross
    keys, values = cross.kv.weight.grad.chunk(2)
    assert cross.q.weight.grad.norm() > 1e-3 and keys.norm() > 1e-3 and values.norm() > 1e-3


@torch.no_grad()
def test_another_image_gives_other_logits(model):
    ids = torch.tensor([[1, 5, 6], [1, 5, 6]])
    a, b = run(model, pixels(2), ids).logits
    assert (a - b).abs().max() > 1e-2


@torch.no_grad()
def test_generation_goes_through_the_trained_path(model):
    """What greedy decoding with a cache says is what the forward pass finds most likely, token by token."""
    image, prompt = pixels(3), torch.tensor([[1]] * 3)
    made = greedy(model.decoder, prompt, None, given(model, image).memory, max_new_tokens=6, eos_id=2)
    texts = torch.cat([prompt, made.ids], 1)
    logits = run(model, image, texts[:, :-1]).logits
    for row, length in enumerate(made.lengths.tolist()):
        assert logits[row, :length].argmax(-1).tolist() == made.ids[row, :length].tolist()


def test_the_loss_is_on_the_text_alone(model):
    """Labels on the prompt and on padding are IGNORE: the loss is the mean of the labelled tokens' own."""
    image = pixels(2)
    ids = torch.tensor([[8, 9, 1, 5, 6], [8, 1, 5, 0, 0]])
    labels = torch.tensor([[IGNORE, IGNORE, 5, 6, 2], [IGNORE, 5, 2, IGNORE, IGNORE]])
    output = run(model, image, ids, labels)
    log_probs = output.logits.log_softmax(-1)
    kept = [(0, 2, 5), (0, 3, 6), (0, 4, 2), (1, 1, 5), (1, 2, 2)]
    expected = -sum(log_probs[b, t, token] for b, t, token in kept) / len(kept)
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=0)  # rounding of five values of size 3
    with pytest.raises(ValueError, match="labels ask for nothing"):
        run(model, image, ids, torch.full_like(ids, IGNORE))


def test_an_image_is_encoded_once_for_its_texts(model):
    """Sharing the keys of an image equals giving every text its own copy, gradients too."""
    image, index = pixels(2), torch.tensor([0, 0, 1, 1])
    ids = torch.randint(3, 30, (4, 5))
    losses, gradients = [], []
    for pictures, where in ((image, index), (image[index], None)):
        model.zero_grad()
        loss = run(model, pictures, ids, ids, image_index=where).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.image.conv1.weight.grad.clone())
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_freezing_keeps_what_is_new_trainable(model):
    line = model.freeze("decoder")
    assert "decoder" in line and "connector" in line
    free = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "decoder.blocks.0.cross.q.weight" in free and "decoder.tokens.weight" not in free
    assert "image.conv1.weight" in free
    model.freeze("image_encoder")
    assert not any(p.requires_grad for p in model.image.parameters())
    assert all(p.requires_grad for name, p in model.named_parameters() if not name.startswith("image."))
    with pytest.raises(UserError, match="--freeze must be nothing, image_encoder, decoder or all, not 'text_encoder'"):
        CaptionOptions(freeze="text_encoder")  # it has none


def test_sizes_make_the_same_model_again(model):
    sizes = json.loads(json.dumps(assembly.sizes_of(model)))
    assert sizes["text"] is None and sizes["image"]["model_type"] == "resnet" and sizes["image"]["norm"] == "group"
    again = assembly.assemble(sizes)
    again.load_state_dict(model.state_dict())
    assert json.loads(json.dumps(assembly.sizes_of(again))) == sizes


def test_bad_input_is_named(model):
    broken = pixels(1)
    broken[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="pixel_values holds NaN"):
        run(model, broken, torch.tensor([[1]]))
    with pytest.raises(ValueError, match="cross-attention"):
        VQAModel(model.image, None, model.connector, decoder(False, dim=32))
