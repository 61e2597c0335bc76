"""The functions a decoding step is made of, where the way taken depends on how many rows there are."""

from types import SimpleNamespace

import pytest
import torch

from vqa_scratch.generate import GenerationOptions, generate, loop
from vqa_scratch.generate.fast import products
from vqa_scratch.models import GPT2, GPT2Config

LARGE = (700, 400)  # more than products.LARGE_WEIGHT bytes in fp32


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3, 4, 17, 64, 65])
@pytest.mark.parametrize("biased", [True, False])
def test_products_of_any_number_of_rows(rows, biased):
    """Against float64, within four roundings of the sum of what is added, each taken positive."""
    weight, bias = random(*LARGE), random(LARGE[0], seed=1) if biased else None
    x, before = random(rows, LARGE[1], seed=2), random(rows, LARGE[0], seed=3)
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    budget = 4 * torch.finfo(torch.float32).eps * (x.abs() @ weight.t().abs()).max()
    assert (products.product(weight, bias)(x) - exact).abs().max() <= budget
    after = before.clone()
    products.adding(weight, bias)(after, x)
    assert (after - (before + exact)).abs().max() <= budget


@pytest.fixture
def measured(monkeypatch):
    """Nothing is measured yet, and what is wins by its name: `seconds` of each way."""
    seconds = {"linear": 0.0, "one_dnn": 1.0, "in_halves": 1.0, "by_vector": 1.0}
    timings = []

    def timed(multiply, way) -> float:
        multiply(way)
        timings.append(way.__name__)
        return seconds[way.__name__]

    monkeypatch.setattr(products, "timed", timed)
    monkeypatch.setattr(products, "FASTEST", {})
    return SimpleNamespace(seconds=seconds, timings=timings)


@torch.no_grad()
@pytest.mark.parametrize("way", ["product", "adding", "into"])
def test_few_rows_of_a_large_weight_take_their_own_way(way, monkeypatch, measured):
    """Small weights, other number formats and autocast keep the usual one."""
    seen = []
    plain = products.one_dnn
    monkeypatch.setattr(products, "one_dnn", lambda x, *given: seen.append(len(x)) or plain(x, *given))

    def apply(rows: int, weight: torch.Tensor) -> None:
        x, before = random(rows, weight.shape[1]).to(weight.dtype), random(rows, len(weight)).to(weight.dtype)
        if way == "product":
            products.product(weight, None)(x)
        elif way == "adding":
            products.adding(weight, None)(before, x)
        else:
            module = torch.nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
            products.linear_into(module)(before, x)

    for rows in (4, 64, 65):
        apply(rows, random(*LARGE))
    assert seen == ([4, 64] if torch.backends.mkl.is_available() else []) and not measured.timings
    for rows in (1, 3):
        apply(rows, random(*LARGE))
    assert set(measured.timings) == ({"linear", "one_dnn", "in_halves"} if torch.backends.mkl.is_available() else set())
    seen.clear(), measured.timings.clear()
    for weight in (random(70, 40), random(*LARGE).double(), random(*LARGE).bfloat16()):
        apply(8, weight)
    with torch.autocast("cpu", torch.bfloat16):
        apply(1, random(*LARGE))
    assert not seen and not measured.timings


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("outputs", [700, 701])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("way", products.FP32_ROWS)
def test_every_way_for_a_few_rows_is_the_product(way, rows, outputs, biased):
    """Against float64, within four roundings of the sum of what is added, each taken positive."""
    if way is products.one_dnn and not products.HAS_ONE_DNN:
        pytest.skip("this torch has no oneDNN for linear layers")
    x, weight, bias = random(rows, 400), random(outputs, 400, seed=1), random(outputs, seed=2) if biased else None
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    budget = 4 * torch.finfo(torch.float32).eps * (x.abs() @ weight.t().abs()).max()
    found = way(x, weight, bias)
    assert found.shape == exact.shape and (found - exact).abs().max() <= budget


@torch.no_grad()
@pytest.mark.parametrize(("rows", "vector"), [(1, True), (1, False), (2, False)])
@pytest.mark.parametrize("way", ["product", "product and bias", "into", "adding"])
def test_bf16_rows_are_as_near_the_exact_product_as_torchs(measured, rows, vector, way):
    """One row may go by another operator than several."""
    measured.seconds["linear"] = 2.0 if vector else 0.0
    x, weight, bias = random(rows, 24).bfloat16(), random(40, 24, seed=1).bfloat16(), random(40, seed=2).bfloat16()
    bias = bias if way in ("product and bias", "into") else None
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    module = torch.nn.Linear(24, 40, dtype=torch.bfloat16)
    if way == "into":
        module.weight.copy_(weight), module.bias.copy_(bias)
        ours = torch.empty(rows, 40, dtype=torch.bfloat16)
        products.linear_into(module)(ours, x)
    elif way == "adding":
        ours = torch.zeros(rows, 40, dtype=torch.bfloat16)
        products.adding(weight, None)(ours, x)
    else:
        ours = products.product(weight, bias)(x)
    assert ours.shape == exact.shape and ours.dtype == torch.bfloat16
    # half a unit in the last of bf16's 8 bits, and once more for the bias
    torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=2**-8 * exact.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "quick"), [(torch.bfloat16, "by_vector"), (torch.float32, "in_halves")])
