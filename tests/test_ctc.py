"""CTC against the enumeration of all paths, torch's own loss, and its plain definition."""

import itertools
import math
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F

from vqa_scratch.generate.ctc import ctc_beam, ctc_greedy
from vqa_scratch.kernels import check_alignable, ctc_align, ctc_loss, ctc_posteriors, frames_needed, reference

close = torch.testing.assert_close
FRAMES, SYMBOLS = 5, 3  # 243 paths


def said(path, blank: int) -> tuple[int, ...]:
    return tuple(symbol for symbol, _ in itertools.groupby(path) if symbol != blank)


def states(path, blank: int) -> list[int]:
    """The states of the lattice that a path is in."""
    at, before, out = -1, blank, []
    for symbol in path:
        if symbol != blank and symbol != before:
            at += 1
        out.append(2 * at + 1 if symbol != blank else 2 * at + 2)
        before = symbol
    return out


def enumerated(logits, blank: int):
    """{text: [(probability, path), ...]} over all paths of one row (T, V)."""
    p = logits.softmax(-1)
    texts = defaultdict(list)
    for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        texts[said(path, blank)].append((math.prod(float(p[t, s]) for t, s in enumerate(path)), path))
    return texts


@pytest.fixture(params=[0, 2], ids=["blank first", "blank last"])
def blank(request):
    return request.param


def padded(rows, width=None):
    width = max(map(len, rows)) if width is None else width
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows]).reshape(len(rows), width)


def test_loss_posteriors_alignment_and_search_are_those_of_all_paths(blank):
    logits = torch.randn(1, FRAMES, SYMBOLS, dtype=torch.float64)
    texts = enumerated(logits[0], blank)
    for text, paths in texts.items():
        labels = padded([text], len(text) + 1)  # one more place than labels
        total = sum(p for p, _ in paths)
        close(
            ctc_loss(logits, labels, blank=blank, reduction="none"),
            torch.tensor([-math.log(total)], dtype=torch.float64),
        )
        gamma = torch.zeros(FRAMES, 2 * len(text) + 3, dtype=torch.float64)
        for p, path in paths:
            for t, state in enumerate(states(path, blank)):
                gamma[t, state] += p / total
        close(ctc_posteriors(logits, labels, blank=blank)[0], gamma)
        _, best = max(paths)
        along = [state // 2 if state % 2 else -1 for state in states(best, blank)]
        assert ctc_align(logits, labels, blank=blank)[0].tolist() == along
    found = ctc_beam(logits, width=len(texts), blank=blank)[0]
    assert {tuple(text) for text, _ in found} == texts.keys()
    for text, log_p in found:
        assert log_p == pytest.approx(math.log(sum(p for p, _ in texts[tuple(text)])), abs=1e-12)
    assert sum(math.exp(log_p) for _, log_p in found) == pytest.approx(1)
    assert [x for _, x in found] == sorted((x for _, x in found), reverse=True)
    best_path = max((p, path) for paths in texts.values() for p, path in paths)[1]
    assert tuple(ctc_greedy(logits, blank=blank)[0]) == said(best_path, blank)


LABELS = [(1, 2, 3, 4), (1, 1, 2), (), (3, 3, 3), (2,), (1, 2, 1, 2, 1, 2), (4, 4, 4, 4)]
LENGTHS = [9, 9, 4, 5, 1, 7, 6]  # the last row would need 7 frames, the one before has one to spare
FEASIBLE = torch.tensor([1, 1, 1, 1, 1, 1, 0], dtype=torch.bool)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("zero_infinity", [True, False])
def test_the_loss_is_that_of_torch(reduction, zero_infinity):
    logits = (3 * torch.randn(len(LABELS), 9, 5, dtype=torch.float64)).requires_grad_()
    lengths, targets = torch.tensor(LENGTHS), torch.tensor([len(row) for row in LABELS])
    options = {"reduction": reduction, "zero_infinity": zero_infinity}
    ours = ctc_loss(logits, padded(LABELS), lengths, **options)
    log_probs = logits.log_softmax(-1).transpose(0, 1)
    theirs = F.ctc_loss(log_probs, padded(LABELS).clamp(min=0), lengths, targets, blank=0, **options)
    close(ours, theirs)
    weights = torch.rand(ours.shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), logits)
    if not zero_infinity:  # torch gives NaN there
        assert ours.isinf().any() and torch.isfinite(gradient).all() and not gradient[-1].any()
        return
    (expected,) = torch.autograd.grad((theirs * weights).sum(), logits)
    close(gradient, expected)
    assert not any(row[frames:].any() for row, frames in zip(gradient, LENGTHS, strict=True))
    close(gradient.sum(-1), torch.zeros(len(LABELS), 9, dtype=torch.float64))  # softmax and posteriors both sum to 1


