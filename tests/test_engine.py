"""The parts of the loop: optimisers against torch, the schedule in closed form, accumulation, bad losses, saving."""

import dataclasses
import json
import math
import random
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from vqa_helpers import CPU, small_config, small_data, small_task
from vqa_scratch.training.evaluation import QuestionOnly, TypePrior, other_images
from vqa_scratch.training.loop import Plan, State, fit, restore, train_step

from vqa_scratch.errors import UserError
from vqa_scratch.report.curves import moving_average
from vqa_scratch.systems.questions import read_splits
from vqa_scratch.training.checkpoint import load_checkpoint, load_model_state, rng_state, save_checkpoint, set_rng_state
from vqa_scratch.training.optimizers import Muon, Optimizers, orthogonalize, schedule, split_parameters
from vqa_scratch.training.precision import Precision
from vqa_scratch.training.progress import MetricsLog, read_metrics
from vqa_scratch.training.watch import NotFinite

PLAN = Plan(
    steps=6,
    seconds=None,
    warmup_steps=2,
    decay_from=0.5,
    accumulate=1,
    max_grad_norm=1.0,
    log_every=1,
    eval_every=100,
    save_every=2,
)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    config = small_config(small_data(folder), folder / "run")
    return config, read_splits(config)


def optimizers(model: nn.Module, **changes) -> Optimizers:
    options = {"kind": "muon", "learning_rate": 2e-3, "matrix_learning_rate": 0.02, "weight_decay": 0.0} | changes
    return Optimizers(model, **options)


# ------------------------------------------------------------------------------------------------ optimisers


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_is_torchs(weight_decay):
    """Several steps on tall, wide and square matrices. Both iterate in bfloat16, one matrix at a time or stacked."""
    shapes = [(8, 8), (8, 24), (24, 8), (8, 24), (5, 7)]
    start = [torch.randn(shape) for shape in shapes]
    ours, theirs = ([nn.Parameter(p.clone()) for p in start] for _ in range(2))
    one = Muon(ours, lr=0.02, weight_decay=weight_decay)
    other = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=weight_decay, adjust_lr_fn="original")
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        one.step()
        other.step()
    # A step moves entries by about lr = 0.02; bfloat16 keeps 3 digits of it, and five steps were taken.
    for a, b, p in zip(ours, theirs, start, strict=True):
        assert (a - b).abs().max() < 5 * 0.02 * 2**-7 < 0.1 * (a - p).abs().max()


