"""`python -m bench all`: what it runs, what it reads from the tables, and that no benchmark stops the others."""

import sys

import pytest
import torch

from bench import __main__ as program
from bench import grpo, ppo, results, suite, t5_bias
from vqa_scratch.commands.line import call
from vqa_scratch.errors import UserError
from vqa_scratch.models.t5 import T5, T5Config

SECTION = """## A title

| case         | ours, s          | ratio                    | goal        | peak GB            |
| ------------ | ---------------- | ------------------------ | ----------- | ------------------ |
| fp32, 4 rows | 5.43 (5.1 to 6)  | **1.36x** (1.30 to 1.43) | 1.15x       | 3.1 (goal at most 3) |
| bf16, 4 rows | 2.60 (2.5 to 3)  | **1.10x** (1.00 to 1.25) | 1.5x        | 2.5                |
| fp16, 4 rows | 2.60 (2.5 to 3)  | **1.10x** (1.00 to 1.25) | none        | 2.5                |
| fp8, 4 rows  | not measured: no GPU | not measured         | 2x          |                    |

- Some machine. `a command`
"""


def test_figures_are_read_from_the_tables():
    found = [(f.case, f.figure, f.goal, f.reached) for f in suite.figures("x", SECTION)]
    assert found == [
        ("fp32, 4 rows: ratio", "1.36x (1.30 to 1.43)", "1.15x", "yes"),
        ("fp32, 4 rows: peak GB", "3.1", "at most 3", "no"),
        ("bf16, 4 rows", "1.10x (1.00 to 1.25)", "1.5x", "no"),
        ("fp8, 4 rows", "not measured", "2x", ""),
    ]
    pair = "| case | side | ratio |\n|---|---|---|\n| 197 tokens | ours | 0.95x (goal 1.0) / 1.20x (goal 1.0) |"
    assert [(f.figure, f.reached) for f in suite.figures("x", pair)] == [("0.95x", "no"), ("1.20x", "yes")]


def test_the_figures_on_record_are_read():
    """Every section of the results file that has a goal: no table may drop out of the summary by its form."""
    text = results.RESULTS.read_text(encoding="utf-8")
    for name in ("train-step", "decode-cpu", "loss-head-cpu-fp32", "cached-features", "image-loading", "taps", "ppo"):
        section = text.partition(f"<!-- {name}: begin -->")[2].partition(f"<!-- {name}: end -->")[0]
        assert suite.figures(name, section), name


def test_one_that_fails_is_a_line_and_the_others_run():
    asked = []

    def run(words):
        asked.append(words)
        outcomes = {"bad": (2, "", "loading\nerror: is transformers installed?\n"), "gone": (-9, "", "")}
        return outcomes.get(words[0], (0, SECTION if words[0] == "good" else "no table", ""))

    plan = {"bad": [], "good": ["--all"], "gone": [], "counted": []}
    text, failed = suite.run_all(plan, True, run)
    assert failed == ["bad", "gone"]
    assert asked == [["bad", "--write"], ["good", "--all", "--write"], ["gone", "--write"], ["counted", "--write"]]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert lines[2][:2] == ["bad", "failed: is transformers installed?"]
    assert lines[3][:5] == ["good", "fp32, 4 rows: ratio", "1.36x (1.30 to 1.43)", "1.15x", "yes"]
    assert lines[-2][:2] == ["gone", "failed: ended with status -9"]
    assert lines[-1][:2] == ["counted", "done; it has no goal"]


@pytest.fixture
def plans(monkeypatch):
    """What `python -m bench all` would run, and nothing is run."""
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(suite, "run_all", lambda plan, write: seen.append((plan, write)) or ("a table", []))
    return seen


def ask(*argv):
    call(program.PROGRAM, argv, "python -m bench")


def test_all_runs_what_is_recorded_and_only_and_skip_choose(plans, monkeypatch):
    ask("all", "--write")
    ask("all", "--only", "decode", "--only", "taps")
    ask("all", "--skip", "decode", "--trl", "some/python")
    ask("all", "--only", "grpo", "--trl-current", "another/python")
    (first, write), (second, no), (third, _), (fourth, _) = plans
    assert fourth == {"grpo": ["--trl", "another/python"]}
    assert first == suite.CPU and write and not no
    assert list(second) == ["decode", "taps"]
    assert "decode" not in third and third["ppo"][-2:] == ["--trl", "some/python"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ask("all")
    assert plans[-1][0] == suite.GPU
    assert not set(suite.CPU) - set(program.PROGRAM.commands) and not set(suite.GPU) - set(program.PROGRAM.commands)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--only deco", "deco is no benchmark of this machine; there are train-step, decode"),
        ("--only taps --skip taps", "leave no benchmark to run"),
        ("--skip ppo --trl x", "--trl is for ppo, which does not run here"),
    ],
)
def test_what_all_cannot_do(plans, argv, message):
    with pytest.raises(UserError, match=message):
        ask("all", *argv.split())
    assert not plans


def test_all_ends_with_an_error_where_one_failed(plans, monkeypatch, capsys):
    monkeypatch.setattr(suite, "run_all", lambda plan, write: ("the table", ["taps"]))
    with pytest.raises(UserError, match=f"1 of {len(suite.CPU)} benchmarks failed: taps"):
        ask("all")
    assert "the table" in capsys.readouterr().out