def test_the_loss_is_its_definition_and_its_gradient_that_of_finite_differences():
    logits = torch.randn(len(LABELS), 9, 5, dtype=torch.float64, requires_grad=True)
    labels, lengths = padded(LABELS), torch.tensor(LENGTHS)
    ours = ctc_loss(logits, labels, lengths, reduction="none")
    plain = reference.ctc_loss(logits, labels, lengths)
    close(ours, plain)
    gradients = [torch.autograd.grad(x[FEASIBLE].sum(), logits)[0] for x in (ours, plain)]
    close(*gradients)
    two = torch.tensor([1, 3])
    kept = logits[two].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ctc_loss(x, labels[two], lengths[two], reduction="none"), kept)
    with torch.no_grad():  # without a gradient only the sums to each state are computed
        close(ctc_loss(logits, labels, lengths, reduction="none"), ours)


def test_low_precision_and_impossible_symbols():
    exact = torch.randn(3, 30, 8, dtype=torch.float64)
    labels, lengths = torch.randint(1, 8, (3, 6)), torch.tensor([30, 20, 25])
    half = exact.bfloat16().requires_grad_()
    loss = ctc_loss(half, labels, lengths)
    assert loss.dtype == torch.float32
    rounded = half.detach().double().requires_grad_()
    close(loss, ctc_loss(rounded, labels, lengths).float(), rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(ctc_loss(x, labels, lengths), x)[0].double() for x in (half, rounded)]
    close(*gradients, rtol=2**-8, atol=1e-5)  # one rounding to bf16
    exact[:, 3, labels[0, 2]] = -math.inf
    exact.requires_grad_()
    loss = ctc_loss(exact, labels, lengths, reduction="sum")
    close(
        loss,
        F.ctc_loss(exact.log_softmax(-1).transpose(0, 1), labels, lengths, torch.tensor([6, 6, 6]), reduction="sum"),
    )
    assert torch.isfinite(torch.autograd.grad(loss, exact)[0]).all()


def test_a_long_row_stays_exact():
    """Sums over 1,500 frames are near -7,000, where fp32 has steps of 5e-4; within a frame most of that cancels."""
    logits, labels = 5 * torch.randn(2, 1_500, 30), torch.randint(1, 30, (2, 400))
    gamma = ctc_posteriors(logits, labels)
    close(gamma.sum(-1), torch.ones(2, 1_500))
    close(gamma.double(), ctc_posteriors(logits.double(), labels), rtol=0, atol=1e-2)
    assert (ctc_align(logits, labels).amax(1) == 399).all()

    def gradient(loss, x) -> torch.Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(loss(x), x)[0].double()

    def torchs(x) -> torch.Tensor:
        lengths = torch.tensor([1_500] * 2), torch.tensor([400] * 2)
        return F.ctc_loss(x.log_softmax(-1).transpose(0, 1), labels, *lengths, reduction="sum")

    exact = gradient(torchs, logits.double())
    ours, theirs = (gradient(loss, logits) for loss in (lambda x: ctc_loss(x, labels, reduction="sum"), torchs))
    assert (ours - exact).abs().max() < 0.5 * (theirs - exact).abs().max()  # a tenth, usually


# ------------------------------------------------------------------------------------------------ decoding


def symbols(*path, of=4):
    return 9.0 * F.one_hot(torch.tensor([path]), of)


def test_greedy_merges_before_it_drops_blanks():
    assert ctc_greedy(symbols(0, 1, 1, 0, 1, 2, 2, 3)) == [[1, 1, 2, 3]]
    assert ctc_greedy(symbols(0, 1, 1, 0, 1, 2, 2, 3), torch.tensor([3])) == [[1]]
    assert ctc_greedy(symbols(3, 1, 3, 1, 3), blank=3) == [[1, 1]]
    assert ctc_greedy(symbols(0, 0)) == [[]]


