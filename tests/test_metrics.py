"""The official VQA accuracy: golden cases, a literal re-statement of the public script, and the breakdowns."""

import hashlib
import json
import random
import re
from fractions import Fraction
from types import SimpleNamespace

import pytest

from vqa_scratch.metrics import CONTRACTIONS, accuracy_by, normalize_answer, soft_targets, vqa_accuracy

GOLDEN = {
    "t-shirt": "t shirt",
    "1,000 t-shirts": "1000 tshirts",
    "3.": "3",
    "2.5": "2.5",
    "u.s.a.": "usa",
    "none": "0",
    "no one": "no 1",
    "a": "",
    "5:00": "5:00",
    "3:30 p.m.": "3:30 pm",
    "red/blue": "red blue",
    "The Dog": "dog",
    "TEN": "10",
    " yes\n": "yes",
    "black\tand white": "black and white",
    "red, blue": "red blue",  # "," beside a space: deleted
    "red,blue": "red blue",  # not beside one: becomes a space
    "x,5 t-b": "x 5 t b",  # no digit before the comma: not a number
    "t-shirt- b": "tshirt b",  # one "-" beside a space deletes every "-"
    "t-shirt\t-b": "tshirt b",  # a tab is a space
    "isn't it?": "isn't it",  # the apostrophe stays
    "50%": "50%",
    "#1": "#1",
    "wont": "won't",
    "hes an OK guy": "he's ok guy",
    "lets": "lets",
    "let's": "let's",
    "somebody'd": "somebodyd",
    "Im": "im",  # the table's "Im" is out of reach, because the text is lowered first
    "yall'd've": "y'all'd've",
    "ow's'at": "'ow's'at",
    "": "",
    ".": "",
}


@pytest.mark.parametrize("raw", GOLDEN)
def test_normalization_golden_cases(raw):
    assert normalize_answer(raw) == GOLDEN[raw]


def test_at_most_32_periods_are_removed():
    assert normalize_answer("a" + "." * 40) == "a" + "." * 8


def test_contraction_table_is_the_official_one():
    # The digest of the 120 entries of the public evaluation script, sorted, as JSON.
    digest = hashlib.blake2b(json.dumps(sorted(CONTRACTIONS.items())).encode(), digest_size=16).hexdigest()
    assert digest == "124c8d2188b2b304b8b8b4fa5e18e66e"


def official(prediction, answers):
    """The procedure as its documentation tells it: dicts with ids, leave one out, exact thirds."""
    dicts = [{"answer_id": i, "answer": text} for i, text in enumerate(answers)]

    def clean(text):
        for mark in "\n\t":
            text = text.replace(mark, " ")
        return text.strip()

    def punctuation(text):
        out = text
        for mark in [*';/[]"', *"{}()=+", "\\", *"_-><@`", ",", "?", "!"]:
            delete = mark + " " in text or " " + mark in text or bool(re.search(r"\d,\d", text, re.ASCII))
            out = out.replace(mark, "" if delete else " ")
        for _ in range(32):
            out = re.sub(r"\.(?!\d)", "", out, count=1, flags=re.ASCII)
        return out

    def digits(text):
        names = ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
        words = [str(max(names.index(w) - 1, 0)) if w in names else w for w in text.lower().split()]
        return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ("a", "an", "the"))

    prediction = clean(prediction)
    for d in dicts:
        d["answer"] = clean(d["answer"])
    if len({d["answer"] for d in dicts}) > 1:
        prediction = digits(punctuation(prediction))
        for d in dicts:
            d["answer"] = digits(punctuation(d["answer"]))
    scores = []
    for left_out in dicts:
        matches = [d for d in dicts if d != left_out and d["answer"] == prediction]
        scores.append(min(Fraction(1), Fraction(len(matches), 3)))
    return sum(scores) / len(scores)


def test_accuracy_equals_a_literal_restatement():
    rng = random.Random(0)
    words = ["yes", "Yes", "yes.", "no", "2", "two", "Two.", "a dog", "dog", "the dog", "t-shirt", "t shirt", "1,000"]
    words += ["u.s.a.", "none", "0", "dont", "don't", "red, blue", "red/blue", " yes ", "\tno\n", "", "5 - 6", "..."]
    for _ in range(3000):
        pool = rng.sample(words, rng.randint(1, 4))
        answers = [rng.choice(pool) for _ in range(rng.choice([4, 5, 8, 9, 10, 10, 10, 11]))]
        prediction = rng.choice(pool + words)
        # one rounding of the division separates a float from the exact fraction
        assert vqa_accuracy(prediction, answers) == float(official(prediction, answers)), (prediction, answers)


