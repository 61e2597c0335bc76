"""The parts of training: optimizers against torch, the schedule, accumulation, bad losses, checkpoints."""

import json
import math
import random
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from vqa_helpers import small_options, small_system

import train
from train import train_step
from vqa_scratch.connectors import CONNECTORS, connector_class
from vqa_scratch.errors import UserError
from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.systems import questions
from vqa_scratch.systems.base import RunData
from vqa_scratch.systems.run_folder import restore
from vqa_scratch.systems.vqa import VQASystem
from vqa_scratch.training.checkpoint import (
    load_checkpoint,
    load_model_state,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from vqa_scratch.training.optimizers import Muon, Optimizers, orthogonalize, schedule
from vqa_scratch.training.parameter_groups import split_parameters
from vqa_scratch.training.progress import MetricsLog, read_metrics
from vqa_scratch.training.watch import NotFinite


@pytest.fixture(scope="module")
def questions_of(data) -> RunData:
    return VQASystem.read(small_options(data, data / "run"))


@pytest.fixture
def make(data, questions_of, tmp_path):
    """A function that builds a small system with changed options, ready to train."""
    return lambda **changes: small_system(small_options(data, tmp_path / "run", **changes), questions_of)


@pytest.fixture
def run(data, tmp_path, monkeypatch):
    """A function that trains like `train.py`, without pictures, and returns the run's folder."""
    monkeypatch.setattr(train, "draw_panels", lambda *args: None)
    monkeypatch.setattr(questions, "write_gallery", lambda *args: None)

    def trained(**changes) -> Path:
        options = {"steps": 6, "save_every": 2, "eval_every": 100, "warmup_steps": 2, "samples": 1} | changes
        assert train.main(small_options(data, tmp_path / "run", **options)) is None
        return tmp_path / "run"

    return trained


def optimizers(model: nn.Module, **changes) -> Optimizers:
    options = {"kind": "muon", "learning_rate": 2e-3, "matrix_learning_rate": 0.02, "weight_decay": 0.0} | changes
    return Optimizers(model, **options)


# ------------------------------------------------------------------------------------------------ optimizers


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


def test_muon_takes_queries_keys_and_values_apart():
    """A fused matrix steps as its parts would alone, however much larger the gradient of the values is."""
    module = MultiHeadAttention(8, 4, kv_heads=2, bias=False)
    fused = module.qkv.weight
    apart = [nn.Parameter(part.clone()) for part in fused.detach().split([8, 4, 4])]
    start, larger = fused.detach().clone(), (1e-3, 1e-3, 1.0)
    model = nn.ModuleDict({"blocks": module})  # a hidden matrix is one inside blocks
    one = optimizers(model).optimizers[0]
    other = Muon(apart)
    for _ in range(3):
        for part, scale in zip(apart, larger, strict=True):
            part.grad = scale * torch.randn_like(part)
        fused.grad = torch.cat([part.grad for part in apart])
        module.out.weight.grad = torch.zeros_like(module.out.weight)
        one.step()
        other.step()
    assert (fused - torch.cat(list(apart))).abs().max() < 3 * 0.02 * 2**-7  # bfloat16, as above
    moved = [part.norm() for part in (fused.detach() - start).split([8, 4, 4])]
    assert min(moved) > 0.4 * max(moved), "a small gradient has a step of the same size"


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


def test_every_parameter_is_in_one_group(make):
    model = make().model
    hidden, wide, rest = split_parameters(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {id(p) for p in hidden + wide + rest} == set(names)
    assert all(".blocks." in names[id(p)] and p.ndim == 2 for p in hidden)
    assert not any(word in names[id(p)] for p in hidden + wide for word in ("tokens", "positions", "modality"))
    model.freeze("encoders")
    assert not {names[id(p)] for group in split_parameters(model) for p in group if names[id(p)].startswith("image.")}


def test_learning_rates_follow_the_factor(make):
    made = optimizers(make().model)
    made.set_factor(0.25)
    assert sorted({g["lr"] for o in made.optimizers for g in o.param_groups}) == [0.0005, 0.005]


# ------------------------------------------------------------------------------------------------ schedule


def test_the_schedule_in_closed_form():
    """Linear up over 4 steps, flat, linear to zero over the last half."""
    factors = [schedule(step, step / 20, 4, 0.5) for step in range(20)]
    assert factors == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 8 + [1 - k / 10 for k in range(1, 10)])
    assert schedule(0, 0.0, 0, 0.5) == 1.0 and schedule(10, 1.0, 4, 0.5) == 0.0
    assert schedule(1, 0.75, 4, 0.5) == 0.5 * 0.5, "warm-up and decay multiply where they meet"


def test_steps_follow_the_schedule(run):
    """Bounded by steps, the share of the run that is over is that of its steps."""
    rows = read_metrics(run(steps=8, warmup_steps=2, decay_from=0.5) / "metrics.jsonl")
    factors = [row["lr_factor"] for row in rows if "loss" in row]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25])


