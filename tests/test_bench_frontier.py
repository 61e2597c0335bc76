"""The picture of the algorithms: its figures are those of the runs, a finished run is kept, and rows are chosen."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from bench import __main__ as program
from bench import frontier
from vqa_scratch.commands.line import call
from vqa_scratch.errors import UserError
from vqa_scratch.report.curves import draw_panels
from vqa_scratch.rl.options import read_command_line
from vqa_scratch.storage import read_object, write_json


def a_run(folder, reward, kl, share, iterations=2):
    """What a run leaves, by hand: a curve that rises from 1 to 3 at the target and stays there."""
    write_json(folder / "config.json", {"iterations": iterations, "prompts": 8, "samples": 4})
    found = {"kl": [0.0, 3.0, 5.0], "reward": [1.0, 3.0, 3.0], "reached": [kl, reward]}
    best = [{"n": 2, "kl_bound": 0.2, "reward": 1.1}, {"n": 4, "kl_bound": 1.0, "reward": 1.25}]
    summary = {"frontier": found, "frontier_kl_limit": 5.0, "frontier_share": share, "best_of_n": best}
    write_json(folder / "summary.json", summary)
    row = {"ppo/val/critic_explained": -0.5, "ppo/val/var_explained": 0.25, "time/ppo/total": 1.5, "env/reward_mean": 2}
    rows = [row | {"step": 1, "objective/kl_exact": kl}, row | {"step": 2, "objective/kl_exact": kl + 1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def plan(tmp_path):
    plan = frontier.Plan(frontier.chosen("ppo, grpo", frontier.ALGORITHMS), (0, 1, 2), out=tmp_path)
    for (name, seed), job in plan.runs().items():
        job.folder.mkdir(parents=True)
        a_run(job.folder, 2.0 + 0.5 * seed, 2.0 + seed, (0.9 if name == "ppo" else 0.6) + 0.1 * seed)
    return plan


def test_the_table_has_the_figures_of_the_runs(plan):
    text, panels = frontier.run(plan, "a command")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    assert lines[2][:3] == ["ppo", "1.000 (goal 0.97)", "0.900 (goal 0.95)"]
    assert lines[2][3:5] == ["3.00 (2.00 to 4.00)", "5.00 (goal at most 4.5)"]
    assert lines[2][5:] == ["-0.50", "0.25", "3"] and lines[3][:3] == ["grpo", "0.700", "0.600"] and lines[3][5] == ""
    assert lines[4][:4] == ["best of 4 samples", "0.375", "", "1.00"]  # 0.25 of the 0.667 that can be gained at 1 nat
    assert "64 rollouts a run, seeds 0 and 1 and 2." in text
    points = panels[0]["points"]
    assert points["ppo"] == ([2.0, 3.0, 4.0], [0.5, 0.75, 1.0])
    kl, gain = points["best of n samples"]
    assert kl == (0.2, 1.0) and gain == pytest.approx((0.05, 0.125))
    assert panels[1]["lines"]["grpo"] == ([1, 2], [3.0, 3.5])


def test_it_is_drawn_where_it_is_asked_for(plan, monkeypatch, capsys):
    """And no run that is finished is run again."""
    monkeypatch.setattr(
        frontier, "train_all", lambda jobs, at_once: [read_object(j.folder / "summary.json") for j in jobs]
    )
    with pytest.raises(SystemExit) as ended:
        program.main(["frontier", "--algorithms", "ppo,grpo", "--seeds", "0,2", "--out", str(plan.out)])
    assert not ended.value.code and "best of 4 samples" in capsys.readouterr().out
    assert (plan.out / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_other_lengths_are_not_compared(plan):
    a_run(plan.runs()["grpo", 1].folder, 2.0, 2.0, 0.5, iterations=3)
    with pytest.raises(UserError, match=r"differ in their rollouts: \[64, 96\]; they cannot be compared"):
        frontier.run(plan, "")


@pytest.mark.parametrize("rows", [frontier.ALGORITHMS, frontier.CRITICS], ids=["algorithms", "critics"])
def test_every_row_is_a_run_that_can_be(rows):
    for (name, seed), job in frontier.Plan(rows, (3,)).runs().items():
        options = read_command_line(job.flags)
        assert options.seed == seed and all(str(getattr(options, k.replace("-", "_"))) for k in rows[name])
    assert len({job.folder for job in frontier.Plan(rows).runs().values()}) == 5 * len(rows)


def test_a_row_that_is_none_is_refused():
    with pytest.raises(UserError, match="^--algorithms sarsa: there is no such row; there are ppo, rloo, grpo, best-"):
        call(program.PROGRAM, ["frontier", "--algorithms", "sarsa"], "python -m bench")


def test_a_label_has_one_colour_in_all_panels(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (drawn.append(figure), Path(path).touch()))
    curve = ([1, 2], [0.0, 1.0])
    panels = [
        {"title": "", "ylabel": "", "lines": {"best": curve}, "points": {"ppo": curve, "rloo": curve}},
        {"title": "", "ylabel": "", "lines": {"ppo": curve, "rloo": curve, "grpo": curve}},
    ]
    draw_panels(tmp_path / "x.png", panels)
    first, second = ({line.get_label(): line.get_color() for line in axis.lines} for axis in drawn[0].axes)
    assert {label: second[label] for label in ("ppo", "rloo")} == {label: first[label] for label in ("ppo", "rloo")}
    assert len(set(first.values())) == len(set(second.values())) == 3
