"""--feature-cache: what a frozen encoder said is kept on disk, and gives the losses and answers of running it again."""

import errno
import functools
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from vqa_helpers import CPU, small_flags, small_options, small_system, train_program

import train
from vqa_scratch.connectors import connector_class
from vqa_scratch.data import feature_store, mapped
from vqa_scratch.data.feature_store import weights_digest
from vqa_scratch.data.images import Images
from vqa_scratch.data.mapped import mapped_array
from vqa_scratch.errors import UserError
from vqa_scratch.storage import append_line
from vqa_scratch.systems import questions as system_questions
from vqa_scratch.systems.frozen import cache_features
from vqa_scratch.systems.vqa import VQASystem
from vqa_scratch.training.precision import Precision

# Batches of another size sum in another order: some roundings of 2**-24 in states of size 1, through one small decoder.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def samples(data):
    return VQASystem.read(small_options(data, data / "run"))


@pytest.fixture
def make(data, samples, tmp_path):
    """Makes systems of one data set and one cache folder, `tmp_path` / cache."""

    def system(**changes):
        options = small_options(data, tmp_path / "run", **changes)
        made = small_system(options, samples)
        if options.feature_cache:  # which train.py does once the format is known
            cache_features(made)
        return made

    return system


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several of them, the last one smaller, even for so few images and questions."""
    monkeypatch.setattr(feature_store, "IMAGES_AT_ONCE", 5)
    monkeypatch.setattr(feature_store, "QUESTIONS_AT_ONCE", 7)


def files(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").glob("*")}


def outcome(system: VQASystem) -> tuple[list[float], dict[str, torch.Tensor], dict]:
    """The losses of the first batches, the gradients of all of them, and the answers on the validation split."""
    system.model.train()
    losses = []
    for key in system.epoch(0)[:2]:
        with system.precision.autocast():
            loss, _ = system.loss(system.batch(key))
        loss.backward()
        losses.append(loss.item())
    gradients = {name: p.grad for name, p in system.model.named_parameters() if p.grad is not None}
    return losses, gradients, system.report("val").answers


TEXT = ("text_encoder", "encoders", "all")


@pytest.mark.parametrize(
    ("connector", "freeze"),
    [
        *((connector, freeze) for connector in ("tokens", "mean") for freeze in ("image_encoder", *TEXT)),
        *((connector, "image_encoder") for connector in ("prefix", "qformer")),
    ],
)
def test_losses_gradients_and_answers_are_those_of_recomputing(make, tmp_path, connector, freeze):
    options = {"freeze": freeze, "connector": connector}
    if not connector_class(connector).reads_text:
        options["question_prompt"] = True
    plain = make(**options)
    losses, gradients, answers = outcome(plain)
    kept = make(**options, feature_cache=True)
    kept_losses, kept_gradients, kept_answers = outcome(kept)
    assert kept_losses == pytest.approx(losses, rel=TOLERANCE)
    assert kept_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (kept_gradients[name] - gradient).abs().max() <= TOLERANCE * max(1.0, gradient.abs().max()), name
    assert {i: a.text for i, a in kept_answers.items()} == {i: a.text for i, a in answers.items()}
    assert kept.report("val", shuffled=True).accuracy == plain.report("val", shuffled=True).accuracy
    kinds = {"encoders": {"image", "text"}, "all": {"image", "text"}}.get(freeze, {freeze.split("_")[0]})
    assert {name.split("-")[1] for name in files(tmp_path)} == kinds


def test_an_encoder_runs_once(make, tmp_path, monkeypatch):
    """Neither a second epoch nor a second run calls it; each split has its own file."""
    system = make(freeze="encoders", feature_cache=True)
    first = outcome(system)[0]
    assert len(files(tmp_path)) == 4  # of images and of questions: train and val
    again = make(freeze="encoders", feature_cache=True)
    again.batch(again.epoch(0)[0]), again.report("val")  # finds the files by a hash of the weights, once
    monkeypatch.setattr(feature_store, "weights_digest", lambda encoder: pytest.fail("the weights were hashed again"))
    for encoder in (system.model.image, system.model.text, again.model.image, again.model.text):
        monkeypatch.setattr(encoder, "states", lambda *args: pytest.fail("a frozen encoder ran again"))
    assert outcome(system)[0] == outcome(again)[0] == first


def test_an_average_is_kept_where_an_average_is_read(make):
    system = make(freeze="image_encoder", connector="mean", feature_cache=True)
    assert system.batch(system.epoch(0)[0]).images.shape[1:] == (1, 32)


def test_dropout_of_a_frozen_encoder_is_left_out(make):
    """Features are those of eval mode, and computing them leaves the generators alone."""
    system = make(freeze="text_encoder", feature_cache=True)
    system.model.text.dropout.p = 0.5
    system.model.train()
    state = torch.get_rng_state()
    states, mask = system.splits["train"].questions.cached(np.arange(8))
    assert torch.equal(torch.get_rng_state(), state)
    ids, real = system.splits["train"].questions.ids.padded(np.arange(8), 0)
    wanted = system.model.eval().text(ids, mask)
    assert torch.equal(mask, real)
    assert (states - wanted)[mask].abs().max() < TOLERANCE and not states[~mask].any()


def test_dropout_of_a_frozen_image_encoder_is_left_out(make):
    system = make(freeze="image_encoder", feature_cache=True)
    for module in system.model.image.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    system.model.train()
    states = system.splits["train"].images.batch(range(6))
    pixels = system.processor.normalize(system.splits["train"].images.images.batch(range(6)))
    assert (states - system.model.eval().image(pixels)).abs().max() < TOLERANCE


def test_the_hash_of_an_encoder_is_of_all_that_it_holds():
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.BatchNorm1d(3))
    seen = [weights_digest(encoder)]
    assert weights_digest(encoder) == seen[0]
    turned = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False), torch.nn.BatchNorm1d(3))
    turned.load_state_dict(encoder.state_dict() | {"0.weight": encoder[0].weight.detach().view(2, 3)})
    seen.append(weights_digest(turned))  # the same bytes in another shape
    encoder[1].running_mean += 1
    seen.append(weights_digest(encoder))
    seen.append(weights_digest(encoder.to(torch.bfloat16)))
    assert len(set(seen)) == 4


def test_the_hash_of_images_is_of_their_order(make, tmp_path):
    paths = [tmp_path / name for name in ("a.png", "b.png")]
    for path in paths:
        path.write_bytes(b"123")
        os.utime(path, ns=(1, 1))
    processor = make().processor
    assert Images(paths, processor).digest() != Images(paths[::-1], processor).digest()


def test_the_name_follows_weights_preprocessing_images_and_format(make, tmp_path):
    """Whatever changes what an encoder says, or to what, makes another file; nothing else does."""

    def made(change=lambda system: None, **options) -> list[str]:
        """The kinds of files made for the first training batch."""
        system = make(freeze="encoders", **options)
        change(system)
        cache_features(system)
        before = files(tmp_path)
        system.batch(system.epoch(0)[0])
        return sorted(name.split("-")[1] for name in files(tmp_path) - before)

    def weight(encoder):
        def change(system):
            with torch.no_grad():
                next(getattr(system.model, encoder).parameters()).view(-1)[0] += 1e-3

        return change

    def preprocessing(system):
        images = system.splits["train"].images
        images.processor = replace(images.processor, mean=(0.4, 0.5, 0.5))

    def question(system):
        system.splits["train"].questions.ids.flat[1] += 1  # another word at its place

    assert made() == ["image", "text"]
    assert made() == made(weight("decoder")) == []
    assert made(weight("image")) == made(preprocessing) == made(connector="mean") == ["image"]
    assert made(weight("text")) == made(question) == ["text"]
    assert made(lambda system: setattr(system, "precision", Precision("bf16", CPU))) == ["image", "text"]
    path = make().splits["train"].questions.image_paths[0]
    os.utime(path, ns=(1, 1))
    assert made() == ["image"]


def test_half_precision_keeps_what_the_projection_reads(make, tmp_path):
    """Under bf16 the projection rounds to bf16 anyway, so keeping 16 bits loses nothing."""

    def system() -> VQASystem:
        made = make(freeze="encoders")
        made.precision = Precision("bf16", CPU)
        return made

    plain, kept = system(), system()
    cache_features(kept)
    assert outcome(kept)[0] == pytest.approx(outcome(plain)[0], rel=2**-9)
    assert kept.batch(kept.epoch(0)[0]).images.dtype == torch.bfloat16
    sizes = [path.stat().st_size for path in (tmp_path / "cache").glob("features-image-*")]
    assert max(sizes) == pytest.approx(24 * 65 * 32 * 2, rel=0.01)  # images, tokens, width, bytes


# ---------------------------------------------------------------------------------------------- the file


def test_a_file_is_whole_or_not_there(tmp_path):
    path, rows = tmp_path / "new" / "x.npy", np.arange(12, dtype=np.float32).reshape(6, 2)

    def stops():
        yield rows[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mapped_array(path, (6, 2), np.float32, stops, "--no")
    assert list(path.parent.iterdir()) == []
    array = mapped_array(path, (6, 2), np.float32, lambda: [rows[:3], rows[3:]], "--no")
    assert np.array_equal(array, rows) and not array.flags.writeable
    again = mapped_array(path, (6, 2), np.float32, lambda: pytest.fail("made again"), "--no")
    assert np.array_equal(again, rows)
    np.save(path, rows.reshape(3, 4))  # as of other sizes under this name: made again
    assert np.array_equal(mapped_array(path, (6, 2), np.float32, lambda: [rows], "--no"), rows)
    path.write_bytes(path.read_bytes()[:-5])  # cut short by someone else: made again
    assert np.array_equal(mapped_array(path, (6, 2), np.float32, lambda: [rows], "--no"), rows)


def test_two_writers_of_one_file(tmp_path):
    """As on two machines that share a disk and give their processes the same number: each maps a whole file."""
    path, rows = tmp_path / "x.npy", np.arange(12, dtype=np.float32).reshape(6, 2)

    def slow():
        yield rows[:3]
        assert np.array_equal(mapped_array(path, (6, 2), np.float32, lambda: [rows], "--no"), rows)
        yield rows[3:]

    assert np.array_equal(mapped_array(path, (6, 2), np.float32, slow, "--no"), rows)
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(mapped.np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(UserError, match="cannot write .*x.npy: No space left on device; --no-feature-cache does wit"):
        mapped_array(tmp_path / "x.npy", (1, 2), np.float32, list, "--no-feature-cache")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- the flag


@pytest.mark.parametrize("freeze", ["nothing", "decoder"])
def test_the_flag_needs_a_frozen_encoder(data, tmp_path, freeze):
    with pytest.raises(
        UserError, match=f"--feature-cache means nothing with --freeze {freeze}: it goes with --freeze encoders"
    ):
        train.read_command_line([*small_flags(data, tmp_path / "run", freeze=freeze), "--feature-cache"])


def test_images_of_another_size_than_the_encoder_has(make):
    """Its table of places is resized, and the connector is told the grid of the kept states."""

    def system() -> VQASystem:
        made = make(freeze="image_encoder")
        made.processor = replace(made.processor, size=(32, 64))
        made.train_on(made.data)
        return made

    plain, kept = system(), system()
    cache_features(kept)
    assert kept.batch(kept.epoch(0)[0]).images.shape[1:] == (1 + 4 * 8, 32)
    losses, gradients, answers = outcome(plain)
    kept_losses, kept_gradients, kept_answers = outcome(kept)
    assert kept_losses == pytest.approx(losses, rel=TOLERANCE) and kept_gradients.keys() == gradients.keys()
    assert {i: a.text for i, a in kept_answers.items()} == {i: a.text for i, a in answers.items()}


def count_writes(log: Path) -> None:
    """Every file of features adds its name to `log` when it is begun."""
    begin = mapped.np.lib.format.write_array_header_1_0

    def counted(file, header):
        append_line(log, Path(file.name).name.split(".")[1])  # of the temporary name
        begin(file, header)

    mapped.np.lib.format.write_array_header_1_0 = counted


def test_two_ranks_write_each_file_once(data, tmp_path):
    """A new run, and one that goes on after the files are gone; the ranks need the validation split unequally."""
    log, out = tmp_path / "written", tmp_path / "run"
    argv = [*small_flags(data, out, freeze="encoders", steps=2, eval_questions=8), "--feature-cache"]
    for more in ([], ["--resume"]):
        for ended in run_ranks(2, train_program, [*argv, *more], functools.partial(count_writes, log)):
            assert ended.code == 0, ended.err
        made = sorted(path.stem for path in (tmp_path / "cache").glob("features-*"))
        assert len(made) == 8 and sorted(log.read_text().split()) == made
        for path in (tmp_path / "cache").glob("features-*"):
            path.unlink()
        log.unlink()


def test_a_run_with_it_is_the_run_without(data, tmp_path, monkeypatch):
    """The program from end to end."""
    monkeypatch.setattr(train, "draw_panels", lambda *args: None)
    monkeypatch.setattr(system_questions, "write_gallery", lambda *args: None)

    def figures(name: str, *flags: str) -> tuple[list[float], float]:
        out = tmp_path / name
        argv = small_flags(data, out, freeze="encoders", steps=3)
        assert train.main(train.read_command_line([*argv, *flags])) is None
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if "loss" in row], json.loads((out / "summary.json").read_text())[
            "accuracy"
        ]

    losses, accuracy = figures("plain")
    kept, kept_accuracy = figures("kept", "--feature-cache")
    assert kept == pytest.approx(losses, rel=1e-4) and kept_accuracy == accuracy
    assert len(list((tmp_path / "cache").glob("features-*"))) == 8  # images and questions of train, val, test, hold-out
