"""Greedy decoding with a cache, against decoding by running the whole sequence again for every token."""

import gc
import weakref

import pytest
import torch
from model_helpers import greedy

from vqa_scratch.generate import Conditioning, begin
from vqa_scratch.models import GPT2, GPT2Config
from vqa_scratch.nn.memory import Memory

FILL = 0


@pytest.fixture(scope="module")
def decoder() -> GPT2:
    config = GPT2Config(vocab_size=12, max_positions=40, dim=16, layers=2, heads=2, add_cross_attention=True)
    model = GPT2(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.4)  # uneven enough that rows say different things
    return model


def memory(rows: int) -> list[Memory]:
    g = torch.Generator().manual_seed(1)
    image = torch.randn(rows // 2, 5, 16, generator=g, dtype=torch.float64)
    text = torch.randn(rows, 4, 16, generator=g, dtype=torch.float64)
    mask = torch.arange(4) < torch.randint(1, 5, (rows, 1), generator=g)
    return [Memory(image, index=torch.arange(rows) // 2), Memory(text, mask)]


@torch.no_grad()
def by_running_again(decoder, prompt, parts, steps, eos):
    """Tokens and log-probabilities of one row, without cache and without padding."""
    ids, scores = prompt.tolist(), []
    while len(scores) < steps and (not scores or ids[-1] != eos):
        logits = decoder(torch.tensor([ids]), memory=parts)[0, -1]
        score, token = logits.float().log_softmax(-1).max(-1)
        ids.append(int(token))
        scores.append(float(score))
    return ids[len(prompt) :], scores


def row_of(parts: list[Memory], row: int) -> list[Memory]:
    image, text = parts
    return [Memory(image.states[row // 2 : row // 2 + 1]), Memory(text.states[row : row + 1], text.mask[row : row + 1])]


@pytest.mark.parametrize("prompts", ["one token", "left-padded"])
def test_the_cache_changes_nothing(decoder, prompts):
    """Every row: the same tokens, log-probabilities and length as alone, without cache and without padding."""
    rows, steps, width = 24, 12, 1 if prompts == "one token" else 6
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(2, 12, (rows, width), generator=g)
    lengths = torch.randint(1, width + 1, (rows,), generator=g)
    mask = torch.arange(width) >= width - lengths[:, None]
    parts = memory(rows)
    endless = greedy(decoder, ids, mask, parts, max_new_tokens=steps, eos_id=-1).ids
    # As end token serves one that about half of the rows come to say.
    eos = min(range(1, 12), key=lambda token: abs(int((endless == token).any(1).sum()) - rows // 2))
    made = greedy(decoder, ids, mask, parts, max_new_tokens=steps, eos_id=eos, fill=FILL)
    ended = set()
    for row in range(rows):
        tokens, scores = by_running_again(
            decoder, ids[row, width - int(lengths[row]) :], row_of(parts, row), steps, eos
        )
        length = int(made.lengths[row])
        assert made.ids[row, :length].tolist() == tokens
        assert (made.ids[row, length:] == FILL).all() and (made.log_probs[row, length:] == 0).all()
        # log-probabilities are float32
        assert torch.allclose(made.log_probs[row, :length].double(), torch.tensor(scores).double(), atol=1e-5)
        ended.add(tokens[-1] == eos)
    assert ended == {True, False}, "some rows must end by themselves and some by the limit"


def test_padding_of_a_prompt_may_hold_anything(decoder):
    ids, mask = torch.tensor([[7, 7, 3, 4]]), torch.tensor([[False, False, True, True]])
    other = torch.tensor([[9, 2, 3, 4]])
    parts = row_of(memory(2), 0)
    one, two = (greedy(decoder, i, mask, parts, max_new_tokens=6, eos_id=1) for i in (ids, other))
    assert torch.equal(one.ids, two.ids) and torch.equal(one.log_probs, two.log_probs)


def test_no_mask_means_no_padding(decoder):
    ids, parts = torch.tensor([[3, 4, 5]]), row_of(memory(2), 0)
    one = greedy(decoder, ids, None, parts, max_new_tokens=6, eos_id=1)
    two = greedy(decoder, ids, torch.ones(1, 3), parts, max_new_tokens=6, eos_id=1)
    assert torch.equal(one.ids, two.ids)


def test_it_stops_when_all_rows_have_ended(decoder):
    """With the first token of row 0 as the end, its decoding takes one step."""
    ids, parts = torch.tensor([[3]]), row_of(memory(2), 0)
    first = int(greedy(decoder, ids, None, parts, max_new_tokens=1, eos_id=1).ids[0, 0])
    made = greedy(decoder, ids, None, parts, max_new_tokens=30, eos_id=first)
    assert made.ids.tolist() == [[first]] and made.lengths.tolist() == [1]


@pytest.mark.parametrize("parts", [1, 2])
def test_keys_go_with_the_state(decoder, parts):
    """At the book's sizes 79 MB, which should not wait for a garbage collection."""
    gc.disable()
    try:
        with torch.no_grad():
            prompt = torch.zeros(4, 2, dtype=torch.long)
            _, state = begin(decoder, prompt, None, Conditioning(memory(4)[2 - parts :]), steps=3)
            state.step(prompt[:, 0])
        keys = [weakref.ref(part) for part in (state.own, state.memory)]
        del state
        assert [key() for key in keys] == [None, None]
    finally:
        gc.enable()
