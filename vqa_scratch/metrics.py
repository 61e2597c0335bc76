"""Computes VQA accuracy exactly like the official evaluation, quirks included, overall and by group; and word errors.

The measure is that of Antol et al., "VQA: Visual Question Answering" (ICCV 2015), in the public evaluation
script of Goyal et al., "Making the V in VQA Matter" (CVPR 2017, VQA v2): a prediction is compared with the answers of
ten annotators, leaving each out once; three agreeing annotators make it fully right. If script and paper differ, the
script counts, because published figures come from it.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Deleted or turned into a space, in this order. The apostrophe, colon, period, $ % & * # ~ and | are not among them.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The script compiles its patterns in Python 2, where \d means ASCII digits.
_COMMA_IN_NUMBER = re.compile(r"[0-9],[0-9]")
# Quirk: "(?!<=\d)" was meant as a look-behind, but as written it demands that "<=" and a digit do not start at the
# dot, which is always so. What is left: a period that no digit follows.
_PERIOD = re.compile(r"\.(?![0-9])")
# Quirk: re.UNICODE (32) is passed where `count` belongs, so at most 32 periods of one text are removed.
_MAX_PERIODS = int(re.UNICODE)

ALTERNATIVES = 3  # up to so many answers are alternatives; more are annotators, of whom three must agree

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}

# Each of these is restored from every spelling of it that lacks exactly one apostrophe.
_RESTORED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {spelling: word for word in _RESTORED.split() for spelling in _without_one_apostrophe(word)}
# Kept as they are in the script: two entries that map to themselves, and one that goes the wrong way. (The entries
# with a capital I can never match, since texts are lowered first.)
CONTRACTIONS |= {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}


def _strip_punctuation(text: str) -> str:
    number_with_comma = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        # Quirk: one comma inside a number anywhere makes every mark vanish instead of becoming a space.
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or number_with_comma else " ")
    return _PERIOD.sub("", result, count=_MAX_PERIODS)


def _map_words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _clean(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize_answer(text: str) -> str:
    """The official normalisation of one answer: punctuation, then numbers in words, articles and contractions.

    >>> normalize_answer("1,000 t-shirts"), normalize_answer("None"), normalize_answer("dont")
    ('1000 tshirts', '0', "don't")
    """
    return _map_words(_strip_punctuation(_clean(text)))


def _texts(answers: Sequence[str | Mapping[str, Any]]) -> list[str]:
    if isinstance(answers, str) or not answers:
        raise ValueError("answers must be a non-empty sequence of the annotators' answers")
    return [_clean(answer if isinstance(answer, str) else answer["answer"]) for answer in answers]


def _left_out_score(matches: int, annotators: int) -> float:
    """Mean over annotators of min(1, matches among the others / 3), when `matches` of them gave the prediction.

    Written with whole thirds so that ten annotators give exactly 0, .3, .6, .9, 1.
    """
    thirds = matches * min(3, matches - 1) + (annotators - matches) * min(3, matches)
    return thirds / (3 * annotators)


def word_error_rate(said: Sequence[str], heard: Sequence[str]) -> float:
    """(substituted + left out + added words) / words said, over all texts together; both as words with spaces between.

    Raises ValueError for a text that says nothing.
    """
    import jiwer  # imported here: only what hears needs it

    return jiwer.wer(list(said), list(heard))


def rule(answers: int) -> str:
    """The name of the rule by which `vqa_accuracy` scores a question with so many answers."""
    if answers > ALTERNATIVES:
        return "official VQA accuracy" + ("" if answers == 10 else f", its rule on {answers} answers")
    return "exact match after normalisation" + ("" if answers == 1 else f" with any of {answers} answers")


def vqa_accuracy(prediction: str, answers: Sequence[str | Mapping[str, Any]], *, lenient: bool = False) -> float:
    """Official accuracy of one prediction, in [0, 1].

    prediction -- the predicted answer
    answers    -- the annotators' answers (ten in VQA v2), as strings or as the dicts of an annotation file
    lenient    -- normalise both sides always. The official rule normalises only where the annotators disagree; where
                  they are unanimous it compares raw strings, so that "Yes" against ten "yes" scores 0.

    With one to three answers, which the official rule cannot score, they are taken as alternatives: 1 if the prediction
    equals any of them, both sides normalised, else 0.

    Every position of `answers` counts as one annotator. The official script leaves an annotator out by comparing whole
    dicts, so in files without a unique `answer_id` it leaves out all equal answers at once and scores lower than this
    function (ten "yes" would score 0).
    Raises ValueError if `answers` is empty.
    """
    given = _texts(answers)
    predicted = _clean(prediction)
    few = len(given) <= ALTERNATIVES
    if lenient or few or len(set(given)) > 1:
        predicted = normalize_answer(predicted)
        given = [normalize_answer(answer) for answer in given]
    if few:
        return float(predicted in given)
    return _left_out_score(given.count(predicted), len(given))


def soft_targets(answers: Sequence[str | Mapping[str, Any]]) -> dict[str, float]:
    """Score of each distinct raw answer against all of them: {answer: 0.3, 0.6, 0.9 or 1.0} for ten annotators.

    The targets of soft-label training (Teney et al., "Tips and Tricks for Visual Question Answering", CVPR 2018).
    Answers are stripped but not normalised, as in the reference implementations.
    """
    counts = Counter(_texts(answers))
    annotators = counts.total()
    if annotators <= ALTERNATIVES:
        return dict.fromkeys(counts, 1.0)
    return {answer: _left_out_score(count, annotators) for answer, count in counts.items()}


@dataclass(frozen=True)
class Score:
    """Mean accuracy in [0, 1] over `count` questions."""

    accuracy: float
    count: int


@dataclass(frozen=True)
class Breakdown:
    """Accuracy over all questions, and over each group of them (largest group first)."""

    overall: Score
    groups: dict[str, Score]


def accuracy_by(
    samples: Iterable[Any],
    predictions: Mapping[int | str, str],
    key: str | Callable[[Any], str] = "answer_type",
    *,
    lenient: bool = False,
) -> Breakdown:
    """Official accuracy, overall and by group.

    samples     -- objects with `.question_id` and `.answers` (VQASample is one)
    predictions -- {question_id: answer}; each sample needs one
    key         -- what groups the samples: the name of an attribute ("answer_type", "question_type") or a function
    Raises ValueError for a sample without a prediction or without answers, and when there is no sample at all.
    """
    group_of = key if callable(key) else (lambda sample: getattr(sample, key))
    scores: dict[str, list[float]] = {}
    for sample in samples:
        if sample.question_id not in predictions:
            raise ValueError(f"no prediction for question {sample.question_id}")
        if not sample.answers:
            raise ValueError(f"question {sample.question_id} has no annotated answers to compare with")
        score = vqa_accuracy(predictions[sample.question_id], sample.answers, lenient=lenient)
        scores.setdefault(group_of(sample), []).append(score)
    if not scores:
        raise ValueError("no samples to score")
    groups = {group: Score(sum(s) / len(s), len(s)) for group, s in sorted(scores.items(), key=lambda g: -len(g[1]))}
    count = sum(group.count for group in groups.values())
    return Breakdown(Score(sum(sum(s) for s in scores.values()) / count, count), groups)
