"""T5 against `transformers`: random tiny checkpoints, saved and loaded through our real loader, and invariants.

1e-5 is the rounding of a few hundred fp32 additions on logits of order 1 to 10.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config as HFConfig
from transformers import T5ForConditionalGeneration

from vqa_scratch.errors import UserError
from vqa_scratch.kernels import DistanceBias
from vqa_scratch.models.t5 import T5, T5Config
from vqa_scratch.nn.memory import Memory

SIZES = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 12,  # heads * d_kv is 36, not d_model
    "d_ff": 48,
    "num_heads": 3,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 30,  # less than the 40 and more tokens of the tests
    "decoder_start_token_id": 0,
}
KINDS = {
    "t5": ({"feed_forward_proj": "relu"}, False, True),
    "flan": ({"feed_forward_proj": "gated-gelu"}, True, False),
    "tied-gated": ({"feed_forward_proj": "gated-gelu"}, False, True),
    "silu": ({"feed_forward_proj": "gated-silu"}, True, False),
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(theirs, ours, folder) of one kind. An untied head is added to the file, as flan's files have it."""
    extra, untied, scaled = KINDS[request.param]
    torch.manual_seed(1)
    theirs = T5ForConditionalGeneration(HFConfig(**SIZES, **extra, scale_decoder_outputs=scaled))
    for name, parameter in theirs.named_parameters():
        # Larger biases on scores than at initialisation, so that a wrong bucket shows.
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(parameter)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    if untied:
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = torch.randn(99, 32) * 32**-0.5
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        theirs = T5ForConditionalGeneration.from_pretrained(folder)
    return theirs.eval(), T5.from_pretrained(folder), folder


def batch():
    """Ragged inputs padded on the right, and 41 decoder tokens: more than max_distance."""
    ids = torch.randint(2, 99, (3, 50))
    mask = torch.arange(50) < torch.tensor([[50], [17], [1]])
    return ids, mask, torch.randint(0, 99, (3, 41))


def test_parity_ladder(pair):
    theirs, ours, _ = pair
    ids, mask, decoder_ids = batch()
    with torch.no_grad():
        close(ours.embedding(ids), theirs.shared(ids))
        for tower, other in ((ours.encoder, theirs.encoder), (ours.decoder, theirs.decoder)):
            bias = other.block[0].layer[0].SelfAttention.compute_bias(41, 41)
            close(tower.bias(41, 41), bias)
        encoded = theirs.encoder(ids, attention_mask=mask.long()).last_hidden_state
        states = ours.encode(ids, mask)
        for row, length in enumerate(mask.sum(1)):
            close(states[row, :length], encoded[row, :length])
        hidden = theirs.decoder(
            decoder_ids, encoder_hidden_states=encoded, encoder_attention_mask=mask.long()
        ).last_hidden_state
        found = ours.hidden(ours.embed(decoder_ids), memory=[Memory(states, mask)])
        close(found, hidden)
        close(found @ ours.head.T, ours.logits(found))
        logits = theirs(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=decoder_ids).logits
        close(ours(ids, mask, decoder_ids), logits)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_export_loads_in_transformers(pair, tmp_path):
    theirs, ours, _ = pair
    ours.save_pretrained(tmp_path)
    again = T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    ids, mask, decoder_ids = batch()
    with torch.no_grad():
        logits = again(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=decoder_ids).logits
        close(ours(ids, mask, decoder_ids), logits)
    back = T5.from_pretrained(tmp_path)
    assert back.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), ours.parameters(), strict=True))


def test_gradients_match(pair):
    theirs, ours, _ = pair
    ids, mask, decoder_ids = batch()
    weights = torch.randn(3, 41, 99)
    (ours(ids, mask, decoder_ids) * weights).sum().backward()
    out = theirs(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=decoder_ids).logits
    (out * weights).sum().backward()
    for mine, other in (
        (ours.embedding.weight, theirs.shared.weight),
        (ours.encoder.bias.table.weight, theirs.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight),
        (ours.decoder.blocks[2].mlp.down.weight, theirs.decoder.block[2].layer[2].DenseReluDense.wo.weight),
    ):
        scale = other.grad.abs().max()
        torch.testing.assert_close(mine.grad / scale, other.grad / scale, rtol=0, atol=1e-5)
    ours.zero_grad(), theirs.zero_grad()


@pytest.fixture
def small():
    return T5(
        T5Config(vocab_size=31, dim=24, head_dim=8, hidden=32, encoder_layers=2, decoder_layers=2, heads=4)
    ).eval()


