"""What a step leaves out: copies where there is one row, projections that a memory takes in, a prompt of one token.

Each is held to the decoder's modules, which leave nothing out: to some hundred roundings of the largest score, GPT-2 in
float64 and T5, whose norm computes in float32, in that.
"""

from contextlib import nullcontext

import pytest
import torch
from test_generate_options import VOCABULARY, parts, prompts

from vqa_scratch.generate import Conditioning, begin
from vqa_scratch.generate.fast import FastState, cross_attention, state
from vqa_scratch.generate.fast.products import attend
from vqa_scratch.generate.fast.self_attention import OneRow, Rows
from vqa_scratch.generate.state import ModuleState
from vqa_scratch.models import GPT2, T5, GPT2Config, T5Config
from vqa_scratch.nn import taps
from vqa_scratch.nn.memory import Memory

STEPS, ROUNDINGS = 5, 300


@pytest.fixture(params=["gpt2", "t5"], scope="module")
def decoder(request) -> GPT2 | T5:
    if request.param == "gpt2":
        model = GPT2(GPT2Config(VOCABULARY, 40, dim=16, layers=2, heads=2, add_cross_attention=True))
    else:
        sizes = {"dim": 16, "head_dim": 6, "hidden": 24, "encoder_layers": 1, "decoder_layers": 2, "heads": 2}
        model = T5(T5Config(vocab_size=VOCABULARY, buckets=8, max_distance=10, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    return model.double().eval() if request.param == "gpt2" else model.eval()


def type_of(decoder) -> torch.dtype:
    return next(decoder.parameters()).dtype


class Watcher:
    """A trace that wants nothing: it makes `begin` step through the modules."""

    def wants(self, name: str) -> bool:
        return False


@torch.no_grad()
def scores(decoder, ids, mask, memory, tokens, kind: type) -> torch.Tensor:
    """Of the prompt and of every step (1 + STEPS, B, V), through the modules or that kind of self-attention."""
    if kind is ModuleState:
        with taps.activate(Watcher()):
            first, state = begin(decoder, ids, mask, Conditioning(memory), steps=STEPS)
    else:
        first, state = begin(decoder, ids, mask, Conditioning(memory), steps=STEPS)
    assert (type(state) if kind is ModuleState else type(state.own)) is kind
    return torch.stack([first, *(state.step(token) for token in tokens)])


def same(decoder, ids, mask, memory, kind: type) -> None:
    tokens = torch.randint(2, VOCABULARY, (STEPS, len(ids)), generator=torch.Generator().manual_seed(3))
    ours, modules = (scores(decoder, ids, mask, memory, tokens, k) for k in (kind, ModuleState))
    assert (ours - modules).abs().max() <= ROUNDINGS * torch.finfo(modules.dtype).eps * modules.abs().max()


def memory_of(rows: int, decoder) -> list[Memory]:
    """T5 reads one part, GPT-2 as many as it is given."""
    memory = parts(rows, dtype=type_of(decoder))
    return memory if isinstance(decoder, GPT2) else memory[1:]


@pytest.fixture(params=["absorbed", "projected"])
def way(request, monkeypatch) -> str:
    """Both ways to read a small memory; an assertion at the end says that it was this one."""
    if request.param == "projected":
        monkeypatch.setattr(cross_attention, "ABSORB_BYTES", -(10**9))
    taken, make = [], cross_attention.cross_attention
    monkeypatch.setattr(state, "cross_attention", lambda *given: taken.append(make(*given)) or taken[-1])
    yield request.param
    assert type(taken[-1]).__name__ == request.param.capitalize()


@pytest.mark.parametrize("padded", [False, True])
def test_one_row(decoder, padded, way):
    """A prompt of its own length or padded on the left, a memory with padding in it."""
    ids, _ = prompts(1)
    mask = torch.tensor([[False, False, True, True, True]]) if padded else None
    same(decoder, ids, mask, memory_of(1, decoder), OneRow)


def test_padding_of_one_row_costs_no_place(decoder):
    ids, _ = prompts(1)
    tokens, memory = torch.full((STEPS, 1), 3), memory_of(1, decoder)
    padded = scores(decoder, ids, torch.tensor([[False, False, True, True, True]]), memory, tokens, OneRow)
    alone = scores(decoder, ids[:, 2:], None, memory, tokens, OneRow)
    # Not to the bit: the prompt itself goes through products of another length.
    assert (padded - alone).abs().max() <= ROUNDINGS * torch.finfo(alone.dtype).eps * alone.abs().max()


@pytest.mark.parametrize("rows", [1, 3])
def test_a_prompt_of_one_token_is_a_step(decoder, rows, monkeypatch):
    ids, _ = prompts(rows, 1)
    kind = OneRow if rows == 1 else Rows
    same(decoder, ids, torch.ones_like(ids), memory_of(rows, decoder), kind)
    monkeypatch.setattr("vqa_scratch.generate.start.prefill", None)  # not needed for it
    with torch.no_grad():
        begin(decoder, ids, None, Conditioning(memory_of(rows, decoder)), steps=STEPS)


def test_a_prompt_of_one_token_is_checked_like_others(decoder):
    ids, _ = prompts(3, 1)
    with pytest.raises(ValueError, match="3 rows, but the memory serves 2"):
        begin(decoder, ids, None, Conditioning(memory_of(2, decoder)), steps=STEPS)
    if isinstance(decoder, GPT2):
        with pytest.raises(ValueError, match="41 tokens, but the position table serves 40"):
            begin(decoder, ids, None, Conditioning(memory_of(3, decoder)), steps=40)


@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("rows", [1, 6])
def test_a_memory_of_one_token(decoder, rows, shared):
    """It has all the weight, or none where it is padding; rows may share it."""
    if rows % shared:
        pytest.skip("one row shares nothing")
    ids, mask = prompts(rows)
    states = torch.randn(rows // shared, 1, 16, dtype=type_of(decoder), generator=torch.Generator().manual_seed(5))
    seen = torch.ones(rows // shared, 1, dtype=torch.bool)
    seen[-1] = rows == 1
    memory = Memory(states, seen, index=torch.arange(rows) // shared)
    same(decoder, ids, mask, [memory], OneRow if rows == 1 else Rows)


def test_one_row_with_nothing_to_read(decoder):
    """All of its memory is padding: it reads zeros, and the output projection adds its bias."""
    ids, _ = prompts(1)
    states = torch.randn(1, 4, 16, dtype=type_of(decoder), generator=torch.Generator().manual_seed(6))
    same(decoder, ids, None, [Memory(states, torch.zeros(1, 4, dtype=torch.bool))], OneRow)


@pytest.mark.parametrize("shared", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 4])
def test_dropping_rows(decoder, shared, tokens):
    """Of a memory of one token or several, one entry a row or shared; twice, since the first may leave it uneven."""
    ids, mask = prompts(6)
    states = torch.randn(6 // shared, tokens, 16, dtype=type_of(decoder), generator=torch.Generator().manual_seed(7))
    seen = torch.ones(6 // shared, tokens, dtype=torch.bool)
    seen[0, 0] = False
    memory, found = [Memory(states, seen, repeat=shared)], []
    for kind in (FastState, ModuleState):
        with torch.no_grad(), taps.activate(Watcher()) if kind is ModuleState else nullcontext():
            _, state = begin(decoder, ids, mask, Conditioning(memory), steps=STEPS)
            assert type(state) is kind
            state.step(torch.arange(6) + 2)
            state.keep(torch.tensor([5, 1, 0, 4]))
            between = state.step(torch.arange(4) + 3)
            state.keep(torch.tensor([2, 0]))
            found.append(torch.cat([between, state.step(torch.arange(2) + 5)]))
    ours, modules = found
    assert (ours - modules).abs().max() <= ROUNDINGS * torch.finfo(modules.dtype).eps * modules.abs().max()


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("biased", [False, True])
def test_attend_is_attention(scale, biased):
    torch.manual_seed(0)
    q, keys, v = (torch.randn(3, *shape, dtype=torch.float64) for shape in ((2, 5), (5, 7), (7, 5)))
    bias = torch.randn(3, 1, 7, dtype=torch.float64) if biased else None
    scores = scale * (q @ keys) + (0.0 if bias is None else bias)
    assert torch.allclose(attend(q, keys, v, bias, scale), scores.softmax(-1) @ v, atol=1e-14)
