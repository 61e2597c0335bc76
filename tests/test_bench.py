"""The benchmarks: both sides of the training step agree at small sizes, operations are counted, timing is fair."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import use_backend
from model_helpers import GRID, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from bench import cached_features, image_loading, results, timing, train_step
from bench import prefix as bench_prefix
from bench import taps as bench_taps
from bench.peers import TransformersVQA
from bench.sides import Case, Ours, Peer
from vqa_scratch.errors import UserError
from vqa_scratch.nn import taps as modules_taps
from vqa_scratch.nn.states import Places, States

SIZES = {
    "image": {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "image_size": 24,
        "patch_size": 8,
    },
    "text": {"dim": 20, "n_layers": 2, "n_heads": 2, "hidden_dim": 44, "vocab_size": 60, "max_position_embeddings": 16},
    "decoder": {"n_embd": 28, "n_layer": 2, "n_head": 2, "vocab_size": 70, "n_positions": 12},
}
SIZES["decoder"] |= {"bos_token_id": 69, "eos_token_id": 69}
CASE = Case(questions=6, images=2, question_tokens=5, answer_tokens=3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files with weights large enough that a mistake shows in every gradient."""
    folder = tmp_path_factory.mktemp("weights")
    peer = TransformersVQA.random(**SIZES)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    peer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("images", [2, 6])
def test_both_sides_have_one_loss_and_the_same_gradients(weights, tmp_path, images):
    case = replace(CASE, images=images)
    ours = Ours(weights, case).gradients(tmp_path / "ours")
    theirs = Peer(weights, case).gradients(tmp_path / "peer")
    assert ours == pytest.approx(theirs, rel=1e-6)
    together, worst, name = train_step.gradient_difference(tmp_path / "ours", tmp_path / "peer")
    assert together < 1e-5 and worst < 1e-4, (together, worst, name)  # rounding of fp32 in other orders of summation


def test_a_step_moves_both_sides_to_the_same_weights(weights, tmp_path):
    sides = {"ours": Ours(weights, CASE), "peer": Peer(weights, CASE)}
    for name, side in sides.items():
        side.step()
        side.gradients(tmp_path / name)
    # Adam's first step is lr * sign(gradient): where a gradient is rounding noise the sign is too, hence the tolerance.
    together, _, _ = train_step.gradient_difference(tmp_path / "ours", tmp_path / "peer")
    assert together < 1e-3


