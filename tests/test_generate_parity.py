"""Greedy and beam search against `transformers.generate`, token by token, on random models and over a grid of options.

The GPT-2s compute in double precision, so the scores that `generate` reads, which it casts to fp32, are equal but for
the rarest rounding: tokens must be equal everywhere, without a tolerance. T5 norms in fp32 wherever it runs, and so all
of it does; no two candidates of these cases are as close as its rounding.
"""

import itertools

import pytest
import torch
from transformers import GPT2Config as HFGPT2Config
from transformers import GPT2LMHeadModel, T5ForConditionalGeneration
from transformers import T5Config as HFT5Config
from transformers.modeling_outputs import BaseModelOutput

from vqa_scratch.generate import GenerationOptions, generate
from vqa_scratch.models import GPT2, T5
from vqa_scratch.nn.memory import Memory

VOCABULARY, EOS, PAD = 24, 1, 1  # as in GPT-2, so that padding is never generated
START = 0  # of T5
PENALTIES = [(0, 1.0), (2, 1.0), (3, 1.0), (0, 1.3), (2, 0.7)]  # no_repeat_ngram_size, repetition_penalty
GREEDY = [
    {"min_new_tokens": least, "no_repeat_ngram_size": ngram, "repetition_penalty": penalty, "max_new_tokens": most}
    for least, (ngram, penalty), most in itertools.product((0, 6), PENALTIES, (1, 12))
    if least <= most
]
SEARCHES = [
    {"num_beams": beams, "length_penalty": lengths, "early_stopping": early}
    for beams, lengths, early in itertools.product((2, 4, 7), (1.0, 0.0, -1.0, 2.0), (False, True, "never"))
]
# Every search with some penalty, every penalty with some search.
BEAM = [
    search
    | {"min_new_tokens": (0, 4)[i % 2], "max_new_tokens": (9, 14)[i % 2]}
    | dict(zip(("no_repeat_ngram_size", "repetition_penalty"), PENALTIES[i % len(PENALTIES)], strict=True))
    for i, search in enumerate(SEARCHES)
]


def uneven(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights large enough that rows say different things."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.35)
    return model.eval()


def both(peer, kind, folder, dtype=torch.float64):
    """The peer and the same weights read by this project."""
    peer.save_pretrained(folder)
    return peer.to(dtype), kind.from_pretrained(folder).to(dtype)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "cross"])
def gpt2(request, tmp_path_factory):
    config = HFGPT2Config(
        vocab_size=VOCABULARY,
        n_positions=40,
        n_embd=16,
        n_layer=2,
        n_head=2,
        add_cross_attention=request.param,
        bos_token_id=2,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return both(uneven(GPT2LMHeadModel(config), 5), GPT2, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module", params=[False, True], ids=["v1.0", "v1.1"])
def t5(request, tmp_path_factory):
    config = HFT5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=6,
        d_ff=24,
        num_layers=2,  # the peer sizes its cache by this one
        num_decoder_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu" if request.param else "relu",
        tie_word_embeddings=not request.param,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=10,
        decoder_start_token_id=START,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    return both(uneven(T5ForConditionalGeneration(config), 3), T5, tmp_path_factory.mktemp("t5"), torch.float32)


def prompts(seed: int, rows: int = 5, width: int = 6):
    """Ragged prompts (rows, width), padded on the left, and their mask; one row fills the width."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    lengths[0] = width
    mask = torch.arange(width) >= width - lengths[:, None]
    ids = torch.randint(2, VOCABULARY, (rows, width), generator=generator)
    return ids.masked_fill(~mask, PAD), mask


def memory(seed: int, rows: int):
    """States (rows, 7, 16) with a ragged mask."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, 7, 16, generator=generator, dtype=torch.float64)
    return states, torch.arange(7) < torch.randint(1, 8, (rows, 1), generator=generator)


def name(options: dict) -> str:
    return ",".join(str(value) for value in options.values())


def assert_equal(ours, theirs, prompt_tokens: int) -> None:
    theirs = theirs[:, prompt_tokens:]
    width = max(theirs.shape[1], ours.ids.shape[1])  # the peer stops when it sees that it may, which can be later
    padded = [torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=PAD) for ids in (ours.ids, theirs)]
    assert torch.equal(*padded), (padded, ours.lengths)


def peer_options(options: dict) -> dict:
    return {"do_sample": False, "eos_token_id": EOS, "pad_token_id": PAD, **options}


def check_gpt2(models, options: dict, seed: int) -> None:
    peer, ours = models
    ids, mask = prompts(seed)
    extra, parts = {}, None
    if peer.config.add_cross_attention:
        states, states_mask = memory(seed, len(ids))
        extra = {"encoder_hidden_states": states, "encoder_attention_mask": states_mask.long()}
        parts = [Memory(states, states_mask)]
    theirs = peer.generate(ids, attention_mask=mask.long(), **extra, **peer_options(options))
    made = generate(ours, ids, mask, parts, options=GenerationOptions(eos_id=EOS, **options), fill=PAD)
    assert_equal(made, theirs, ids.shape[1])


def check_t5(models, options: dict, seed: int) -> None:
    peer, ours = models
    states, mask = memory(seed, 5)
    states = states.float()
    encoded = BaseModelOutput(last_hidden_state=states)
    theirs = peer.generate(encoder_outputs=encoded, attention_mask=mask.long(), **peer_options(options))
    start = torch.full((len(states), 1), START)
    options = GenerationOptions(eos_id=EOS, **options)
    made = generate(ours, start, None, [Memory(states, mask)], options=options, fill=PAD)
    assert_equal(made, theirs, 1)


@pytest.mark.parametrize("options", GREEDY, ids=name)
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_gpt2(gpt2, options, seed):
    check_gpt2(gpt2, options, seed)


@pytest.mark.parametrize("options", GREEDY, ids=name)
def test_greedy_t5(t5, options):
    check_t5(t5, options, 2)


@pytest.mark.parametrize("options", BEAM, ids=name)
def test_beam_gpt2(gpt2, options):
    check_gpt2(gpt2, options, 3)


@pytest.mark.parametrize("options", BEAM, ids=name)
def test_beam_t5(t5, options):
    check_t5(t5, options, 4)
