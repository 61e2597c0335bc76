"""The table of experts: its runs can be, its figures are closed forms, and a finished run is kept."""

import math

import pytest
import torch
from run_helpers import make_run
from vqa_helpers import SPEC

from bench import connector_speed, connectors, experts
from bench.connector_runs import Job, Plan
from bench.experts import Run
from vqa_scratch import systems
from vqa_scratch.nn.experts import Routing
from vqa_scratch.storage import write_json
from vqa_scratch.systems.options import read_command_line
from vqa_scratch.systems.vqa import VQASystem


def parameters(row: experts.Row) -> tuple[int, int]:
    """(all, active) of the decoder's MLPs that a row trains at the default width."""
    options = read_command_line(["--preset=shapes", *row.flags])
    VQASystem.check(options)
    width, k = options.width, options.experts_per_token
    hidden = options.decoder_hidden or (4 * width if options.experts is None else 4 * width // k)
    number, read = (options.experts, k) if options.experts else (1, 1)
    return 2 * number * width * hidden, 2 * read * width * hidden


def test_rows_have_the_sizes_that_they_say():
    active, total, *mixtures = map(parameters, experts.all_rows())
    assert len(mixtures) == 3 and all(one == (total[0], active[0]) for one in mixtures)
    assert len({row.folder for row in experts.all_rows()}) == 5


def test_entropies_are_closed_forms():
    """Even loads have 1, one expert alone 0; a word that goes to one expert leaves no doubt."""
    even, alone = torch.full((1, 3, 4), 5), torch.tensor([[[7, 0, 0, 0]] * 3])
    known = torch.eye(4).repeat(1, 2, 1) * 6
    run = Run({}, 0.0, 0, 0, torch.cat([even, alone, known[:, :3]]))
    assert run.entropies == pytest.approx([1.0, 0.0, math.log(3) / math.log(4)])
    assert run.by_word[0] == pytest.approx(0.0) and run.by_word[2] == pytest.approx(1.0)
    assert run.largest == pytest.approx(4.0)
    half = torch.tensor([[4, 4], [8, 0]])  # of 16, half the words leave one bit
    assert experts.conditional_entropy(half) == pytest.approx(math.log(2) / 2)
    dense = Run({}, 0.0, 0, 0, torch.zeros(0, 3, 1))
    assert dense.entropies == [] and dense.largest is None and dense.by_word == []


def test_words_are_counted_by_expert():
    """Against a loop; a prefix has no word, and padding goes nowhere."""
    ids = torch.randint(5, (2, 4))
    chosen = torch.stack([torch.randperm(3)[:2] for _ in range(3 + 8)])
    chosen[5] = 3
    counts = experts.counted(Routing(torch.zeros(11, 3), torch.zeros(11, 3), chosen, torch.zeros(11, 2)), ids, 6)
    wanted = torch.zeros(6, 3)
    for word, own in zip(ids.flatten().tolist(), chosen[3:].tolist(), strict=True):
        for expert in own:
            if expert < 3:
                wanted[word, expert] += 1
    assert torch.equal(counts, wanted.long())


def test_the_table_of_words():
    counts = torch.tensor([[20, 15, 5], [0, 10, 10], [4, 0, 4]])  # of 20, 10 and 4 tokens
    first, second, third = experts.words_of(counts, ["red", "box", "?"]).splitlines()[2:]
    assert first.startswith("| 0      | 35%           | red 100%, ? 100% ") and "red 75%, box 100%" in second
    assert "box 100%, red 25%, ? 100%" in third


def test_a_run_is_read(data, tmp_path):
    """Its loss, its sizes, and a count of two experts for each real token; of a dense one none."""
    sizes = {"experts": 4, "decoder_layers": 2, "question_prompt": True}
    for folder, changes in (("moe", sizes), ("dense", {"decoder_layers": 2, "question_prompt": True})):
        write_json(make_run(data, tmp_path / folder, **changes) / "summary.json", {"accuracy": 0.5})
    samples = VQASystem.read(systems.load(tmp_path / "moe").options).samples["val"]
    moe, dense = (experts.read_run(Job(tmp_path / name, []), samples) for name in ("moe", "dense"))
    split = systems.load(tmp_path / "moe").split(samples)
    assert moe.counts.sum((1, 2)).tolist() == [2 * int(split.questions.decoder_ids.lengths.sum())] * 2
    one = sum(p.numel() for p in systems.load(tmp_path / "moe").model.decoder.blocks[0].mlp.experts["0"].parameters())
    assert moe.parameters - moe.active == 2 * 2 * one and dense.parameters == dense.active
    assert dense.counts.shape[0] == 0 and 0 < dense.loss < 20 and moe.loss != dense.loss
    rows = experts.all_rows()
    text = experts.learned({rows[0]: {0: dense}, rows[2]: {0: moe}})
    assert text.count("none") >= 4 and rows[2].name in text
    assert "(start)" in experts.texts_of(tmp_path / "moe")


@pytest.mark.slow
def test_the_whole_table_at_small_sizes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(connector_speed, "QUESTIONS", 16)
    monkeypatch.setattr(connector_speed, "ASKED", 2)
    more = ("--questions-per-step=32", "--eval-questions=40", "--samples=2", "--width=32", "--heads=2")
    where = {"out": tmp_path / "runs", "cache": tmp_path / "cache", "spec": SPEC}
    plan = Plan(2, (0,), precision="fp32", rounds=1, more=(*more, "--decoder-layers=1"), **where)
    text = experts.run(plan, "it")
    assert all(row.name in text for row in experts.all_rows()) and text.count("**Provisional**") == 1
    assert connectors.provisional(plan, True) in text and "training" in capsys.readouterr().err
    assert experts.run(plan, "it").splitlines()[0] == text.splitlines()[0]
    assert "training" not in capsys.readouterr().err
