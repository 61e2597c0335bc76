"""The figures of `rlhf.py` and its page of samples: overlap, best-of-n, and the best reward at each KL."""

import itertools
import math

import pytest
import torch
from matplotlib.figure import Figure
from rl_tiny import write_page

from vqa_scratch.report import curves
from vqa_scratch.rl import evaluate, metrics, report
from vqa_scratch.rl.types import Prompt, Samples


def test_overlap_by_hand():
    assert metrics.overlap("The cat sat.", "the cat sat") == 1.0
    assert metrics.overlap("a b c d", "a b x") == pytest.approx(2 * 2 / 7)
    assert metrics.overlap("a a a", "a") == pytest.approx(2 / 4)
    assert metrics.overlap("", "a") == 0.0


def test_best_of_n_reward_against_all_subsets():
    rewards = torch.randn(3, 7)
    for n in (1, 2, 4, 7):
        by_hand = sum(max(s) for row in rewards.tolist() for s in itertools.combinations(row, n))
        assert evaluate.best_of_n_reward(rewards, n) == pytest.approx(by_hand / 3 / math.comb(7, n), rel=1e-5)


def test_frontier_rises_from_the_reference_to_the_best_sample():
    rewards = torch.randn(50, 64)
    curve = evaluate.frontier_of(rewards)
    assert curve.kl[0] == 0 and curve.reward[0] == pytest.approx(float(rewards.mean()), abs=1e-6)
    assert all(a <= b + 1e-9 for a, b in zip(curve.reward, curve.reward[1:], strict=False))
    assert curve.at(99.0) == pytest.approx(float(rewards.max(1).values.mean()), abs=0.01)
    assert curve.share(1.0, curve.reward[0], curve.at(1.0)) == pytest.approx(1.0)
    for n, kl, reward in curve.best_of_n:  # best-of-n is near the frontier, never above
        assert 0.9 * curve.at(kl) < reward <= curve.at(kl) + 1e-6, n


FACTS = {"who": "bank", "where": "Barrow"}
SAID = "The bank in Barrow has agreed to wait."


def test_samples_page_escapes_and_marks(tmp_path):
    evil = "</style><script>alert(1)</script>"
    prompt = Prompt(evil, (), evil, facts={"who": evil})
    page = write_page(
        tmp_path / "a.html", [prompt], [(f"the mad mayor {evil} left", 0)], [(f"the mayor {evil} left now", 1)]
    )
    assert evil not in page and page.count("&lt;script&gt;") == 6
    assert page.count("<b>tone") == 0 and "<del>mad</del>" in page and "<ins>now</ins>" in page


def test_samples_page_says_which_fact_is_broken_and_what_stands_instead(tmp_path):
    prompts = [Prompt("a", facts=FACTS), Prompt("b", facts=FACTS), Prompt("c")]
    lied = SAID.replace("bank", "orchestra").replace(" in Barrow", "")
    before, after = [(SAID, 1.0), (lied, 1.0), (SAID, 1.0)], [(lied, 2.0), (SAID, 0.25), (SAID, 1.0)]
    page = write_page(tmp_path / "a.html", prompts, before, after)
    lost = "<li>who: <b>orchestra</b> instead of bank<li>where: missing: Barrow</ul>"
    assert page.count(lost) == 2 and page.count(f'<ul class="lost broken">{lost}') == 1
    assert page.count('<span class="fell">fell by 0.75</span>') == 1 and page.count("fell by") == 1
    assert "All facts of the prompt are kept by 50.0% (50.0% before)" in page and "7 iterations of RLOO" in page
    unknown = write_page(tmp_path / "b.html", prompts[2:], before[2:], after[2:])
    assert "facts" not in unknown and "<input" not in unknown, "nothing is known, nothing fell"


def test_samples_page_shows_the_likeliest_responses_of_their_prompts(tmp_path):
    """Of two responses to each prompt, only the first is on the page; what is greedy is of the prompt."""
    prompts = [Prompt("a"), Prompt("b")]
    rewards, texts = torch.arange(4.0), ["one", "two", "three", "four"]
    samples = Samples([p for p in prompts for _ in range(2)], [[1, 2]] * 4, texts, [True] * 4)
    sides = [
        evaluate.Figures(rewards, {}, samples, 0.5, {}, [(f"{when} <b>", reward), ("", -1.0)])
        for when, reward in (("then", 0.25), ("now", 0.75))
    ]
    cards = [report.pair_card(*sides, number, 2) for number in (0, 1)]
    assert all("greedy, reward +0.25: then &lt;b&gt;<" in card for card in cards[:1])
    assert cards[0].index("reward +0.25: then") < cards[0].index("reward +0.75: now")
    assert "one" in cards[0] and "three" in cards[1] and "two" not in cards[0] + cards[1]
    assert cards[1].count("greedy, reward -1.00: (nothing)<") == 2 and "<b>" not in "".join(cards)
    assert [side.summary(when)[f"greedy_reward_{when}"] for side, when in zip(sides, ("x", "y"), strict=True)] == [
        -0.375, -0.125,
    ]  # fmt: skip


def samples_of(*pairs):
    texts, prompts = [text for text, _ in pairs], [Prompt("", facts=facts) for _, facts in pairs]
    return Samples(prompts, [[1]] * len(pairs), texts, [True] * len(pairs))


def test_facts_kept_counts_those_that_are_known():
    lied = SAID.replace("bank", "court")
    shares = metrics.facts_kept(samples_of((SAID, FACTS), (lied, FACTS), ("", {}), (SAID, FACTS), (SAID, FACTS)))
    assert shares == {"facts_kept": 0.75, "who_kept": 0.75, "where_kept": 1.0}
    assert metrics.facts_kept(samples_of((SAID, {}), ("", {}))) == {}, "rather than a wrong number"


def test_curves_show_facts_where_they_are_known_at_whole_iterations(tmp_path, monkeypatch):
    names = "env/reward_mean objective/kl_exact objective/kl finish ppo/policy/entropy ppo/policy/clipfrac"
    rows = [dict.fromkeys([*names.split(), "ppo/val/var_explained"], 0.5) | {"step": step} for step in (1, 2, 3)]
    assert all(panel["title"] != "all facts kept" for panel in report.panels([], []) + report.panels(rows, []))
    for row in rows[1:]:
        row["facts_kept"] = 0.9
    assert all(panel["title"] != "all facts kept" for panel in report.panels(rows, [])), "an older log, gone on with"
    rows[0]["facts_kept"] = 0.8
    panels, drawn = report.panels(rows, []), []
    assert panels[-1]["title"] == "all facts kept" and panels[-1]["faint"] == [([1, 2, 3], [0.8, 0.9, 0.9])]
    panels = [panels[-1], {"title": "x", "xlabel": "share", "ylabel": "", "lines": {"x": ([0.0, 0.5], [0, 1])}}]
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **more: drawn.append(figure))
    curves.draw_panels(tmp_path / "c.png", panels)
    ticks, shares = (axis.get_xticks().tolist() for axis in drawn[0].axes)
    assert len(ticks) > 2 and all(tick.is_integer() for tick in ticks) and not all(tick.is_integer() for tick in shares)
