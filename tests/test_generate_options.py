"""Options that contradict each other, what processors leave of the scores, sampling, and ranking."""

import itertools
import math

import pytest
import torch
from model_helpers import greedy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation import logits_process as peer

from vqa_scratch.errors import UserError
from vqa_scratch.generate import Conditioning, GenerationOptions, generate, loop, rank
from vqa_scratch.generate import processors as ours
from vqa_scratch.generate.choose import pick
from vqa_scratch.generate.fast import FastState
from vqa_scratch.generate.fast.self_attention import FixedRows, Rows
from vqa_scratch.generate.fast.state import of_steps
from vqa_scratch.generate.ranking import tree_of
from vqa_scratch.generate.start import prefill
from vqa_scratch.models import GPT2, T5, GPT2Config, T5Config
from vqa_scratch.nn import taps
from vqa_scratch.nn.memory import Memory

VOCABULARY = 14


def uneven(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    return model.eval()


@pytest.fixture(scope="module")
def gpt2() -> GPT2:
    config = GPT2Config(VOCABULARY, 40, dim=16, layers=2, heads=2, add_cross_attention=True)
    return uneven(GPT2(config)).double()


@pytest.fixture(scope="module")
def t5() -> T5:
    sizes = {"dim": 16, "head_dim": 6, "hidden": 24, "encoder_layers": 1, "decoder_layers": 2, "heads": 2}
    return uneven(T5(T5Config(vocab_size=VOCABULARY, buckets=8, max_distance=10, **sizes)))


def prompts(rows: int, width: int = 5):
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(width) >= width - torch.randint(1, width + 1, (rows, 1), generator=generator)
    return torch.randint(2, VOCABULARY, (rows, width), generator=generator), mask


def parts(rows: int, shared: int = 1, dtype=torch.float64) -> list[Memory]:
    """An image for every `shared` rows and a ragged text for each."""
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(rows // shared, 5, 16, generator=generator, dtype=dtype)
    text = torch.randn(rows, 4, 16, generator=generator, dtype=dtype)
    mask = torch.arange(4) < torch.randint(1, 5, (rows, 1), generator=generator)
    return [Memory(image, index=torch.arange(rows) // shared), Memory(text, mask)]


# ---------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temperature": 0.5}, "temperature has an effect on sampling only"),
        ({"top_k": 5}, "top_k has an effect on sampling only"),
        ({"top_p": 0.5}, "top_p has an effect on sampling only"),
        ({"seed": 1}, "seed has an effect on sampling only"),
        ({"do_sample": True, "num_beams": 2}, "beams and sampling exclude each other"),
        ({"early_stopping": True}, "early_stopping has an effect on beams only"),
        ({"length_penalty": 0.0}, "length_penalty has an effect on beams only"),
        ({"num_beams": 0}, "num_beams must be at least 1"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping must be true, false or 'never'"),
        ({"min_new_tokens": 9}, "min_new_tokens 9 is above max_new_tokens 8"),
        ({"min_new_tokens": -1}, "min_new_tokens must be at least 0, not -1"),
        ({"eos_id": [1, 2]}, r"eos_id must be one id or a tuple of ids, not \[1, 2\]"),
        ({"min_new_tokens": 2, "eos_id": None}, "min_new_tokens bars the end token; give eos_id"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be above 0"),
        ({"do_sample": True, "temperature": math.nan}, "temperature must be a finite number, not nan"),
        ({"do_sample": True, "top_k": 0}, "top_k must be at least 1"),
        ({"do_sample": True, "top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"do_sample": True, "top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be at least 0, not -1"),
    ],
)
def test_contradictions_are_one_clear_line(given, said):
    with pytest.raises(UserError, match=said) as caught:
        GenerationOptions(**{"max_new_tokens": 8, "eos_id": 1} | given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_beams": 15}, "15 beams, but the vocabulary has 14 tokens"),
        ({"do_sample": True, "top_k": 15}, "top_k 15, but the vocabulary has 14"),
        ({"eos_id": 14}, "the end token is 14, but the vocabulary has 14"),
        ({"eos_id": (1, 15)}, "the end token is 15, but the vocabulary has 14"),
    ],
)
def test_options_must_fit_the_vocabulary(gpt2, given, said):
    with pytest.raises(UserError, match=said):
        generate(gpt2, torch.tensor([[3]]), options=GenerationOptions(**{"max_new_tokens": 2, "eos_id": 1} | given))


def test_no_memory_is_taken_for_beams_that_cannot_be(gpt2, monkeypatch):
    """The cache of ten thousand beams is gigabytes even on a small model."""
    monkeypatch.setattr("vqa_scratch.generate.fast.state.Rows", lambda *_: pytest.fail("a cache was made"))
    with pytest.raises(UserError, match="10000 beams, but the vocabulary has 14 tokens"):
        generate(gpt2, torch.tensor([[3]]), options=GenerationOptions(2, 1, num_beams=10_000))


def test_too_many_tokens_for_the_positions(gpt2):
    with pytest.raises(ValueError, match="41 tokens, but the position table serves 40"):
        greedy(gpt2, torch.full((1, 5), 3), None, None, max_new_tokens=37, eos_id=1)


# ------------------------------------------------------------------------------------------- processors


WARPERS = [
    ({"temperature": t, "top_k": k, "top_p": p}, seed)
    for t, k, p, seed in itertools.product((None, 0.3, 1.7), (None, 1, 4), (None, 0.2, 0.9), (0, 1))
]


@pytest.mark.parametrize(("given", "seed"), WARPERS)
def test_the_sampled_distribution_is_that_of_the_peer(given, seed):
    scores = torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    kinds = {
        "temperature": peer.TemperatureLogitsWarper,
        "top_k": peer.TopKLogitsWarper,
        "top_p": peer.TopPLogitsWarper,
    }
    wanted = scores
    for name, kind in kinds.items():
        if given[name] is not None:
            wanted = kind(given[name])(None, wanted)
    made = ours.Processed(GenerationOptions(3, do_sample=True, **given), None, None, None)(scores, 0)
    assert torch.equal(made, wanted)


def test_padding_counts_for_nothing():
    """Scores after a padded prompt are those after the prompt alone, whatever the padding holds."""
    ids = torch.tensor([[5, 5, 5, 2, 3, 2]])
    real = torch.tensor([[False, False, False, True, True, True]])
    scores = torch.randn(1, VOCABULARY)
    for size in (1, 2, 3):
        padded, alone = (
            ours.bar_repeated_ngrams(scores, i, r, size) for i, r in ((ids, real), (ids[:, 3:], real[:, 3:]))
        )
        assert torch.equal(padded, alone)
    padded, alone = (ours.penalize_repetition(scores, i, r, 1.5) for i, r in ((ids, real), (ids[:, 3:], real[:, 3:])))
    assert torch.equal(padded, alone)
    assert ours.bar_repeated_ngrams(scores, ids, real, 2)[0, 3] == -math.inf  # 2 3 was there, and 2 stands last


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_repeated_ngrams_against_a_plain_loop(size):
    """At the end of a padded row and in the middle of one; padding holds tokens that are said as well."""
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(0, 3, (60, 9), generator=generator)
    real = torch.arange(9) >= torch.randint(0, 9, (60, 1), generator=generator)
    ends = torch.randint(0, 10, (60,), generator=generator)
    for padding in (real, None):
        found = ours.repeating(ids, padding, ends, size)
        for row, end in enumerate(ends.tolist()):
            start = 0 if padding is None else int(9 - real[row].sum())
            past = ids[row, start:end].tolist()
            recent = past[len(past) + 1 - size :]
            at = [i for i in range(len(past) - size + 1) if len(past) >= size and past[i : i + size - 1] == recent]
            assert found[row].nonzero().flatten().tolist() == [start + i + size - 1 for i in at]


# --------------------------------------------------------------------------------------------- sampling


def test_picks_follow_the_probabilities():
    scores = torch.tensor([0.5, -math.inf, 2.0, 1.0, -math.inf]).expand(20_000, -1)
    counts = pick(scores, torch.rand(len(scores))).bincount(minlength=5) / len(scores)
    # A frequency of p over n draws has the deviation sqrt(p(1-p)/n) <= 0.0035; five of them.
    assert torch.allclose(counts, scores[0].softmax(-1), atol=0.018)
    assert counts[1] == counts[4] == 0
    assert pick(scores[:2], torch.tensor([0.0, 1 - 2**-24])).tolist() == [0, 3]


def test_a_sampled_row_does_not_depend_on_when_others_end(gpt2):
    """With an end token rows are dropped on the way; up to their end they say what they say without one."""
    ids, mask = prompts(12)
    free = GenerationOptions(10, do_sample=True, temperature=1.5, seed=4)
    endless = generate(gpt2, ids, mask, Conditioning(parts(12, 2)), options=free)
    ending = GenerationOptions(10, 5, do_sample=True, temperature=1.5, seed=4)
    made = generate(gpt2, ids, mask, Conditioning(parts(12, 2)), options=ending)
    assert len(set(made.lengths.tolist())) > 3
    for row, length in enumerate(made.lengths.tolist()):
        assert torch.equal(made.ids[row, :length], endless.ids[row, :length])
        assert torch.allclose(made.log_probs[row, :length], endless.log_probs[row, :length], atol=1e-5)


def test_a_seed_repeats_and_another_does_not(gpt2):
    ids, mask = prompts(6)
    one, two, three = (
        generate(gpt2, ids, mask, options=GenerationOptions(12, do_sample=True, seed=seed)).ids for seed in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.equal(one, three)


# ----------------------------------------------------------------------------- states and the cache


class Watch:
    """A trace that wants nothing: decoding goes through the modules."""

    def wants(self, name: str) -> bool:
        return False


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("shared", [1, 3])
def test_a_trace_and_the_static_cache_say_the_same(gpt2, beams, shared):
    """Ragged prompts, an image for three rows, rows that end early, an entry of text with nothing to read."""
    ids, mask = prompts(9)
    image, text = parts(9, shared)
    text.mask[4] = False
    options = GenerationOptions(9, 12, num_beams=beams, length_penalty=0.0 if beams > 1 else None)
    fast = generate(gpt2, ids, mask, Conditioning([image, text]), options=options)
    with taps.activate(Watch()):
        slow = generate(gpt2, ids, mask, Conditioning([image, text]), options=options)
    assert torch.equal(fast.ids, slow.ids) and torch.equal(fast.lengths, slow.lengths)
    assert torch.allclose(fast.log_probs, slow.log_probs, atol=1e-5)
    assert len(set(fast.lengths.tolist())) > 1


def test_a_row_whose_memory_is_empty_reads_zeros(gpt2):
    """As the modules have it; the other rows share nothing with it."""
    ids, mask = prompts(4)
    text = parts(4)[1]
    text.mask[2] = False
    options = GenerationOptions(6)
    fast = generate(gpt2, ids, mask, Conditioning([text]), options=options)
    with taps.activate(Watch()):
        slow = generate(gpt2, ids, mask, Conditioning([text]), options=options)
    assert torch.equal(fast.ids, slow.ids) and torch.allclose(fast.log_probs, slow.log_probs, atol=1e-5)
    assert not fast.log_probs.isnan().any()


def test_results_can_be_used_in_training(gpt2):
    made = greedy(gpt2, torch.tensor([[3, 4]]), None, None, max_new_tokens=4, eos_id=1)
    gpt2(made.ids).sum().backward()  # an inference tensor would refuse
    gpt2.zero_grad()


class Recorder(TorchDispatchMode):
    """The operations that run, with the shapes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        shapes = [tuple(x.shape) for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
        self.seen.append((str(op), shapes))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [False, True])
def test_steps_of_fixed_shape(gpt2, padded, monkeypatch):
    """They say what other steps say, and are what a graph can replay: every step the same operations on the same
    shapes, none of which waits for a number on the host. What fresh memory holds does not matter."""
    ids, mask = prompts(6)
    mask = mask if padded else None
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape: self.new_full(shape, math.nan))
    with torch.no_grad():
        scores, cache, real = prefill(gpt2, ids, mask, Conditioning(parts(6, 2)))
        taken_apart = gpt2.fast_state()
        own = FixedRows(taken_apart, cache, real, *of_steps(8, 1, cache.device))
        fixed = FastState(taken_apart, own, cache)
        plain = FastState.after(taken_apart, cache, real, 8)
        assert type(plain.own) is Rows
        recorded = []
        for step in range(8):
            tokens = scores.argmax(-1)
            with Recorder() as recorder:
                scores = fixed.step(tokens)
            recorded.append(recorder.seen)
            assert torch.allclose(scores, plain.step(tokens), atol=1e-10)
            if step == 3:  # rows are dropped
                kept = torch.tensor([0, 2, 5])
                scores = scores[kept]
                fixed.keep(kept)
                plain.keep(kept)
    assert all(one == recorded[0] for one in recorded[:4]) and all(one == recorded[4] for one in recorded[4:])
    waiting = ("_local_scalar_dense", "nonzero", "item", "unique", "masked_select")
    assert not [op for op, _ in recorded[0] if any(word in op for word in waiting)]


def test_a_graph_needs_a_gpu(gpt2):
    with pytest.raises(ValueError, match="needs a decoder on a GPU"):
        generate(gpt2, torch.tensor([[3]]), options=GenerationOptions(3), graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_says_the_same():
    model = uneven(GPT2(GPT2Config(VOCABULARY, 40, dim=16, layers=2, heads=2))).cuda()
    ids, mask = (x.cuda() for x in prompts(6))
    for end in (5, 12):
        one, two = (generate(model, ids, mask, options=GenerationOptions(20, end), graph=graph) for graph in (0, 1))
        assert torch.equal(one.ids, two.ids)


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_that_end_early_leave_the_others_as_they_are(gpt2, beams, monkeypatch):
    """They are dropped on the way, with what the processors keep of them: each row says what it says alone."""
    rows, dropped, keep = 16, [], FastState.keep
    ids, mask = prompts(rows)
    image, text = parts(rows, 2)
    asked = {"num_beams": beams, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    endless = generate(gpt2, ids, mask, Conditioning([image, text]), options=GenerationOptions(12, None, **asked)).ids
    # As end token serves one that many rows say, at different times.
    end = max(range(1, VOCABULARY), key=lambda token: len({int(i) for i in (endless == token).int().argmax(1)}))
    options = GenerationOptions(12, end, **asked)
    monkeypatch.setattr(FastState, "keep", lambda self, groups: dropped.append(groups.tolist()) or keep(self, groups))
    made = generate(gpt2, ids, mask, Conditioning([image, text]), options=options)
    assert any(kept != list(range(len(kept))) for kept in dropped), "rows in the middle should go"
    for row in range(rows):
        own = [Memory(image.states[row // 2][None]), Memory(text.states[row][None], text.mask[row][None])]
        alone = generate(gpt2, ids[row][mask[row]][None], None, Conditioning(own), options=options)
        length = int(alone.lengths)
        assert int(made.lengths[row]) == length and torch.equal(made.ids[row, :length], alone.ids[0])
        torch.testing.assert_close(made.log_probs[row, :length], alone.log_probs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kept", [0, 40 * VOCABULARY, 10**6])
def test_when_log_probabilities_are_worked_out_changes_nothing(gpt2, kept, monkeypatch):
    """At each step, for a few at once with rows dropped between, or for all: as a pass over what was said has them."""
    monkeypatch.setattr(loop, "SCORES_KEPT", {"cpu": kept})
    ids, mask = prompts(8)
    memory = parts(8)
    made = generate(gpt2, ids, mask, Conditioning(memory), options=GenerationOptions(12, 12))
    assert len(set(made.lengths.tolist())) > 1
    with torch.no_grad():
        seen = torch.cat([mask, torch.ones_like(made.ids, dtype=torch.bool)], 1)
        scores = gpt2(torch.cat([ids, made.ids], 1), seen, memory=memory)[:, ids.shape[1] - 1 : -1]
    wanted = scores.float().log_softmax(-1).gather(2, made.ids[..., None]).squeeze(2)
    said = torch.arange(made.ids.shape[1]) < made.lengths[:, None]
    torch.testing.assert_close(made.log_probs, wanted.masked_fill(~said, 0.0), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------- ranking


CANDIDATES = [[3, 1], [3, 4, 1], [3, 4, 5, 1], [6, 1], [6, 6, 6, 1], [7], [3], [8, 2]]


@torch.no_grad()
def by_brute_force(logits, prompt: list[int], candidate: list[int]) -> float:
    """One whole forward pass for one candidate; `logits` (1, T) -> (1, T, V)."""
    log_probs = logits(torch.tensor([prompt + candidate]))[0].float().log_softmax(-1)
    return sum(float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(candidate))


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("candidates", [CANDIDATES, CANDIDATES[:1], [[7], [3]]], ids=["many", "one", "single tokens"])
def test_ranking_is_scoring_every_candidate(gpt2, shared, candidates):
    ids, mask = prompts(6)
    image, text = parts(6, shared)
    made = rank(gpt2, ids, mask, Conditioning([image, text]), candidates)
    for row in range(6):
        at = row // shared
        own = [Memory(image.states[at : at + 1]), Memory(text.states[row : row + 1], text.mask[row : row + 1])]
        for column, candidate in enumerate(candidates):
            wanted = by_brute_force(lambda x, own=own: gpt2(x, memory=own), ids[row][mask[row]].tolist(), candidate)
            assert float(made[row, column]) == pytest.approx(wanted, abs=1e-4)  # fp32 sums of log-probabilities


def test_ranking_with_t5(t5):
    states = torch.randn(3, 6, 16)
    made = rank(t5, torch.zeros(3, 1, dtype=torch.long), None, Conditioning([Memory(states)]), CANDIDATES)
    for row, (column, candidate) in itertools.product(range(3), enumerate(CANDIDATES)):
        own = states[row : row + 1]
        wanted = by_brute_force(
            lambda x, own=own: t5.logits(t5.hidden(t5.embed(x), memory=[Memory(own)])), [0], candidate
        )
        assert float(made[row, column]) == pytest.approx(wanted, abs=1e-4)


def test_portions_and_pieces_change_nothing(gpt2, monkeypatch):
    ids, mask = prompts(3)
    whole = rank(gpt2, ids, mask, Conditioning(parts(3)), CANDIDATES)
    monkeypatch.setattr("vqa_scratch.generate.ranking.NODES", 3)
    monkeypatch.setattr("vqa_scratch.generate.ranking.SCORES", 3 * VOCABULARY)
    assert torch.allclose(rank(gpt2, ids, mask, Conditioning(parts(3)), CANDIDATES), whole, atol=1e-5)


def test_what_candidates_share_is_one_node():
    tree = tree_of(CANDIDATES)
    assert len(tree.tokens) == 7  # 3, 3 4, 3 4 5, 6, 6 6, 6 6 6, and 8
    assert tree.depths.max() == 2


@pytest.mark.parametrize("candidates", [[], [[3], []]])
def test_ranking_needs_candidates(gpt2, candidates):
    with pytest.raises(ValueError, match="candidates of one token at least"):
        rank(gpt2, torch.tensor([[3]]), None, None, candidates)


def test_ranking_refuses_unknown_tokens_and_training(gpt2):
    with pytest.raises(ValueError, match="a candidate has token 14, the vocabulary 14"):
        rank(gpt2, torch.tensor([[3]]), None, None, [[14]])
    with pytest.raises(ValueError, match="eval mode"):
        rank(GPT2(gpt2.config), torch.tensor([[3]]), None, None, [[1]])
