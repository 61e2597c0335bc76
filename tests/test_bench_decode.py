"""The decoding benchmark at tiny sizes: answers end where they should, and both sides write the same tokens."""

from dataclasses import replace

import pytest

from bench import decode
from bench.decode_sides import EOS, LONGEST, Case, CompiledPeer, Ours, Peer, make_model
from bench.suite import figures
from vqa_scratch.errors import UserError

LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA |= {"intermediate_size": 20, "vocab_size": 40}
TINY = {"llama": LLAMA, "moe": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}}
SIZES = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32}


@pytest.mark.parametrize("size", ["shapes", "llama", "moe"])
@pytest.mark.parametrize("case", [Case(batch=16, lengths="real"), Case(batch=2, beams=3, lengths="7")])
def test_both_sides_write_the_same_tokens_and_end_in_time(tmp_path, case, size):
    case = replace(case, size=size)
    make_model(tmp_path, case, TINY.get(size, SIZES))
    ours, theirs = Ours(tmp_path, case).tokens(), Peer(tmp_path, case).tokens()
    assert ours == theirs
    if case.beams == 1:  # without a GPU its cache is static, and nothing is compiled
        assert ours == CompiledPeer(tmp_path, case).tokens()
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


class Says:
    """A side that has decoded already."""

    def __init__(self, side: str, rows: list[list[int]]) -> None:
        self.side, self.rows = side, rows

    def ask(self, name: str) -> tuple[float, list[list[int]]]:
        return 0.0, self.rows


def test_every_side_is_held_to_ours(tmp_path):
    case = Case(batch=2, lengths="2")
    same, other = [[5, 6, EOS], [7, 8, EOS]], [[5, 6, EOS], [7, 9, EOS]]
    assert decode.check([Says("ours", same), Says("peer", same), Says("compiled", same)], case, tmp_path).startswith(
        "all"
    )
    with pytest.raises(UserError, match="different tokens"):
        decode.check([Says("ours", same), Says("peer", same), Says("compiled", other)], case, tmp_path)
    with pytest.raises(UserError, match=r"compiled wrote \[3, 2\] tokens a row instead of \[3, 3\]"):
        decode.check(
            [Says("ours", same), Says("peer", same), Says("compiled", [[5, 6, EOS], [EOS, 1]])], case, tmp_path
        )


def test_a_gpu_has_a_second_peer_and_its_own_goals():
    case = Case("gpt2", precision="bf16", device="cuda")
    assert decode.names_of(case) == ["ours", "peer", "compiled"]
    assert decode.names_of(replace(case, device="cpu")) == decode.names_of(replace(case, beams=4)) == ["ours", "peer"]
    seconds = {"ours": [0.1, 0.1], "peer": [0.4, 0.4], "compiled": [0.08, 0.08]}
    outcome = decode.Outcome(case, seconds, {"ours": 1.0, "peer": 2.0}, "")
    table = decode.results.table(decode.GPU_HEAD, [outcome.row()])
    found = figures("decode", table)
    assert [(one.figure, one.goal, one.reached) for one in found] == [
        ("4.00x (4.00 to 4.00)", "3.0x", "yes"),
        ("0.80x (0.80 to 0.80)", "1.0x", "no"),
    ]


def test_what_a_token_reads(tmp_path):
    """By hand: two layers of q, k, v, out, two norms and MLP, or router and two experts; the last norm and the head."""
    for size, mlp in (("llama", 3 * 32 * 20), ("moe", 4 * 32 + 2 * 3 * 32 * 20)):
        case = Case(size, lengths="2")
        make_model(tmp_path / size, case, TINY[size])
        reads = Ours(tmp_path / size, case).reads()
        assert reads == 4 * (2 * (64 * 32 + 32 * 32 + 64 + mlp) + 32 + 40 * 32)


def test_the_table_of_bytes_has_goals():
    seconds = {"llama": [0.21, 0.21], "moe": [0.42, 0.42], "wide": [0.84, 0.84]}  # of 21 tokens
    table = decode.bytes_table(seconds, {"llama": 10**8, "moe": 1.5 * 10**8, "wide": 4 * 10**8})
    assert "| moe size, batch 1, fp32   | 150" in table and " 20.00 " in table and " 7.5 " in table
    found = figures("decode", table)
    assert [(one.figure, one.goal, one.reached) for one in found] == [
        ("1.00x", "at most 1.25x", "yes"),
        ("1.33x", "at most 1.25x", "no"),
        ("1.00x", "at most 1.25x", "yes"),
    ]
