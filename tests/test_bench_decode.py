"""The decoding benchmark at tiny sizes: answers end where they should, and both sides write the same tokens."""

from dataclasses import replace

import pytest

from bench import decode
from bench.decode_sides import EOS, LONGEST, Case, Ours, Peer, make_model

SIZES = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32}


@pytest.mark.parametrize("case", [Case(batch=16, lengths="real"), Case(batch=2, beams=3, lengths="7")])
def test_both_sides_write_the_same_tokens_and_end_in_time(tmp_path, case):
    make_model(tmp_path, case, SIZES)
    ours, theirs = Ours(tmp_path, case).tokens(), Peer(tmp_path, case).tokens()
    assert ours == theirs
    assert [len(row) for row in ours] == [length + 1 for length in case.tokens()]
    assert all(row[-1] == EOS and EOS not in row[:-1] for row in ours)


def test_bf16_ends_in_time_too_and_its_tokens_are_near_the_best(tmp_path):
    case = Case(batch=4, precision="bf16", lengths="9")
    make_model(tmp_path, case, SIZES)
    rows = Ours(tmp_path, case).tokens()
    assert [len(row) for row in rows] == [10] * 4
    exact = Ours(tmp_path, replace(case, precision="fp32"))
    assert exact.gap(exact.tokens()) == pytest.approx(0, abs=1e-5)
    assert exact.gap(rows) < 0.1  # scores are a few units apart
    worse = [[(token + 1) % 40 if i == 3 else token for i, token in enumerate(row)] for row in exact.tokens()]
    assert exact.gap(worse) > 0.1


def test_every_goal_has_a_case_that_fits():
    for case in decode.CASES:
        assert max(case.tokens()) < LONGEST
