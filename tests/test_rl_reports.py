"""The figures of `rlhf.py` and its page of samples: overlap, best-of-n, and the best reward at each KL."""

import itertools
import math

import pytest
import torch

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


def test_samples_page_escapes_and_marks():
    evil = "<script>alert(1)</script>"
    prompt = mini_news_prompt(evil)
    before = figures(prompt, f"the mad mayor {evil} left")
    after = figures(prompt, f"the mayor {evil} left now")
    page = report.samples_page(before, after, 1)
    assert evil not in page and page.count("&lt;script&gt;") == 4
    assert "<del>mad</del>" in page and "<ins>now</ins>" in page


def mini_news_prompt(text):
    return Prompt(text, (), text)


def figures(prompt, text):
    value = torch.tensor([1.0])
    return evaluate.Figures(value, {"<b>": value}, Samples([prompt], [[1]], [text], [False]), 0.5, {})