def test_orthogonalize():
    """Singular values go to about 1 (the quintic leaves them within 0.3 of it), directions stay."""
    x = torch.randn(3, 6, 10)
    made = orthogonalize(x, torch.float32)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.65 and values.max() < 1.25
    inside = u.mT @ made @ v.mT  # diagonal in the singular directions of x
    assert (inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-4
    assert torch.equal(orthogonalize(x.mT, torch.float32), made.mT)


def test_muon_takes_matrices_only():
    with pytest.raises(ValueError, match=r"Muon takes matrices, got a parameter of shape \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))])


def test_every_parameter_is_in_one_group(splits):
    config, parts = splits
    model = small_task(config, parts).model
    hidden, wide, rest = split_parameters(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {id(p) for p in hidden + wide + rest} == set(names)
    assert all(".blocks." in names[id(p)] and p.ndim == 2 for p in hidden)
    assert not any(word in names[id(p)] for p in hidden + wide for word in ("tokens", "positions", "modality"))
    model.freeze("encoders")
    assert not {names[id(p)] for group in split_parameters(model) for p in group if names[id(p)].startswith("image.")}


def test_learning_rates_follow_the_factor(splits):
    config, parts = splits
    made = optimizers(small_task(config, parts).model)
    made.set_factor(0.25)
    assert sorted({g["lr"] for o in made.optimizers for g in o.param_groups}) == [0.0005, 0.005]


# ------------------------------------------------------------------------------------------------ schedule


def test_the_schedule_in_closed_form():
    """Linear up over 4 steps, flat, linear to zero over the last half; bounded by steps and by time alike."""
    plan = dataclasses.replace(PLAN, steps=20, warmup_steps=4, decay_from=0.5)
    factors = [schedule(step, plan.progress(step, 0.0), 4, 0.5) for step in range(20)]
    assert factors == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 8 + [1 - k / 10 for k in range(1, 10)])
    timed = dataclasses.replace(PLAN, steps=None, seconds=200.0)
    assert [timed.progress(10_000, s) for s in (0, 50, 200, 900)] == [0, 0.25, 1, 1]
    assert schedule(0, 0.0, 0, 0.5) == 1.0 and schedule(10, 1.0, 4, 0.5) == 0.0
    assert schedule(1, 0.75, 4, 0.5) == 0.5 * 0.5, "warm-up and decay multiply where they meet"


# ------------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize("connector", ["tokens", "mean"])
def test_accumulation_changes_nothing(splits, connector):
    """1, 2 and 4 parts: the same loss, gradients and norm, though answers and so tokens differ between parts."""
    config, parts = splits
    task = small_task(dataclasses.replace(config, connector=connector, questions_per_image=3), parts)
    batches = [task.batch(key) for number in range(9) for key in task.epoch(number)]
    tokens = [[task.size(part)[1] for part in batch.parts(4)] for batch in batches]
    batch = next(b for b, t in zip(batches, tokens, strict=True) if len(t) == 4 and len(set(t)) > 2)
    found = {}

    class Still(Optimizers):
        """Keeps the gradients instead of using them."""

        def __init__(self):
            self.optimizers, self.parameters = [], list(task.model.parameters())

        def zero_grad(self):
            self.kept = [p.grad.clone() for p in self.parameters]
            task.model.zero_grad()

    for number in (1, 2, 4):
        still, plan = Still(), dataclasses.replace(PLAN, accumulate=number, max_grad_norm=1e9)
        loss, right, norm = train_step(task, batch, still, task.precision, plan)
        found[number] = (loss, right, norm, still.kept)
    for number in (2, 4):
        for one, other in zip(found[1][:3], found[number][:3], strict=True):
            assert abs(one - other) < 1e-5
        # fp32 sums in another order; gradients here are up to about 1.
        assert max((a - b).abs().max() for a, b in zip(found[1][3], found[number][3], strict=True)) < 1e-6


def run(task, folder: Path, plan: Plan = PLAN, state: State | None = None):
    made = optimizers(task.model)
    log = MetricsLog(folder / "metrics.jsonl")
    return fit(task, made, task.precision, plan, log, folder, state or State(), on_best=lambda: None), log


def test_clipping_bounds_the_step(splits):
    config, parts = splits
    task = small_task(config, parts)
    seen = []

    class Watching(Optimizers):
        def zero_grad(self):
            seen.append(torch.stack([p.grad.norm() for p in self.parameters if p.grad is not None]).norm())
            super().zero_grad()

    made = Watching(task.model, kind="adamw", learning_rate=1e-3, matrix_learning_rate=0.0, weight_decay=0.0)
    batch = task.batch(task.epoch(0)[0])
    plan = dataclasses.replace(PLAN, max_grad_norm=0.01)
    _, _, norm = train_step(task, batch, made, task.precision, plan)
    assert norm > 0.1 and seen[0] == pytest.approx(0.01, rel=1e-3)


class Breaking:
    """A task whose loss (or its gradient alone) becomes NaN at one step."""

    def __init__(self, task, step: int, what: str) -> None:
        self.task, self.left, self.what = task, step, what

    def __getattr__(self, name):
        return getattr(self.task, name)

    def loss(self, batch):
        loss, right = self.task.loss(batch)
        self.left -= 1
        if self.left == 0:
            if self.what == "loss":
                return loss * math.nan, right
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss, right


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_the_run(splits, tmp_path, what):
    """At step 4, where a checkpoint is due: the ids of its questions are on disk, the checkpoint of step 2 is kept."""
    config, parts = splits
    task = small_task(config, parts)
    broken = Breaking(task, 4, what)
    with pytest.raises(NotFinite, match=rf"the {what} of step 4 is (nan|inf).*bad_batch.json; the last good checkp"):
        run(broken, tmp_path)
    report = json.loads((tmp_path / "bad_batch.json").read_text())
    rows = task.epoch(0)[3]
    assert report["step"] == 4 and report["ids"] == [parts.samples["train"][row].question_id for row in rows]
    saved = load_checkpoint(tmp_path / "checkpoints" / "last.pt")
    assert saved["state"]["step"] == 2
    assert all(torch.isfinite(t).all() for t in saved["model"].values())


def test_no_checkpoint_is_promised_before_the_first(splits, tmp_path):
    config, parts = splits
    with pytest.raises(NotFinite, match="the loss of step 1 is nan.*there was no checkpoint yet; begin again"):
        run(Breaking(small_task(config, parts), 1, "loss"), tmp_path)


def test_the_best_weights_are_kept(splits, tmp_path):
    """`on_best` is called when validation improves, not otherwise, and a resumed run remembers the best."""
    config, parts = splits
    task = small_task(config, parts)
    scores, best = iter([0.3, 0.2, 0.5]), []
    task.evaluate = lambda: {"accuracy": next(scores)}
    log = MetricsLog(tmp_path / "metrics.jsonl")
    state, plan = State(), dataclasses.replace(PLAN, eval_every=2)
    fit(task, optimizers(task.model), task.precision, plan, log, tmp_path, state, on_best=lambda: best.append(1))
    assert (len(best), state.best, state.best_step) == (2, 0.5, 6)


def test_a_model_that_knows_its_answers_says_them_and_stops(splits):
    """Overfitted on one batch, it answers each question right, by itself ended with EOS, and is sure of it."""
    config, parts = splits
    few = {name: parts.samples["train"][:16] for name in parts.samples}
    task = small_task(dataclasses.replace(config, questions_per_step=16), dataclasses.replace(parts, samples=few))
    made = optimizers(task.model, learning_rate=5e-3, matrix_learning_rate=0.05)
    batch = task.batch(task.epoch(0)[0])
    for _ in range(80):
        loss, right, _ = train_step(task, batch, made, task.precision, PLAN)
    assert right == 1 and loss < 0.05
    answers = task.report("train").answers
    for sample in few["train"]:
        said = answers[sample.question_id]
        assert said.text == sample.answer and said.ended and said.probability > 0.7
        assert said.tokens == len(task.questions["train"].encoder.answer(sample.answer)) - 1


# ------------------------------------------------------------------------------------------------ checkpoints


def test_generators_come_back(tmp_path):
    def draw():
        return random.random(), np.random.rand(3).tolist(), np.random.normal(), torch.rand(3).tolist()

    np.random.normal()  # leaves a second value cached
    save_checkpoint(tmp_path / "last.pt", {"rng": rng_state()})
    first = draw()
    set_rng_state(load_checkpoint(tmp_path / "last.pt")["rng"])
    assert draw() == first


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_broken_checkpoint_is_one_line(tmp_path, content):
    path = tmp_path / "last.pt"
    if content is None:
        save_checkpoint(path, {"model": torch.zeros(1000)})
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(UserError, match="last.pt is not a whole checkpoint") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_resumed_run_holds_its_weights_once(splits, tmp_path):
    """Of what the checkpoint held, only what the optimizer goes on with is left in memory."""
    task = small_task(*splits)
    run(task, tmp_path, dataclasses.replace(PLAN, steps=2))
    saved = load_checkpoint(tmp_path / "checkpoints" / "last.pt")
    weights = [weakref.ref(tensor) for tensor in saved["model"].values()]
    resumed = optimizers(task.model)
    state = restore(saved, task, resumed, Precision("fp32", CPU), "here")
    assert state.step == 2 and len(weights) > 20 and not any(weight() is not None for weight in weights)
    assert "optimizers" not in saved and saved["precision"] == "fp32"


def test_a_checkpoint_of_another_shape_lists_everything():
    model = nn.Linear(3, 2)
    with pytest.raises(UserError) as caught:
        load_model_state(model, {"weight": torch.zeros(2, 4), "scale": torch.zeros(1)}, "last.pt")
    assert str(caught.value) == (
        "last.pt does not fit the model: missing bias; extra scale; weight is (2, 4), the model has (2, 3)"
    )


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model": Evil()}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        load_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "ran").exists()


def test_metrics_go_on_where_the_checkpoint_was(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 2, 3):
        log.write(step, loss=step / 2)
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    MetricsLog(path, resume_after=2).write(3, loss=9.0)
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(1, 0.5), (2, 1.0), (3, 9.0)]


def test_moving_average():
    assert moving_average([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5] and moving_average([], 3) == []


# ------------------------------------------------------------------------------------------------ blind baselines


def test_blind_predictors(splits):
    """They depend on the words alone; with no word known they fall back to the most common answer."""
    samples = splits[1].samples["train"]
    prior, words = TypePrior(samples), QuestionOnly(samples, support=1)
    common = max({s.answer for s in samples}, key=lambda a: sum(s.answer == a for s in samples))
    strange = dataclasses.replace(samples[0], question="why?", question_type="why")
    assert prior(strange) == common and words(strange) == common
    seen = {s.question: s.answer for s in samples if sum(t.question == s.question for t in samples) == 1}
    for sample in samples:
        assert sample.question not in seen or words(sample) == sample.answer


def test_shuffled_images_are_other_images(splits):
    """The answers are those to a data set whose image files have changed places."""
    config, parts = splits
    task = small_task(config, parts)
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # so that the answers depend on the image
    paths = task.images["test"].paths
    moved = dict(zip(paths, (paths[i] for i in other_images(len(paths))), strict=True))
    samples = [dataclasses.replace(s, image_path=moved[s.image_path]) for s in parts.samples["test"]]
    elsewhere = small_task(config, dataclasses.replace(parts, samples=parts.samples | {"test": samples}))
    elsewhere.model = task.model
    shuffled, plain = task.report("test", shuffled=True).answers, task.report("test").answers
    assert shuffled == elsewhere.report("test").answers != plain


def test_other_images_leaves_none_in_its_place():
    for count in (2, 3, 10):
        swap = other_images(count)
        assert sorted(swap) == list(range(count)) and (swap != np.arange(count)).all()
