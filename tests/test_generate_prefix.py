"""Embeddings before a prompt: against one run of the decoder on all embeddings without a cache, and the reference's.

A row with a padded prompt must say what it says alone. GPT-2 computes in float64: tokens are equal without a tolerance.
"""

import itertools

import pytest
import torch
import transformers as hf
from helpers import saved
from model_helpers import greedy
from test_generate_options import CANDIDATES, VOCABULARY, parts, prompts, uneven
from torch import Tensor

from vqa_scratch.generate import Conditioning, GenerationOptions, begin, generate, rank
from vqa_scratch.generate.state import ModuleState
from vqa_scratch.models import GPT2, OPT, T5, GPT2Config, Llama, LlamaConfig, OPTConfig, T5Config
from vqa_scratch.nn import taps
from vqa_scratch.nn.memory import Memory
from vqa_scratch.nn.rotary import Rotary

QUERIES, WIDTH, END = 3, 16, 5
no_grad = torch.no_grad()


class Watch:
    """A trace that wants nothing: decoding goes through the modules."""

    def wants(self, name: str) -> bool:
        return False


@pytest.fixture(scope="module")
def decoders():
    t5 = {"vocab_size": VOCABULARY, "buckets": 8, "max_distance": 10, "dim": WIDTH, "head_dim": 6, "hidden": 24}
    t5 |= {"encoder_layers": 1, "decoder_layers": 2, "heads": 2}
    sizes = {"hidden": 20, "dim": WIDTH, "layers": 2, "heads": 2}
    grouped = {"hidden": 20, "dim": WIDTH, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8}
    persimmon = {"norm": "layer", "qk_norm": True, "gated": False, "qkv_bias": True, "rotary": Rotary(share=0.5)}
    return {
        "gpt2": uneven(GPT2(GPT2Config(VOCABULARY, 40, WIDTH, 2, 2))).double(),
        "cross": uneven(GPT2(GPT2Config(VOCABULARY, 40, WIDTH, 2, 2, add_cross_attention=True))).double(),
        "t5": uneven(T5(T5Config(**t5))),
        "t5 v1.0": uneven(T5(T5Config(**t5, tied=True, scaled=True, gated=False, activation="relu"))),
        "opt": uneven(OPT(OPTConfig(VOCABULARY, 40, **sizes))).double(),
        "350m": uneven(OPT(OPTConfig(VOCABULARY, 40, **sizes, embedding_dim=10, norm_first=False))).double(),
        "llama": uneven(Llama(LlamaConfig(VOCABULARY, 40, **grouped))),
        "persimmon": uneven(Llama(LlamaConfig(VOCABULARY, 40, **grouped, **persimmon))),
    }


NAMES = ["gpt2", "cross", "t5", "t5 v1.0", "opt", "350m", "llama", "persimmon"]


def asked(decoder, name: str, rows: int):
    """Prompts with their mask, a prefix, and the memory of a decoder that reads one."""
    ids, mask = prompts(rows)
    kind = next(decoder.parameters()).dtype
    generator = torch.Generator().manual_seed(8)
    prefix = torch.randn(rows, QUERIES, decoder.embed(ids).shape[-1], generator=generator, dtype=kind)
    memory = parts(rows, dtype=kind) if name == "cross" else parts(rows, dtype=kind)[1:] if "t5" in name else None
    return ids, mask, prefix, memory


def row_of(memory: list[Memory] | None, row: int) -> list[Memory] | None:
    if memory is None:
        return None
    return [Memory(m.states[row][None], None if m.mask is None else m.mask[row][None]) for m in memory]


@no_grad
def log_probs_of(decoder, prefix: Tensor, ids: list[int], memory) -> Tensor:
    """(tokens, V): after each of the tokens, by one pass over all embeddings of one row, without cache and padding."""
    embeddings = torch.cat([prefix[None], decoder.embed(torch.tensor([ids]))], 1)
    hidden = decoder.hidden(embeddings, memory=memory)[0, len(prefix) :]
    return (hidden @ decoder.head.T).float().log_softmax(-1)


