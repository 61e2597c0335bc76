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

from vqa_scratch.generate import Conditioning, GenerationOptions, generate
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
GREEDY.append({"suppress_tokens": (3, 5, 8, 9, 17), "max_new_tokens": 12})
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
BEAM.append({"num_beams": 3, "suppress_tokens": (3, 5, 8, 9, 17), "max_new_tokens": 9})


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


def our_options(options: dict) -> GenerationOptions:
    given = dict(options)
    ends = given.pop("eos_token_id", EOS)
    return GenerationOptions(eos_id=ends if ends == EOS else tuple(ends), **given)


def check_gpt2(models, options: dict, seed: int) -> None:
    peer, ours = models
    ids, mask = prompts(seed)
    extra, parts = {}, None
    if peer.config.add_cross_attention:
        states, states_mask = memory(seed, len(ids))
        extra = {"encoder_hidden_states": states, "encoder_attention_mask": states_mask.long()}
        parts = Conditioning([Memory(states, states_mask)])
    theirs = peer.generate(ids, attention_mask=mask.long(), **extra, **peer_options(options))
    made = generate(ours, ids, mask, parts, options=our_options(options), fill=PAD)
    assert_equal(made, theirs, ids.shape[1])


def check_t5(models, options: dict, seed: int) -> None:
    peer, ours = models
    states, mask = memory(seed, 5)
    states = states.float()
    encoded = BaseModelOutput(last_hidden_state=states)
    theirs = peer.generate(encoder_outputs=encoded, attention_mask=mask.long(), **peer_options(options))
    start = torch.full((len(states), 1), START)
    made = generate(ours, start, None, Conditioning([Memory(states, mask)]), options=our_options(options), fill=PAD)
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


# ------------------------------------------------------------------------------------- several end tokens


@pytest.mark.parametrize("least", [0, 5])
@pytest.mark.parametrize("beams", [1, 3, 7])
@pytest.mark.parametrize("ends", [(1, 5), (9, 4, 17, 1), tuple(range(20))], ids=len)
def test_each_of_several_end_tokens_ends_a_row(gpt2, ends, beams, least):
    options = {"max_new_tokens": 12, "min_new_tokens": least, "num_beams": beams, "eos_token_id": list(ends)}
    check_gpt2(gpt2, options, 1)


def test_beams_go_on_beside_many_that_end(gpt2):
    """Of the best 2K continuations most end, so more have to be looked at; long answers are worth more."""
    for seed in range(8):
        options = {"num_beams": 3, "length_penalty": 3.0, "early_stopping": "never", "max_new_tokens": 12}
        check_gpt2(gpt2, options | {"eos_token_id": list(range(16))}, seed)


@pytest.mark.parametrize("beams", [13, 24])
def test_more_beams_than_half_of_the_vocabulary(gpt2, beams):
    """The first token alone cannot give twice as many beginnings."""
    check_gpt2(gpt2, {"max_new_tokens": 8, "num_beams": beams}, 3)


def test_where_every_token_ends_a_row_it_has_one(gpt2):
    _, ours = gpt2
    (ids, mask), parts = prompts(0), None
    if ours.config.add_cross_attention:
        parts = Conditioning([Memory(*memory(0, len(ids)))])
    ends = tuple(range(VOCABULARY))
    first = generate(ours, ids, mask, parts, options=GenerationOptions(1)).ids
    for beams in (1, 4):
        made = generate(ours, ids, mask, parts, options=GenerationOptions(9, ends, num_beams=beams))
        assert torch.equal(made.ids[:, :1], first) or beams > 1
        assert made.lengths.tolist() == [1] * len(ids)


def test_several_end_tokens_of_t5(t5):
    for beams in (1, 3):
        check_t5(t5, {"max_new_tokens": 12, "num_beams": beams, "eos_token_id": [3, 8, 1]}, 2)


def test_a_sampled_row_ends_at_the_first_of_several_end_tokens(gpt2):
    """Not a token before or after it, and what was sampled before it stays what it was."""
    _, ours = gpt2
    (ids, mask), parts = prompts(0), None
    if ours.config.add_cross_attention:
        parts = Conditioning([Memory(*memory(0, len(ids)))])
    sampled, ends = {"max_new_tokens": 14, "do_sample": True, "temperature": 4.0, "seed": 4}, tuple(range(3, 24, 3))
    endless = generate(ours, ids, mask, parts, options=GenerationOptions(**sampled)).ids
    made = generate(ours, ids, mask, parts, options=GenerationOptions(eos_id=ends, **sampled), fill=-1)
    last = set()
    for row, (said, length) in zip(
        endless.tolist(), zip(made.ids.tolist(), made.lengths.tolist(), strict=True), strict=True
    ):
        first = next((i + 1 for i, token in enumerate(row) if token in ends), 14)
        assert length == first and said == row[:first] + [-1] * (len(said) - first)
        last |= {row[first - 1]} & set(ends)
    assert len(last) > 1 and not made.log_probs[made.ids == -1].any()