# ------------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize("connector", CONNECTORS)
def test_accumulation_changes_nothing(make, connector):
    """1, 2 and 4 parts: the same loss, gradients and norm, though answers and so tokens differ between parts."""
    as_prompt = not connector_class(connector).reads_text
    system = make(connector=connector, questions_per_image=3, question_prompt=as_prompt)
    batches = [system.batch(key) for number in range(9) for key in system.epoch(number)]
    tokens = [[part.counts[1] for part in batch.parts(4)] for batch in batches]
    batch = next(b for b, t in zip(batches, tokens, strict=True) if len(t) == 4 and len(set(t)) > 2)
    found = {}

    class Still(Optimizers):
        """Keeps the gradients instead of using them."""

        def __init__(self):
            self.optimizers, self.parameters = [], list(system.model.parameters())

        def zero_grad(self):
            self.kept = [p.grad.clone() for p in self.parameters]
            system.model.zero_grad()

    for number in (1, 2, 4):
        still = Still()
        figures = train_step(system.loss, batch, still, system.precision, accumulate=number, max_grad_norm=1e9)
        found[number] = (*figures, still.kept)
    for number in (2, 4):
        for one, other in zip(found[1][:3], found[number][:3], strict=True):
            assert abs(one - other) < 1e-5
        # fp32 sums in another order; gradients here are up to about 1.
        assert max((a - b).abs().max() for a, b in zip(found[1][3], found[number][3], strict=True)) < 1e-6


def test_clipping_bounds_the_step(make):
    system, seen = make(), []

    class Watching(Optimizers):
        def zero_grad(self):
            seen.append(torch.stack([p.grad.norm() for p in self.parameters if p.grad is not None]).norm())
            super().zero_grad()

    made = Watching(system.model, kind="adamw", learning_rate=1e-3, matrix_learning_rate=0.0, weight_decay=0.0)
    batch = system.batch(system.epoch(0)[0])
    _, _, norm = train_step(system.loss, batch, made, system.precision, max_grad_norm=0.01)
    assert norm > 0.1 and seen[0] == pytest.approx(0.01, rel=1e-3)


def broken_loss(step: int, what: str):
    """A loss that becomes NaN at one step, or whose gradient alone does."""
    loss, calls = VQASystem.loss, []

    def broken(self, batch):
        value, right = loss(self, batch)
        calls.append(1)
        if len(calls) == step:
            if what == "loss":
                return value * math.nan, right
            value.register_hook(lambda gradient: gradient * math.nan)
        return value, right

    return broken


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_the_run(make, run, questions_of, tmp_path, monkeypatch, what):
    """At step 4, where a checkpoint is due: the ids of its questions are on disk, the checkpoint of step 2 is kept."""
    monkeypatch.setattr(VQASystem, "loss", broken_loss(4, what))
    with pytest.raises(NotFinite, match=rf"the {what} of step 4 is (nan|inf).*bad_batch.json; the last good checkp"):
        run()
    out = tmp_path / "run"
    report = json.loads((out / "bad_batch.json").read_text())
    rows = make().epoch(0)[3].rows
    assert report["step"] == 4 and report["ids"] == [questions_of.samples["train"][row].question_id for row in rows]
    saved = load_checkpoint(out / "checkpoints" / "last.pt")
    assert saved["state"]["step"] == 2
    assert all(torch.isfinite(t).all() for t in saved["model"].values())


def test_no_checkpoint_is_promised_before_the_first(run, monkeypatch):
    monkeypatch.setattr(VQASystem, "loss", broken_loss(1, "loss"))
    with pytest.raises(NotFinite, match="the loss of step 1 is nan.*there was no checkpoint yet; begin again"):
        run()


def test_the_best_weights_are_kept(run, monkeypatch):
    """Weights are written when validation improves, not otherwise; the final figures are those of the best."""
    scores, kept, save = iter([0.3, 0.2, 0.5, 0.4]), [], train.save_weights

    def saving(path, model, world):
        kept.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        save(path, model, world)

    monkeypatch.setattr(VQASystem, "evaluate", lambda self: {"accuracy": next(scores)})
    monkeypatch.setattr(train, "save_weights", saving)
    out = run(steps=8, eval_every=2)
    state = load_checkpoint(out / "checkpoints" / "last.pt")["state"]
    assert (len(kept), state["best"], state["best_step"]) == (2, 0.5, 6)
    assert json.loads((out / "summary.json").read_text())["validation_accuracy"] == 0.5
    written = load_file(out / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in kept[1].items())


def test_a_model_that_knows_its_answers_says_them_and_stops(data, questions_of, tmp_path):
    """Overfitted on one batch, it answers each question right, by itself ended with EOS, and is sure of it."""
    few = {name: questions_of.samples["train"][:16] for name in questions_of.samples}
    options = small_options(data, tmp_path / "run", questions_per_step=16)
    system = small_system(options, RunData(few, questions_of.family))
    made = optimizers(system.model, learning_rate=5e-3, matrix_learning_rate=0.05)
    batch = system.batch(system.epoch(0)[0])
    for _ in range(80):
        loss, right, _ = train_step(system.loss, batch, made, system.precision)
    assert right == 1 and loss < 0.05
    answers = system.report("train").answers
    for sample in few["train"]:
        said = answers[sample.question_id]
        assert said.text == sample.answer and said.ended and said.probability > 0.7
        assert said.tokens == len(system.tokenizers.answer(sample.answer)) - 1


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
    with pytest.raises(UserError, match="last.pt (is not a whole torch file|holds more than tensors)") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_resumed_run_holds_its_weights_once(make, run):
    """Of what the checkpoint held, only what the optimizer goes on with is left in memory."""
    saved = load_checkpoint(run(steps=2) / "checkpoints" / "last.pt")
    weights = [weakref.ref(tensor) for tensor in saved["model"].values()]
    system = make()
    state = restore(saved, system, optimizers(system.model))
    assert state["step"] == 2 and len(weights) > 20 and not any(weight() is not None for weight in weights)
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
    with pytest.raises(UserError, match="refused, since it could run code"):
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