def test_every_option_on_record_is_one_of_its_benchmark():
    for name, options in (*suite.CPU.items(), *suite.GPU.items()):
        program.PROGRAM.commands[name].make_context(name, list(options))


def test_a_benchmark_is_a_process_of_its_own(capfd):
    status, text, said = suite.process(["loss-head", "--device", "cuda"] if not torch.cuda.is_available() else ["x"])
    assert status == 2 and not text and said.startswith("error: ") and said in capfd.readouterr().err


def test_ppo_says_what_it_lacks_and_how_it_compares():
    sides = {"ours, fp32": {"seconds": 2.0, "generate": 1.0, "update": 1.0, "samples_per_second": 4.0, "peak_mb": 700}}
    alone = ppo.rows(sides, False)
    assert alone[0][:2] == ["TRL, all articles at once", "not measured: no TRL environment; give --trl PYTHON"]
    assert alone[2][5] == "not measured (goal 1.35x)" and alone[3][1] == "not measured: left out by --only"
    sides[ppo.BATCHED] = {**sides["ours, fp32"], "samples_per_second": 2.5, "peak_mb": 1000}
    sides["ours, fp32, 4 articles at once"] = sides["ours, fp32"]
    row, few = ppo.rows(sides, True)[2:4]
    assert (row[5], row[8], few[8]) == ("1.60x (goal 1.35x)", "0.70", "0.70 (goal at most 0.7)")
    with pytest.raises(UserError, match="--write goes with neither"):
        ask("ppo", "--tiny", "--write")


@pytest.mark.parametrize("part", [["connectors", "--only", "mean"], ["binding", "--variant", "frozen"]])
def test_a_table_of_kept_runs_is_written_whole(part):
    with pytest.raises(UserError, match=f"--write is for the whole table: leave out {part[1]}; .* are kept"):
        ask(*part, "--write")


def test_a_side_of_ppo_that_dies_is_one_line(capsys):
    dead = ppo.Contestant("TRL", [sys.executable, "-c", "raise SystemExit('no module named trl')"])
    with pytest.raises(UserError, match="^TRL: no module named trl$"):
        dead.read("READY")
    dead.stop()
    with pytest.raises(UserError, match="^TRL: /no/such/python: No such file"):
        ppo.Contestant("TRL", ["/no/such/python"])


def test_grpo_compares_outputs_first_and_then_each_algorithm_with_its_own(tmp_path):
    ours = {"seconds": 2.0, "generate": 0.5, "peak_mb": 700}
    theirs = {"seconds": 3.0, "generate": 1.0, "peak_mb": 1000}
    assert grpo.rows({"ours, GRPO": ours})[0][4] == "not measured: no TRL"
    table = grpo.rows(
        {"TRL, GRPO": theirs, "ours, GRPO": ours, "TRL, RLOO": theirs | {"seconds": 4.0}, "ours, RLOO": ours}
    )
    assert [(row[4], row[6]) for row in table[::2]] == [("", "")] * 2
    assert (table[1][4], table[1][6]) == ("1.50x (goal 1.3x)", "0.70 (goal at most 0.8)") and table[3][4] == "2.00x"
    with pytest.raises(UserError, match="--write does not go with --tiny"):
        ask("grpo", "--tiny", "--write")
    assert "were not compared" in grpo.check_comparable(tmp_path, "rloo")
    said = {"logprobs": torch.full((2, 3), -1.0), "advantages": torch.ones(2), "loss": torch.tensor(0.5)}
    said |= {"gradient": torch.tensor(2.0)}
    for algorithm in ("grpo", "rloo"):
        torch.save(said, tmp_path / f"probe-{algorithm}.pt")
    whole = {"logprobs": torch.full((2,), -3.0), "loss": torch.tensor(1.5), "gradient": torch.tensor(6.0)}
    for algorithm, own in (("grpo", {}), ("rloo", whole)):  # RLOO's is of whole responses, here of three tokens
        torch.save(said | {"mask": torch.ones(2, 3)} | own, tmp_path / f"probe-{algorithm}-trl.pt")
        assert "advantages to 0e+00, loss to 0e+00, gradient to 0e+00" in grpo.check_comparable(tmp_path, algorithm)
    torch.save(said | {"mask": torch.ones(2, 3), "gradient": torch.tensor(2.001)}, tmp_path / "probe-grpo-trl.pt")
    with pytest.raises(UserError, match="the two sides compute another gradient of GRPO: 5.0e-04"):
        grpo.check_comparable(tmp_path, "grpo")


def test_the_two_ways_of_t5s_bias_are_held_to_each_other(monkeypatch):
    """Without a GPU both ways are one, so they agree to the bit, until one is changed."""
    model = T5(T5Config(vocab_size=20, dim=8, head_dim=4, hidden=8, encoder_layers=1, decoder_layers=1, heads=2))
    ids, mask = torch.randint(2, 20, (2, 9)), torch.arange(9) < torch.tensor([[9], [4]])
    model.eval()
    assert t5_bias.check(model, ids, mask).startswith("0.0e+00 apart in fp32")
    step = t5_bias.step
    calls = []

    def wrong(*given):
        calls.append(given)
        found = step(*given)
        return [found[0], found[1] * (1.01 if len(calls) == 1 else 1.0), found[2]]

    monkeypatch.setattr(t5_bias, "step", wrong)
    with pytest.raises(UserError, match="T5's bias, 2 x 9 tokens"):
        t5_bias.check(model, ids, mask)
