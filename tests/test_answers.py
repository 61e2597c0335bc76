"""The list of answers a classifier chooses from, and the soft targets."""

from pathlib import Path

import numpy as np
import pytest

from vqa_scratch.data.answers import AnswerList, SoftTargets
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.metrics import vqa_accuracy


def sample(number: int, answers: list[str]) -> VQASample:
    majority = max(answers, key=answers.count)
    return VQASample(1, Path("x.png"), number, "what?", "what", "other", tuple(answers), majority)


def many(answer: str, count: int, start: int) -> list[VQASample]:
    return [sample(start + i, [answer] * 10) for i in range(count)]


def test_nine_questions_make_an_answer():
    """Counted after the official normalisation and without commas; sorted, so that the order is that of every run."""
    samples = many("yes", 9, 0) + many("no", 8, 100) + many("t-shirt", 5, 200) + many("T-Shirt.", 4, 300)
    samples += many("two", 5, 400) + many("2", 4, 500) + many("the", 20, 600) + many("1,000", 9, 700)
    assert AnswerList.from_samples(samples).labels == ("1000", "2", "t shirt", "yes")
    assert AnswerList.from_samples(reversed(samples)).labels == ("1000", "2", "t shirt", "yes")
    assert "no" in AnswerList.from_samples(samples, least=8).labels


def test_no_answer_is_frequent_enough():
    with pytest.raises(UserError, match="the most frequent one is to 8.*--min-answer-count"):
        AnswerList.from_samples(many("no", 8, 0))
    with pytest.raises(UserError, match="the most frequent one is to 0"):
        AnswerList.from_samples([])


@pytest.mark.parametrize(("count", "target"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_targets(count, target):
    """0, .3, .6, .9, 1 by how many of ten said so, which is the official accuracy of that answer."""
    answers = AnswerList(("down", "up"))
    row = sample(0, ["down"] * count + ["elsewhere"] * (10 - count))
    dense = SoftTargets([row], answers).dense(np.array([0]))
    np.testing.assert_allclose(dense, [[target, 0.0]])
    assert vqa_accuracy("down", row.answers) == pytest.approx(target)


@pytest.mark.parametrize(
    ("label", "spellings"),
    [
        ("yes", ["Yes", "yes.", " YES "]),
        ("dog", ["the dog", "a dog", "Dog!"]),
        ("2", ["two", "Two", "2"]),
        ("1000", ["1,000", "1000"]),
        ("t shirt", ["t-shirt", "T-Shirt"]),
        ("don't know", ["dont know", "don't know"]),
        ("No", ["no", "NO"]),  # a released model may have labels in capitals
    ],
)
def test_every_spelling_of_a_label_counts_for_it(label, spellings):
    answers = AnswerList(("first", label))
    assert answers.known(sample(0, ["other"] * 9 + [spellings[0]])) == {1: 0.3}
    assert answers.known(sample(0, [spellings[0]] * 5 + [spellings[-1]] * 5)) == {1: 1.0}
    assert answers.known(sample(0, spellings[:1])) == {1: 1.0}
    assert answers.answerable([sample(0, [spelling]) for spelling in spellings])


def test_sparse_targets_are_the_dense_ones():
    """Against a loop over the definition, for rows in any order and rows with nothing in them."""
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(9)]
    samples = [sample(i, list(rng.choice(words, 10))) for i in range(40)]
    answers = AnswerList(tuple(words[:4]))
    targets = SoftTargets(samples, answers)
    wanted = np.zeros((40, 4), np.float32)
    for row, one in enumerate(samples):
        for place, label in enumerate(answers.labels):
            wanted[row, place] = min(1.0, round(0.3 * one.answers.count(label), 1))
    rows = rng.permutation(40)[:25]
    np.testing.assert_allclose(targets.dense(rows), wanted[rows], atol=1e-7)
    np.testing.assert_allclose(targets.mean(), wanted.mean(0), atol=1e-6)


def test_questions_without_a_known_answer_are_left_out():
    answers = AnswerList(("yes",))
    samples = many("yes", 2, 0) + many("no", 3, 10) + [sample(20, ["no"] * 9 + ["yes"])]
    assert [s.question_id for s in answers.answerable(samples)] == [0, 1, 20]
    with pytest.raises(UserError, match="none of the 3 questions has an answer among the 1 of the classifier.*'yes'"):
        answers.answerable(many("no", 3, 0))
    with pytest.raises(UserError, match="question 7 has no annotators' answers"):
        answers.answerable([VQASample(1, Path("x.png"), 7, "what?", "", "", (), "")])