@pytest.mark.parametrize("count, score", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (5, 1.0), (9, 1.0)])
def test_counts_of_ten_give_the_soft_targets_exactly(count, score):
    answers = (["red"] * count + ["blue", "teal", "navy"] * 4)[:10]
    assert vqa_accuracy("red", answers) == score
    assert soft_targets(answers).get("red", 0.0) == score


def test_few_annotators():
    """One to three are alternatives; from four on the official rule can be met."""
    assert [vqa_accuracy("The Yes", ["yes"] * count) for count in (1, 2, 3)] == [1.0] * 3
    assert [vqa_accuracy("no", ["yes"] * count) for count in (1, 2, 3, 4)] == [0.0] * 4
    assert vqa_accuracy("yes", ["yes"] * 4) == 1.0
    assert vqa_accuracy("yes", ["yes", "no", "no", "no"]) == pytest.approx(0.25, abs=1e-15)


def test_unanimous_answers_are_compared_raw():
    ten = ["yes"] * 10
    assert vqa_accuracy("yes", ten) == vqa_accuracy(" yes\n", ten) == 1.0
    assert vqa_accuracy("Yes", ten) == vqa_accuracy("yes.", ten) == 0.0
    assert vqa_accuracy("Yes", ten, lenient=True) == vqa_accuracy("yes.", ten, lenient=True) == 1.0
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1.0
    # normalised to the same text, but not unanimous as given
    assert vqa_accuracy("2", ["two"] * 9 + ["2"]) == 1.0
    assert vqa_accuracy("2", ["two"] * 10) == 0.0


def test_order_of_annotators_does_not_matter():
    rng = random.Random(1)
    answers = ["a cat"] * 2 + ["cat"] + ["dog"] * 5 + ["none", "0"]
    for prediction in ("cat", "dog", "0", "bird"):
        expected = vqa_accuracy(prediction, answers)
        for _ in range(5):
            assert vqa_accuracy(prediction, rng.sample(answers, 10)) == expected


def test_dicts_of_an_annotation_file_are_taken_too():
    answers = [{"answer_id": i, "answer": "yes" if i < 4 else "no", "answer_confidence": "maybe"} for i in range(10)]
    assert vqa_accuracy("yes", answers) == 1.0
    assert soft_targets(answers[:10]) == {"yes": 1.0, "no": 1.0}


@pytest.mark.parametrize("answers", [[], "yes", ()])
def test_no_answers_is_an_error(answers):
    with pytest.raises(ValueError, match="non-empty sequence"):
        vqa_accuracy("yes", answers)


def test_accuracy_by_groups_and_counts():
    samples = [
        SimpleNamespace(question_id=1, answers=("yes",) * 10, answer_type="yes/no", question_type="is there"),
        SimpleNamespace(question_id=2, answers=("no",) * 10, answer_type="yes/no", question_type="is this"),
        SimpleNamespace(question_id=3, answers=("2",) * 7 + ("3",) * 3, answer_type="number", question_type="how many"),
    ]
    predictions = {1: "yes", 2: "yes", 3: "three", 4: "not asked"}
    result = accuracy_by(samples, predictions)
    assert result.overall.count == 3 and result.overall.accuracy == pytest.approx((1 + 0 + 0.9) / 3)
    assert list(result.groups) == ["yes/no", "number"]  # largest first
    assert (result.groups["yes/no"].accuracy, result.groups["yes/no"].count) == (0.5, 2)
    assert (result.groups["number"].accuracy, result.groups["number"].count) == (0.9, 1)
    assert set(accuracy_by(samples, predictions, "question_type").groups) == {"is there", "is this", "how many"}
    by_function = accuracy_by(samples, predictions, lambda s: str(len(set(s.answers)))).groups
    assert by_function["1"].count == 2 and by_function["2"].count == 1
    with pytest.raises(ValueError, match="no prediction for question 2"):
        accuracy_by(samples, {1: "yes"})
    with pytest.raises(ValueError, match="no samples"):
        accuracy_by([], {})
    samples[0].answers = ()
    with pytest.raises(ValueError, match="question 1 has no annotated answers"):
        accuracy_by(samples, predictions)
