"""Scoring: the blind baselines, images that change places, and the curves."""

import dataclasses
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vqa_helpers import small_options, small_system

from vqa_scratch.report.curves import moving_average
from vqa_scratch.systems import splits
from vqa_scratch.systems.base import RunData
from vqa_scratch.systems.scoring import QuestionOnly, TypePrior, other_images
from vqa_scratch.systems.vqa import VQASystem
from vqa_scratch.training.progress import Redrawn


@pytest.fixture(scope="module")
def questions_of(data) -> RunData:
    return VQASystem.read(small_options(data, data / "run"))


def test_blind_predictors(questions_of):
    """They depend on the words alone; with no word known they fall back to the most common answer."""
    samples = questions_of.samples["train"]
    prior, words = TypePrior(samples), QuestionOnly(samples, support=1)
    common = max({s.answer for s in samples}, key=lambda a: sum(s.answer == a for s in samples))
    strange = dataclasses.replace(samples[0], question="why?", question_type="why")
    assert prior(strange) == common and words(strange) == common
    seen = {s.question: s.answer for s in samples if sum(t.question == s.question for t in samples) == 1}
    for sample in samples:
        assert sample.question not in seen or words(sample) == sample.answer


def test_shuffled_images_are_other_images(data, questions_of, tmp_path):
    """The answers are those to a data set whose image files have changed places."""
    options = small_options(data, tmp_path / "run")
    system = small_system(options, questions_of)
    with torch.no_grad():
        for parameter in system.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # so that the answers depend on the image
    paths = system.splits["test"].images.paths
    moved = dict(zip(paths, (paths[i] for i in other_images(len(paths))), strict=True))
    samples = [dataclasses.replace(s, image_path=moved[s.image_path]) for s in questions_of.samples["test"]]
    changed = dataclasses.replace(questions_of, samples=questions_of.samples | {"test": samples})
    elsewhere = small_system(options, changed)
    elsewhere.model = system.model
    shuffled, plain = system.report("test", shuffled=True).answers, system.report("test").answers
    assert shuffled == elsewhere.report("test").answers != plain


def test_other_images_leaves_none_in_its_place():
    for count in (2, 3, 10):
        swap = other_images(count)
        assert sorted(swap) == list(range(count)) and (swap != np.arange(count)).all()


def test_moving_average():
    assert moving_average([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5] and moving_average([], 3) == []


def test_the_bar_of_the_final_figures_moves_while_a_batch_is_awaited(capsys, monkeypatch):
    """Each batch waits for the bar to have been drawn twice more, which it is from beside."""
    monkeypatch.setattr(Redrawn, "interval", 0.01)
    drawn = threading.Semaphore(0)
    refresh = splits.tqdm.refresh
    monkeypatch.setattr(splits.tqdm, "refresh", lambda bar, *given, **named: (refresh(bar), drawn.release()))
    batch = SimpleNamespace(to=lambda device: [drawn.acquire(timeout=10), drawn.acquire(timeout=10)])
    seen = list(splits.in_time([(None, batch)] * 3, 3, "cpu", progress="hold-out"))
    assert [waited for _, waited in seen] == [[True, True]] * 3 and "hold-out" in capsys.readouterr().err
    assert len(list(splits.in_time([(None, SimpleNamespace(to=str))], 1, "cpu"))) == 1
    assert capsys.readouterr().err == "", "no bar was asked for"