def test_fused_adamw_is_the_same_step(weights):
    plain, fused = Peer(weights, CASE), Peer(weights, CASE)
    for _ in range(2):  # the second finds the state that the first made
        # From the same weights, so that the gradients are the same: that of a key's bias is a rounding error, which
        # Adam makes as large as any other.
        fused.model.load_state_dict(plain.model.state_dict())
        plain.step()
        fused.fused_step()
        for a, b in zip(plain.model.parameters(), fused.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bf16_stays_within_its_budget(weights, tmp_path):
    case = replace(CASE, precision="bf16")
    ours, peer = Ours(weights, case), Peer(weights, case)
    peer.gradients(tmp_path / "reference", fp32=True)
    ours.gradients(tmp_path / "ours")
    peer.gradients(tmp_path / "peer")
    off = {n: train_step.gradient_difference(tmp_path / n, tmp_path / "reference")[0] for n in ("ours", "peer")}
    assert 1e-4 < off["ours"] < train_step.ERROR_BUDGET * off["peer"]  # and it is bf16: not equal to fp32


def test_gradient_difference_sees_one_wrong_tensor(weights, tmp_path):
    ours, peer = Ours(weights, CASE), Peer(weights, CASE)
    peer.gradients(tmp_path / "peer")
    with torch.no_grad():
        ours.model.decoder.blocks[1].cross.out.bias[3] += 0.5
    ours.gradients(tmp_path / "ours")
    assert train_step.gradient_difference(tmp_path / "ours", tmp_path / "peer")[1] > 1e-3


def test_operations_are_those_of_the_products(weights, monkeypatch):
    side = Ours(weights, CASE)
    use_backend(monkeypatch, "explicit")  # whose products the counter sees one by one
    with FlopCounterMode(display=False) as counter:
        side.loss(side.data)[0].backward()
    configs = [getattr(side.model, tower).config for tower in ("image", "text", "decoder")]
    pooling = 4 * CASE.questions * CASE.question_tokens * SIZES["decoder"]["n_embd"]  # a product in our code alone
    assert train_step.step_operations(*configs, CASE) == counter.get_total_flops() - pooling


def test_sides_take_turns_and_figures_are_medians():
    order, lines = [], []

    def side(name, seconds):
        values = iter(seconds)
        return lambda: order.append(name) or next(values)

    taken = timing.in_turn({"a": side("a", [1.0, 5.0, 2.0]), "b": side("b", [3.0, 5.0, 8.0])}, 3, lines.append)
    assert order == list("ababab") and len(lines) == 3
    assert taken == {"a": [1.0, 5.0, 2.0], "b": [3.0, 5.0, 8.0]}
    assert timing.Spread.of(taken["a"]) == timing.Spread(2.0, 1.5, 3.5, 3)
    ratio = timing.speedup(taken["a"], taken["b"])  # medians 2 and 5; by rounds 3, 1, 4
    assert (ratio.median, ratio.low, ratio.high) == (2.5, 2.0, 3.5)
    assert timing.Spread.of([4.0]) == timing.Spread(4.0, 4.0, 4.0, 1)
    with pytest.raises(ValueError, match="no measurements"):
        timing.Spread.of([])


def test_ceilings_and_memory_are_plausible():
    assert timing.matmul_gflops(torch.float32, seconds=0.05) > 1
    assert timing.copy_gb_per_second(megabytes=8, seconds=0.05) > 0.1
    # In a process of its own: in this one a test before may have freed as much, which the allocator gives again.
    code = """
import torch
from bench import timing
timing.forget_peak()
before = timing.peak_memory_gb()
held = torch.ones(50_000_000)
print(before, held.nbytes / 1e9, timing.peak_memory_gb())
"""
    said = subprocess.run([sys.executable, "-c", code], cwd=results.ROOT, stdout=subprocess.PIPE, text=True, check=True)
    before, held, after = map(float, said.stdout.split())
    assert before + 0.5 * held < after < 64


def test_sections_are_replaced_not_repeated(tmp_path):
    path = tmp_path / "RESULTS.md"
    path.write_text("# Results\n\nHow to read.\n", encoding="utf-8")
    for name, text in (("one", "first"), ("two", "second"), ("one", "third")):
        results.write_section(name, text, path)
    whole = path.read_text(encoding="utf-8")
    assert whole.startswith("# Results\n\nHow to read.\n") and whole.index("third") < whole.index("second")
    assert "first" not in whole and whole.count("<!-- one: begin -->") == 1


def test_a_part_keeps_the_other_rows(tmp_path):
    """Rows are told apart by what stands before their first figure, and lines by what they begin or end with."""
    path, head = tmp_path / "RESULTS.md", ["case", "batch", "ms", "goal"]

    def section(*rows: list[str], prose: str, command: str) -> str:
        lines = [f"- {row[0]} {row[1]}: {prose}." for row in rows]
        return "\n".join([prose, "", results.table(head, rows), "", *lines, f"- 2 cores: idle. `{command}`"])

    whole = section(["small", "1", "9.6 (9.5 to 9.9)", "4x"], ["small", "8", "7.5", ""], prose="old", command="a --all")
    results.write_section("x", whole, path)
    for prose in ("new", "newer"):
        part = section(["small", "8", "70.5", ""], ["large", "8", "1.0", "2x"], prose=prose, command="a --size")
        results.write_section("x", part, path, part=True)
    rows = [["small", "1", "9.6 (9.5 to 9.9)", "4x"], ["small", "8", "70.5", ""], ["large", "8", "1.0", "2x"]]
    lines = ["- small 1: old.", "- small 8: newer.", "- 2 cores: idle. `a --all`", "- large 8: newer."]
    wanted = "\n".join(["newer", "", results.table(head, rows), "", *lines, "- 2 cores: idle. `a --size`"])
    assert path.read_text(encoding="utf-8") == f"# Results\n\n<!-- x: begin -->\n{wanted}\n<!-- x: end -->\n"
    results.write_section("x", whole, path)
    assert whole in path.read_text(encoding="utf-8") and "large" not in path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_whole_run_at_small_sizes(monkeypatch):
    monkeypatch.setattr(timing, "matmul_gflops", lambda dtype, device: 100.0)
    monkeypatch.setattr(timing, "copy_gb_per_second", lambda device: 10.0)
    text = train_step.run([Case("fp32", 4, 2, 5, 3)], 2, "the command", SIZES)
    row = next(line for line in text.splitlines() if line.startswith("| fp32"))
    assert re.search(r"\*\*\d+\.\d\dx\*\*", row) and "3.5x" in row and "not timed" in row
    assert "losses differ by" in text and "`the command`" in text


def test_a_side_that_fails_says_why(tmp_path):
    with pytest.raises(UserError, match="ours: "), train_step.contestants(tmp_path, CASE, ("ours",)):
        pass


def test_the_taps_are_cut_out_only_inside():
    real = modules_taps.tap, modules_taps.wanted
    with bench_taps.cut_out():
        x = torch.ones(2)
        assert modules_taps.tap("image.0.self", "q", x) is x and not modules_taps.wanted("image.0.self", "q")
        assert modules_taps.tap is not real[0] and modules_taps.wanted is not real[1]
    assert (modules_taps.tap, modules_taps.wanted) == real


def test_what_a_shared_prefix_saves_is_a_table():
    text = bench_prefix.run(rounds=1, questions=16, command="python -m bench prefix")
    assert text.count("| `prefix`, ") == text.count("| `qformer`, ") == 2 and "| 16 of 2 " in text


def test_a_prefix_each_only_inside():
    """Apart, every row goes through the decoder with a prefix of its own; the connector is as before afterwards."""
    connector, index = tiny_model("prefix").connector, torch.tensor([1, 0, 1])
    image = States(torch.randn(2, 10, 16), places=Places(GRID, 4.0, 8.0))
    with bench_prefix.apart(connector):
        given = connector(image, None, index)
    assert given.prefix_index is None and torch.equal(given.prefix, connector(image, None).prefix[index])
    assert connector(image, None, index).prefix_index is index


def test_the_cost_of_taps_is_a_table(monkeypatch):
    """Of given times: the calls of a step take 1 ms with taps and none without, a step of real ones 99 ms."""
    replayed, step = [], bench_taps.Steps.step

    def replay(calls):
        replayed.append(calls)
        return 0.001 if modules_taps.tap is tap else 0.0

    tap = modules_taps.tap
    monkeypatch.setattr(bench_taps, "replay", replay)
    monkeypatch.setattr(bench_taps.Steps, "step", lambda steps: step(steps) and 0.099)
    text = bench_taps.run(rounds=2, questions=16, command="python -m bench taps")
    calls = replayed[0]
    assert {given[0].split(".")[0] for _, given in calls} == {"image", "decoder"}
    assert {(name, len(given)) for name, given in calls if name == "tap" or given[1] == "head_out"} == {
        ("tap", 3),
        ("wanted", 2),
    }
    assert f"| 16        | {len(calls)} " in text and "| 1000.0 (" in text
    assert "| 99 (" in text and "| **0.99000x** " in text


def test_what_is_replayed_are_the_calls(monkeypatch):
    made = []
    monkeypatch.setattr(bench_taps, "REPLAYS", 2)
    calls = [("wanted", ("image.0.self", "q")), ("tap", ("image.0.self", "q", None))]
    with bench_taps.instead(lambda *given: made.append(("tap", given)), lambda *given: made.append(("wanted", given))):
        assert bench_taps.replay(calls) >= 0
    assert made == 2 * calls


# ------------------------------------------------------------------------------------------------ caches

TINY = {"preset": "shapes", "width": 32, "heads": 2, "image_layers": 1, "text_layers": 1, "decoder_layers": 1}


@pytest.mark.parametrize("connector", ["mean", "tokens", "prefix"])
def test_cached_features_are_compared_before_they_are_timed(connector, monkeypatch):
    case = cached_features.Case("fp32", connector, questions=8, images=4)
    said = cached_features.run([case], 2, "the command", TINY)
    assert "| fp32" in said and f"| {connector}" in said and "`the command`" in said and "MB" in said
    monkeypatch.setattr(cached_features.Sides, "losses", lambda self: {"cached": 1.0, "recomputed": 1.1})
    with pytest.raises(UserError, match="the losses differ: 1.0000000 cached, 1.1000000 recomputed"):
        cached_features.run([case], 2, "", TINY)


def test_loaded_images_are_compared_before_they_are_timed(monkeypatch):
    said = image_loading.run(5, 2, "the command")
    assert "of 255" in said and "`the command`" in said
    monkeypatch.setattr(image_loading, "NEAR", -1)
    with pytest.raises(UserError, match="differ from torchvision's by up to"):
        image_loading.run(3, 2, "")
