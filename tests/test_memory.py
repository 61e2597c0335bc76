"""Memories and caches: what is shared, folded, kept or dropped, against attention by plain calls."""

import pytest
import torch
from helpers import brute_force_attention, use_backend

from vqa_scratch.kernels import reference
from vqa_scratch.nn import DecoderCache, KVCache, Memory, MultiHeadAttention
from vqa_scratch.nn.attention import BACKENDS

# Differences of fp32 sums over a few keys; outputs are of size 1.
CLOSE = {"atol": 2e-6, "rtol": 0.0}
GRADIENTS_CLOSE = {"atol": 2e-5, "rtol": 0.0}


# --- memories ---------------------------------------------------------------------------------------------------------

INDICES = {
    "in order": [0, 0, 1, 1, 2, 2],
    "shuffled": [2, 0, 1, 0, 2, 1],
    "nearly even": [0, 1, 1, 2, 0, 1],
    "one unused": [1, 1, 2, 2, 2, 1],
    "too uneven to share": [2, 0, 2, 2, 2, 2],
}


@pytest.mark.parametrize("backend", [*BACKENDS, "merged"])
@pytest.mark.parametrize("order", INDICES)
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_memory_of_parts_is_one_long_memory(backend, order, parts, monkeypatch, request):
    """Outputs and gradients equal those of expanding the entries and concatenating the parts by hand."""
    merged = []
    if backend == "merged":  # as on a GPU with Triton: each part by itself, merged by log-sum-exps
        monkeypatch.setattr("vqa_scratch.kernels.takes_attention", lambda q, **options: True)
        monkeypatch.setattr("vqa_scratch.kernels.DEVICES", {"cpu"})
        monkeypatch.setattr(
            "vqa_scratch.kernels.merge", lambda pieces: merged.append(len(pieces)) or reference.merge(pieces)
        )
    else:
        use_backend(monkeypatch, backend)
    module = MultiHeadAttention(12, 2, context_dim=10, scale=0.6)
    index = torch.tensor(INDICES[order])
    shared, own = torch.randn(3, 4, 10, requires_grad=True), torch.randn(6, 3, 10, requires_grad=True)
    own_mask = torch.rand(6, 3) > 0.4
    shared_mask = torch.tensor([[True, False, True, True], [False] * 4, [False, False, True, True]])
    own_mask[2] = own_mask[0] = False  # these rows read nothing where their shared entry is 1
    last = torch.randn(1, 2, 10, requires_grad=True)
    x = torch.randn(6, 5, 12, requires_grad=True)

    memories = [Memory(shared, shared_mask, index), Memory(own, own_mask), Memory(last, None, torch.zeros(6).long())]
    states = torch.cat([shared[index], own, last.expand(6, -1, -1)][:parts], 1)
    mask = torch.cat([shared_mask[index], own_mask, torch.ones(6, 2, dtype=torch.bool)][:parts], 1)
    leaves = [x, shared, own, last][: parts + 1] + list(module.parameters())
    weight = torch.randn(6, 5, 12)
    got, expected = module(x, memories[:parts]), module(x, states, mask)
    assert merged == ([parts] if "merged" in request.node.name and parts > 1 else [])
    torch.testing.assert_close(got, expected, **CLOSE)
    for one, other in zip(
        torch.autograd.grad((got * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, **GRADIENTS_CLOSE)

    (q,), (k, v) = (
        module._split(module.q(x), module.heads),
        module._split(module.kv(states), module.heads, module.heads),
    )
    allowed = mask[:, None, None].expand(-1, 2, 5, -1)
    z = brute_force_attention(q, k, v, allowed, None, module.scale)
    torch.testing.assert_close(got, module.out(z.transpose(1, 2).flatten(2).float()), **CLOSE)


@pytest.mark.parametrize("parts", [1, 2])
def test_weights_on_memories_are_dropped_while_training(parts, monkeypatch):
    """Also where the kernel could join the parts: it drops none, so it is asked with the dropout that is wanted."""
    asked = []
    monkeypatch.setattr("vqa_scratch.kernels.DEVICES", {"cpu"})
    monkeypatch.setattr(
        "vqa_scratch.kernels.takes_attention", lambda q, dropout=0.0: asked.append(dropout) or dropout == 0
    )
    module = MultiHeadAttention(12, 2, context_dim=12, dropout=0.5)
    memories, x = [Memory(torch.randn(6, 40, 12)) for _ in range(parts)], torch.randn(6, 5, 12)
    with torch.no_grad():
        one, two, still = module(x, memories), module(x, memories), module.eval()(x, memories)
    assert not torch.allclose(one, two, atol=1e-2) and torch.equal(still, module(x, memories))
    assert asked == ([0.5, 0.5, 0.0, 0.0] if parts > 1 else [])


@pytest.mark.parametrize("order", INDICES)
def test_the_states_that_each_row_reads(order):
    states, index = torch.randn(3, 2, 4, 10), torch.tensor(INDICES[order])
    for memory, expected in (
        (Memory(states[:, 0], index=index), states[index]),
        (Memory(states[:, 0], repeat=2), states[torch.arange(6) // 2]),
    ):
        assert torch.equal(memory.project(states, states).per_row().k, expected)


@pytest.mark.parametrize("order", INDICES)
def test_memories_under_autocast(order):
    """bfloat16 has 8 bits: outputs of size 1 agree to a few hundredths, gradients exist."""
    module = MultiHeadAttention(12, 2, context_dim=12)
    memories = [Memory(torch.randn(3, 4, 12), index=torch.tensor(INDICES[order])), Memory(torch.randn(6, 3, 12))]
    x = torch.randn(6, 5, 12)
    with torch.autocast("cpu", torch.bfloat16):
        low = module(x, memories)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), module(x, memories), atol=0.03, rtol=0)
    low.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("order", INDICES)
def test_rows_fold_into_their_entry_and_back(order):
    index = torch.tensor(INDICES[order])
    sharing = Memory(torch.randn(3, 3, 8), index=index).sharing
    assert (sharing is None) == (order == "too uneven to share")  # 15 places for 6 rows: more than half empty
    if sharing is None:
        return
    assert sharing.rows == 6 and torch.equal(sharing.entry_of_row(index.device), index)
    x = torch.randn(6, 2, 5, 8)
    folded = sharing.fold(x)
    assert folded.shape == (3, 2, 5 * sharing.repeat, 8)
    assert torch.equal(sharing.unfold(folded), x)
    for entry in range(3):
        expected = x[index == entry].transpose(0, 1).flatten(1, 2)
        assert torch.equal(folded[entry, :, : expected.shape[1]], expected)
        assert folded[entry, :, expected.shape[1] :].abs().sum() == 0


def test_uneven_rows_share_entries_where_it_pays():
    sharing = Memory(torch.randn(3, 2, 8), index=torch.tensor([2, 0, 0, 1, 1])).sharing
    assert sharing == (3, 2, sharing.slot) and sharing.slot.tolist() == [4, 0, 1, 2, 3]
    x = torch.randn(5, 1, 4, 6)
    assert sharing.fold(x).shape == (3, 1, 8, 6) and torch.equal(sharing.unfold(sharing.fold(x)), x)
    assert Memory(torch.randn(2, 3, 8), repeat=3).sharing.rows == 6


def test_index_in_order_becomes_a_repeat():
    assert Memory(torch.randn(2, 3, 8), index=torch.tensor([0, 0, 1, 1])).sharing == (2, 2, None)
    assert Memory(torch.randn(2, 3, 8), index=torch.tensor([0, 1, 0, 1])).sharing.slot is not None


# --- caches -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_self_cache_equals_whole_sequence_in_any_steps():
    module = MultiHeadAttention(12, 2)
    x = torch.randn(3, 40, 12)
    key_mask = torch.rand(3, 40) > 0.2
    whole = module(x, key_mask=key_mask, causal=True)
    for steps in ([40], [1] * 40, [5, 1, 30, 4]):
        cache, out, end = KVCache(), [], 0
        for step in steps:
            start, end = end, end + step
            out.append(module(x[:, start:end], key_mask=key_mask[:, :end], causal=True, cache=cache))
        torch.testing.assert_close(torch.cat(out, 1), whole, **CLOSE)
        assert cache.length == 40


@torch.no_grad()
def test_cache_rows_can_be_dropped_reordered_and_repeated():
    module = MultiHeadAttention(12, 2)
    cross = MultiHeadAttention(12, 2, context_dim=12)
    x = torch.randn(4, 6, 12)
    memories = [Memory(torch.randn(2, 3, 12), torch.rand(2, 3) > 0.3, repeat=2), Memory(torch.randn(4, 2, 12))]
    per_row = torch.cat([memories[0].states.repeat_interleave(2, 0), memories[1].states], 1)
    mask = torch.cat([memories[0].mask.repeat_interleave(2, 0), torch.ones(4, 2, dtype=torch.bool)], 1)
    cache = DecoderCache(2)  # the second layer stays without cross-attention
    for layer in cache:
        module(x[:, :5], causal=True, cache=layer)
    cross(x, memories, cache=cache[0])
    rows = torch.arange(4)
    for choice in ([1, 0, 3, 2], [0, 0, 2, 2], [3, 1, 1], [2, 0], [1, 1, 1, 1]):
        choice = torch.tensor(choice)
        cache.select(choice)
        rows = rows[choice]
        assert cache.length == 5
        torch.testing.assert_close(cross(x[rows], cache=cache[0]), cross(x[rows], per_row[rows], mask[rows]), **CLOSE)
        for layer in cache:
            copy = KVCache()
            module(x[rows, :5], causal=True, cache=copy)
            k, v = (kept[:, :, :5] for kept in layer.contents)
            torch.testing.assert_close(k, copy.contents[0][:, :, :5])
            torch.testing.assert_close(v, copy.contents[1][:, :, :5])
    after = module(x[rows, 5:], causal=True, cache=cache[1])
    torch.testing.assert_close(after, module(x[rows], causal=True)[:, 5:], **CLOSE)


def test_selecting_rows_of_shared_keys():
    """Random choices of rows, one after the other, against the same choices among expanded keys."""
    k = torch.arange(5.0).view(5, 1, 1, 1)
    part = Memory(torch.zeros(5, 1, 1), torch.rand(5, 1) > 0.5, repeat=3).project(k, -k)
    for trial in range(60):
        if trial % 10 == 0:
            now = part
        expected = now.per_row()
        rows = torch.randint(0, now.sharing.rows, (int(torch.randint(1, 16, ())),))
        rows = rows.sort().values if trial % 2 else rows
        now = now.select(rows)
        assert now.sharing.rows == len(rows)
        for got, wanted in zip(now.per_row()[:3], expected[:3], strict=True):
            assert torch.equal(got, wanted[rows])
        assert len(now.k) <= len(rows)


def test_cross_cache_projects_once():
    cross = MultiHeadAttention(8, 2, context_dim=8)
    calls = []
    cross.kv.register_forward_hook(lambda *args: calls.append(1))
    cache, x, context = KVCache(), torch.randn(2, 1, 8), torch.randn(2, 3, 8)
    first = cross(x, context, cache=cache)
    torch.testing.assert_close(cross(x, context, cache=cache), first)
    torch.testing.assert_close(cross(x, cache=cache), first)
    assert len(calls) == 1