def test_the_likeliest_text_may_not_be_that_of_the_likeliest_path():
    logits = torch.tensor([[[0.6, 0.4], [0.6, 0.4]]]).log()  # blank blank: 0.36; "1" by three paths: 0.64
    assert ctc_greedy(logits) == [[]]
    (text, log_p), *_ = ctc_beam(logits)[0]
    assert text == [1] and log_p == pytest.approx(math.log(0.64))


def test_a_narrow_beam_finds_what_is_clear_in_each_row():
    logits = torch.cat([symbols(0, 1, 1, 0, 1), symbols(2, 2, 0, 3, 1)])
    for width in (1, 4):
        found = ctc_beam(logits, torch.tensor([5, 4]), width=width)
        assert [row[0][0] for row in found] == [[1, 1], [2, 3]] and all(len(row) <= width for row in found)


def test_alignment_shows_which_of_equal_labels():
    logits = symbols(0, 1, 1, 0, 1, 0, 2, 2)
    assert ctc_align(logits, torch.tensor([[1, 1, 2]])).tolist() == [[-1, 0, 0, -1, 1, -1, 2, 2]]
    rows = ctc_align(logits.expand(2, -1, -1), padded([(1, 1, 2), ()]), torch.tensor([8, 3])).tolist()
    assert rows == [[-1, 0, 0, -1, 1, -1, 2, 2], [-1] * 8]
    assert ctc_align(logits, torch.tensor([[1, 1]]), torch.tensor([6])).tolist() == [[-1, 0, 0, -1, 1, -1, -1, -1]]


# ------------------------------------------------------------------------------------------------ bad input


def test_labels_longer_than_can_be_aligned():
    assert frames_needed(padded([(1, 2, 3), (1, 1, 1), (), (5, 5, 4)])).tolist() == [3, 5, 0, 4]
    check_alignable(padded([(1, 1, 1)]), torch.tensor([5]))
    line = r"row 1: its 3 labels take 5 frames \(equal neighbours need a blank\), not 4"
    for call in (check_alignable, lambda labels, lengths: ctc_align(torch.zeros(2, 6, 3), labels, lengths)):
        with pytest.raises(ValueError, match=line):
            call(padded([(1,), (1, 1, 1)]), torch.tensor([4, 4]))


@pytest.mark.parametrize(
    ("logits", "labels", "lengths", "options", "line"),
    [
        ((2, 5), [[1]], None, {}, r"logits \(B, T, V\) and labels \(B, S\) do not fit: \(2, 5\), \(1, 1\)"),
        ((2, 5, 3), [[1]], None, {}, "do not fit"),
        ((1, 0, 3), [[1]], None, {}, "do not fit"),
        ((1, 5, 3), [[3]], None, {}, "id 3 is beyond the vocabulary of 3"),
        ((1, 5, 3), [[1, 0]], None, {}, "labels must not hold the blank, 0"),
        ((1, 5, 3), [[-1, 1]], None, {}, "negative numbers must stand behind others"),
        ((1, 5, 3), [[1]], [6], {}, "lengths must hold 1 numbers from 1 to 5"),
        ((1, 5, 3), [[1]], [0], {}, "lengths must hold 1 numbers from 1 to 5"),
        ((1, 5, 3), [[1]], [2, 2], {}, "lengths must hold 1 numbers from 1 to 5"),
        ((1, 5, 3), [[1]], None, {"reduction": "max"}, "reduction must be none, sum or mean, not 'max'"),
    ],
)
def test_arguments_that_do_not_fit(logits, labels, lengths, options, line):
    lengths = None if lengths is None else torch.tensor(lengths)
    with pytest.raises(ValueError, match=line):
        ctc_loss(torch.zeros(logits), torch.tensor(labels), lengths, **options)


def test_a_beam_has_a_width():
    with pytest.raises(ValueError, match="width must be at least 1, not 0"):
        ctc_beam(torch.zeros(1, 2, 3), width=0)
    with pytest.raises(ValueError, match=r"logits must be \(B, T, V\), not \(2, 3\)"):
        ctc_greedy(torch.zeros(2, 3))