def test_a_later_token_changes_nothing_earlier(small):
    ids, decoder_ids = torch.randint(2, 31, (2, 9)), torch.randint(2, 31, (2, 45))
    before = small(ids, None, decoder_ids)
    decoder_ids[:, 30] = (decoder_ids[:, 30] + 1) % 31
    after = small(ids, None, decoder_ids)
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.equal(before[:, 30:], after[:, 30:])


def test_padding_of_the_input_changes_nothing(small):
    ids, decoder_ids = torch.randint(2, 31, (1, 9)), torch.randint(2, 31, (1, 5))
    padded = torch.cat([ids, torch.randint(2, 31, (1, 6))], 1)
    mask = torch.arange(15)[None] < 9
    close(small(padded, mask, decoder_ids), small(ids, None, decoder_ids))


def test_cached_decoding_equals_a_full_pass_with_shared_memory_and_dropped_rows(small):
    ids, mask = torch.randint(2, 31, (2, 9)), torch.arange(9) < torch.tensor([[9], [4]])
    decoder_ids = torch.randint(2, 31, (6, 44))
    states = small.encode(ids, mask)
    repeated = Memory(states.repeat_interleave(3, 0), mask.repeat_interleave(3, 0))
    full = small.hidden(small.embed(decoder_ids), memory=[repeated])
    memory = [Memory(states, mask, repeat=3)]
    with torch.no_grad():
        cache = small.new_cache()
        close(small.hidden(small.embed(decoder_ids[:, :3]), memory=memory, cache=cache), full[:, :3])
        rows = torch.arange(6)
        for t in range(3, 44):
            if t in (10, 20):
                keep = torch.tensor([0, 1, 3, 5]) if t == 10 else torch.tensor([1, 2])
                cache.select(keep)
                rows = rows[keep]
            step = small.hidden(small.embed(decoder_ids[rows, t : t + 1]), memory=memory, cache=cache)
            close(step[:, 0], full[rows, t])


def relative_buckets(queries, keys, buckets, max_distance, bidirectional):
    return DistanceBias(torch.zeros(buckets, 1), max_distance, bidirectional).pairs(queries, keys)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_against_a_plain_loop(bidirectional):
    table = relative_buckets(40, 40, 12, 30, bidirectional)
    for i in range(40):
        for j in range(40):
            distance, buckets, base = i - j, 12, 0
            if bidirectional:
                buckets, base = 6, 6 if j > i else 0
                distance = abs(distance)
            distance = max(distance, 0)
            exact = buckets // 2
            if distance < exact:
                expected = distance
            else:
                share = torch.log(torch.tensor(distance / exact)) / torch.log(torch.tensor(30 / exact))
                expected = min(exact + int(share * (buckets - exact)), buckets - 1)
            assert table[i, j] == base + expected, (i, j)
    assert torch.equal(relative_buckets(1, 40, 12, 30, bidirectional), table[-1:])


def test_encoder_and_decoder_buckets_differ(small):
    assert not torch.equal(relative_buckets(40, 40, 32, 128, True), relative_buckets(40, 40, 32, 128, False))
    assert small.encoder.bias.lookup().bidirectional and not small.decoder.bias.lookup().bidirectional


def test_gradients_reach_everything(small):
    small.train()
    small(torch.randint(2, 31, (2, 9)), None, torch.randint(2, 31, (2, 5))).square().mean().backward()
    for name, parameter in small.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_broken_checkpoints_are_refused(pair, tmp_path):
    _, _, folder = pair
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "bart"}))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="not a t5"):
        T5.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    gone = tensors.pop("decoder.block.1.layer.1.EncDecAttention.k.weight")
    tensors["encoder.block.0.layer.1.extra"] = gone
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"missing: decoder.*k.weight; unexpected: encoder.*extra"):
        T5.from_pretrained(tmp_path)


def test_decoder_inputs_are_required(small):
    with pytest.raises(ValueError, match="decoder_input_ids"):
        small(torch.randint(2, 31, (2, 9)))


@pytest.mark.network
def test_flan_t5_small():
    theirs, ours = T5ForConditionalGeneration.from_pretrained("google/flan-t5-small").eval(), None
    ours = T5.from_pretrained("google/flan-t5-small")
    ids, mask, decoder_ids = batch()
    with torch.no_grad():
        logits = theirs(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=decoder_ids).logits
        torch.testing.assert_close(ours(ids, mask, decoder_ids), logits, rtol=1e-5, atol=1e-4)