def by_running_again(decoder, prefix: Tensor, prompt: list[int], memory, steps: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + steps and ids[len(prompt) :][-1:] != [END]:
        ids.append(int(log_probs_of(decoder, prefix, ids, memory)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("way", ["fast", "modules"])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_is_running_again_on_all_embeddings(decoders, name, rows, way):
    decoder = decoders[name]
    ids, mask, prefix, memory = asked(decoder, name, rows)
    limits = {"max_new_tokens": 9, "eos_id": END}
    if way == "modules":
        with taps.activate(Watch()):
            made = greedy(decoder, ids, mask, memory, **limits, prefix=prefix)
    else:
        made = greedy(decoder, ids, mask, memory, **limits, prefix=prefix)
    for row, length in enumerate(made.lengths.tolist()):
        prompt, own = ids[row][mask[row]].tolist(), row_of(memory, row)
        tokens = by_running_again(decoder, prefix[row], prompt, own, 9)
        assert made.ids[row, :length].tolist() == tokens
        wanted = log_probs_of(decoder, prefix[row], prompt + tokens[:-1], own)[len(prompt) - 1 :]
        found = made.log_probs[row, :length]
        torch.testing.assert_close(found, wanted.gather(1, torch.tensor(tokens)[:, None])[:, 0], rtol=0, atol=1e-4)
    other = greedy(decoder, ids, mask, memory, **limits, prefix=prefix.roll(1, 1))
    assert ((other.log_probs[:, 0] - made.log_probs[:, 0]).abs() > 1e-3).all(), "the order of the prefix should matter"


@pytest.mark.parametrize("name", ["gpt2", "350m"])
def test_sampled_tokens_have_the_probabilities_of_all_embeddings(decoders, name):
    decoder = decoders[name]
    ids, mask, prefix, _ = asked(decoder, name, 6)
    given, asking = Conditioning(prefix=prefix), {"do_sample": True, "temperature": 2.0, "seed": 3}
    endless = generate(decoder, ids, mask, given, options=GenerationOptions(8, **asking)).ids
    end = int(endless[:, 1:].flatten().mode().values)  # said by some rows before the last step
    options = GenerationOptions(8, end, **asking)
    made = generate(decoder, ids, mask, given, options=options)
    assert len(set(made.lengths.tolist())) > 1
    for row, length in enumerate(made.lengths.tolist()):
        prompt, tokens = ids[row][mask[row]].tolist(), made.ids[row, :length]
        logits = log_probs_of(decoder, prefix[row], [*prompt, *tokens[:-1].tolist()], None)[len(prompt) - 1 :] / 2.0
        wanted = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(made.log_probs[row, :length], wanted, rtol=0, atol=1e-4)  # fp32 sums


PEERS = {
    "gpt2": (
        hf.GPT2LMHeadModel,
        hf.GPT2Config(vocab_size=24, n_positions=40, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4),
        GPT2,
    ),
    "350m": (
        hf.OPTForCausalLM,
        hf.OPTConfig(
            vocab_size=24,
            hidden_size=16,
            ffn_dim=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=40,
            word_embed_proj_dim=10,
            do_layer_norm_before=False,
            init_std=0.4,
        ),
        OPT,
    ),
}


@no_grad
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", PEERS)
def test_tokens_equal_those_of_the_reference(tmp_path, name, beams):
    """Which takes all embeddings at once, padded on the left; greedy and in a beam, ended by an end token or not."""
    build, config, kind = PEERS[name]
    torch.manual_seed(2)
    theirs = saved(build(config), tmp_path).double()
    ours = kind.from_pretrained(tmp_path).double()
    generator = torch.Generator().manual_seed(4)
    lengths = (6, 2, 4, 1)
    ids, mask = torch.full((4, 6), 1), torch.arange(6) >= 6 - torch.tensor(lengths)[:, None]
    ids = torch.where(mask, torch.randint(2, 24, ids.shape, generator=generator), ids)
    prefix = torch.randn(4, QUERIES, ours.embed(ids).shape[-1], generator=generator, dtype=torch.float64)
    embeddings = torch.zeros(4, QUERIES + 6, prefix.shape[-1], dtype=torch.float64)
    for row, length in enumerate(lengths):
        embeddings[row, -length:] = ours.embed(ids[row, -length:])
        embeddings[row, -length - QUERIES : -length] = prefix[row]
    seen = torch.arange(QUERIES + 6) >= 6 - torch.tensor(lengths)[:, None]
    given = Conditioning(prefix=prefix)
    endless = generate(ours, ids, mask, given, options=GenerationOptions(10, None)).ids
    often = int(endless[:, 2:].flatten().mode().values)
    lengths_seen = set()
    for end in (often, 23):
        options = GenerationOptions(10, end, num_beams=beams)
        made = generate(ours, ids, mask, given, options=options, fill=1)
        theirs.generation_config.eos_token_id = end
        wanted = theirs.generate(
            inputs_embeds=embeddings,
            attention_mask=seen.long(),
            max_new_tokens=10,
            num_beams=beams,
            do_sample=False,
            pad_token_id=1,
        )
        assert torch.equal(made.ids, wanted)
        lengths_seen |= set(made.lengths.tolist())
    assert len(lengths_seen) > 1, "some answers should end by themselves"


@no_grad
@pytest.mark.parametrize("way", ["tree", "modules"])
@pytest.mark.parametrize("with_prefix", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_ranking_is_scoring_every_candidate(decoders, name, with_prefix, way):
    decoder = decoders[name]
    ids, mask, prefix, memory = asked(decoder, name, 4)
    given = Conditioning(memory, prefix if with_prefix else None)
    if way == "modules":
        with taps.activate(Watch()):
            made = rank(decoder, ids, mask, given, CANDIDATES)
    else:
        made = rank(decoder, ids, mask, given, CANDIDATES)
    for row, (column, candidate) in itertools.product(range(4), enumerate(CANDIDATES)):
        prompt, before = ids[row][mask[row]].tolist(), prefix[row] if with_prefix else prefix[row, :0]
        log_probs = log_probs_of(decoder, before, prompt + candidate[:-1], row_of(memory, row))[len(prompt) - 1 :]
        wanted = float(log_probs.gather(1, torch.tensor(candidate)[:, None]).sum())
        assert float(made[row, column]) == pytest.approx(wanted, abs=1e-4)  # fp32 sums of log-probabilities


def test_a_decoder_without_fast_parts_goes_through_its_modules(decoders):
    ids, mask, prefix, _ = asked(decoders["350m"], "350m", 2)
    with torch.no_grad():
        _, state = begin(decoders["350m"], ids, mask, Conditioning(prefix=prefix), steps=3)
    assert type(state) is ModuleState and decoders["350m"].fast_state() is None
    with pytest.raises(ValueError, match="a CUDA graph needs a decoder with a fast state"):
        generate(decoders["350m"], ids, options=GenerationOptions(3), graph=True)


def test_a_prefix_that_does_not_fit(decoders):
    decoder = decoders["gpt2"]
    ids, _, prefix, _ = asked(decoder, "gpt2", 2)
    given = Conditioning(prefix=prefix)
    for wrong in (prefix[:1], prefix[..., 1:], prefix[0]):
        with pytest.raises(ValueError, match=r"prefix must be \(2, any number, 16\), got \("):
            generate(decoder, ids, None, Conditioning(prefix=wrong), options=GenerationOptions(3))
    with pytest.raises(ValueError, match="41 tokens, but the position table serves 40"):  # 3 + 5 + 34 - 1
        generate(decoder, ids, None, given, options=GenerationOptions(34))
    with pytest.raises(ValueError, match="41 tokens, but the position table serves 40"):
        rank(decoder, ids, None, given, [[3] * 34])
    assert generate(decoder, ids, None, given, options=GenerationOptions(33)).ids.shape == (2, 33)


@no_grad
@pytest.mark.parametrize("name", ["cross", "llama", "350m", "t5"])
@pytest.mark.parametrize("length", [1, 4])
def test_embeddings_instead_of_a_prompts_words(decoders, name, length):
    """They are read, and not the ids: the same as giving the words they are of. Also in front of them, a prefix."""
    decoder = decoders[name]
    ids, mask, prefix, memory = asked(decoder, name, 3)
    ids, mask, other = ids[:, -length:], mask[:, -length:], ids.flip(1)[:, :length]
    for before in (None, prefix):
        given = Conditioning(memory, before)
        wanted = generate(decoder, ids, mask, given, options=GenerationOptions(6))
        words = decoder.embed(ids)
        made = generate(decoder, other, mask, given, options=GenerationOptions(6), embeddings=words)
        assert torch.equal(made.ids, wanted.ids)
    with pytest.raises(ValueError, match="embeddings must be"):
        generate(decoder, ids, mask, given, options=GenerationOptions(6), embeddings=prefix[:, :0])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_in_front_of_a_prefix_is_not_seen(decoders, name, shared):
    """Rows whose prefixes differ in length, one of them all padding, say what they say alone."""
    decoder = decoders[name]
    ids, mask, prefix, _ = asked(decoder, name, 4)
    real = torch.arange(QUERIES) >= torch.tensor([2, 0, QUERIES, 1])[:, None]
    index, options = torch.arange(4) if shared else None, GenerationOptions(max_new_tokens=6)
    made = generate(decoder, ids, mask, Conditioning(None, prefix, index, real), options=options)
    for row in range(4):
        kept = prefix[row, real[row]][None]
        alone = Conditioning(prefix=kept) if kept.shape[1] else None
        expected = generate(decoder, ids[row, mask[row].bool()][None], None, alone, options=options)
        assert made.ids[row].tolist() == expected.ids[0].tolist()
        torch.testing.assert_close(made.log_probs[row], expected.log_probs[0], rtol=0, atol=1e-5)


@no_grad
def test_states_after_a_prefix_read_the_memory_too(decoders):
    decoder = decoders["cross"]
    ids, _, prefix, memory = asked(decoder, "cross", 4)
    first, _ = begin(decoder, ids, None, Conditioning(memory, prefix), steps=1)
    last = decoder.hidden_after(Conditioning(memory, prefix), decoder.embed(ids))[:, -1]
    torch.testing.assert_close(decoder.logits(last), first)