def test_few_rows_go_the_way_that_was_fastest(monkeypatch, measured, dtype, quick):
    """Each size of a weight is timed once, for one row and for more, for each number of threads."""
    if dtype is torch.float32 and not products.HAS_ONE_DNN:
        pytest.skip("this torch has no oneDNN for linear layers")
    weight, other = random(*LARGE).to(dtype), random(LARGE[0] + 1, LARGE[1]).to(dtype)

    def taken(weight: torch.Tensor, rows: int = 1) -> str:
        products.product(weight, None)(random(rows, LARGE[1]).to(dtype))
        return list(products.FASTEST.values())[-1].__name__

    measured.seconds |= {"linear": 1.0, quick: 0.0}
    assert taken(weight) == taken(weight) == quick
    assert measured.timings.count(quick) == 3 and measured.timings.count("linear") == 1, "what takes long is left"
    measured.seconds |= {"linear": 0.5, quick: 0.6}
    assert taken(weight) == quick and len(products.FASTEST) == 1, "as measured before"
    assert taken(other) == "linear" and len(products.FASTEST) == 2
    taken(weight, rows=2), taken(weight, rows=3)
    known = 2 if dtype is torch.bfloat16 else 3
    assert len(products.FASTEST) == known, "several rows in bf16 are a matrix"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert taken(weight) == "linear" and len(products.FASTEST) == known + 1


@pytest.mark.parametrize("sampled", [False, True])
def test_log_probabilities_of_several_steps_at_once(sampled, monkeypatch):
    """Worked out step by step, a few steps at a time, or all at the end, with rows dropped on the way."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config(11, 40, dim=16, layers=1, heads=2)).eval()
    prompts, found = torch.randint(2, 11, (6, 3)), []
    options = GenerationOptions(12, 3, do_sample=True, seed=5) if sampled else GenerationOptions(12, 3)
    for kept in (0, 11 * 6 * 3, 10**6):
        monkeypatch.setitem(loop.SCORES_KEPT, "cpu", kept)
        found.append(generate(model, prompts, options=options))
    assert len(set(found[0].lengths.tolist())) > 1  # rows did end on the way
    for other in found[1:]:
        assert torch.equal(other.ids, found[0].ids) and torch.equal(other.lengths, found[0].lengths)
        assert (other.log_probs - found[0].log_probs).abs().max() < 1e-6  # a softmax of rows laid out otherwise
    with torch.no_grad():
        ids = torch.cat([prompts, found[0].ids], 1)
        whole = model(ids)[:, 2:-1].log_softmax(-1).gather(2, found[0].ids[..., None]).squeeze(2)
    real = torch.arange(whole.shape[1]) < found[0].lengths[:, None]
    assert (found[0].log_probs - whole * real).abs().max() < 1e-5  # fp32, logits of order 1


def test_a_row_that_never_ends_and_one_that_ends_at_once():
    """`lengths` count EOS; what comes after it is filled, and has log-probability 0."""
    scores = torch.zeros(2, 5)
    scores[0, 1], scores[1, 2] = 9.0, 9.0

    class Fixed:
        """Row 0 always says 1, the end; row 1 says 2."""

        def step(self, tokens):
            return scores[tokens - 1]

        def keep(self, groups):
            pass

    class Stays:
        """The same for all rows at once, which no row leaves."""

        step = Fixed.step

        def keep(self, groups):
            raise AssertionError("a row was dropped")

    choose = lambda scores, live, made: (scores.argmax(-1), scores)  # noqa: E731
    made = loop.decode(scores, Fixed(), choose, max_new_tokens=4, eos_id=1, fill=7)
    assert made.ids.tolist() == [[1, 7, 7, 7], [2, 2, 2, 2]] and made.lengths.tolist() == [1, 4]
    assert torch.equal(made.log_probs == 0.0, torch.tensor([[False, True, True, True], [False] * 4]))
    with pytest.raises(AssertionError, match="dropped"):
        loop.decode(scores, Stays(), choose, max_new_tokens=4, eos_id=1)
    all_along = loop.decode(scores, Stays(), choose, max_new_tokens=4, eos_id=1, fill=7, compact_below=0.0)
    assert all(torch.equal(*pair) for pair in zip(all_along, made, strict=True))
    quiet = lambda scores, live, made: (scores.argmax(-1), None)  # noqa: E731
    silent = loop.decode(scores, Fixed(), quiet, max_new_tokens=4, eos_id=1, fill=7)
    assert silent.log_probs is None and torch.equal(silent.ids, made.ids) and torch.equal(silent.lengths, made.lengths)
    endless = loop.decode(scores, Fixed(), choose, max_new_tokens=3, eos_id=None)
    assert endless.ids.tolist() == [[1, 1, 1], [2, 2, 2]] and endless.lengths.tolist() == [3, 3]
