"""The contrastive system beyond the contract of all systems: its batches, its ranks, its figures, its files."""

import contextlib
import io
import json
import math
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from ranks import run_ranks
from run_helpers import command
from vqa_helpers import CPU, Started, train_program

from train import train_step
from vqa_scratch import systems
from vqa_scratch.data.contrasts import CLASSES, CONTRASTS, single_objects
from vqa_scratch.data.descriptions import in_places, places_of, read_scenes
from vqa_scratch.data.image_files import load_image
from vqa_scratch.data.scenes import HELD_OUT, Object
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.models.released import image_encoder
from vqa_scratch.systems.options import read_command_line
from vqa_scratch.systems.retrieval import ceilings, ranks_of, recalls, retrieval, share_preferred
from vqa_scratch.training.optimizers import Optimizers
from vqa_scratch.training.precision import Precision

SIZES = {"width": 16, "heads": 2, "image_layers": 1, "text_layers": 1, "projection": 8, "pairs_per_step": 8}


def flags(data, out, **changes):
    values = {"preset": "clip", "data": data, "out": out, "cache": out.parent / "cache", "device": "cpu"}
    values |= {"precision": "fp32", "steps": 4, "warmup_steps": 2, "log_every": 1, "eval_every": 2, "samples": 16}
    values |= SIZES | changes
    named = [part for k, v in values.items() if v is not None for part in (f"--{k.replace('_', '-')}", str(v))]
    return [*named, "--no-image-cache"]


def run(argv):
    ended = Started(train_program, argv).end()
    assert ended.code == 0, ended.err
    return ended.out


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folders of two finished runs: a CLIP with a stem, a SigLIP without."""
    folders = {}
    for name, changes in {
        "clip": {},
        "siglip": {"loss": "sigmoid", "stem": "linear", "projection": None},
        "linear clip": {"stem": "linear"},
    }.items():
        folders[name] = tmp_path_factory.mktemp(name.replace(" ", "-")) / "run"
        run(flags(data, folders[name], **changes))
    return folders


def system_of(data, out, **changes):
    options = read_command_line(flags(data, out, **changes))
    kind = systems.find("clip")
    kind.check(options)
    system = kind.build(options, read := kind.read(options), Precision("fp32", CPU))
    system.train_on(read)
    return system


# ------------------------------------------------------------------------------------------------- batches


def test_an_epoch_shows_each_image_once_with_a_caption_drawn_anew(data, tmp_path):
    system = system_of(data, tmp_path / "run", pairs_per_step=7)
    questions, drawn = system.splits["train"].questions, []
    for epoch in range(12):
        batches = [key.rows for key in system.epoch(epoch)]
        assert all(map(np.array_equal, batches, (key.rows for key in system.epoch(epoch))))
        assert [len(rows) for rows in batches] == [8, 8, 8]  # 24 images: no batch much smaller than the others
        rows = np.concatenate(batches)
        assert sorted(questions.image_of[rows]) == list(range(24))
        drawn.append(rows)
    assert len({tuple(rows) for rows in drawn}) == 12
    assert len({int(row) for rows in drawn for row in rows}) > 0.9 * len(questions.samples)


def test_the_others_of_a_batch_are_seen_and_twins_are_not(data, tmp_path):
    """The loss is that of the definition, over the pairs as the towers embed them one by one."""
    system = system_of(data, tmp_path / "run")
    batch = system.batch(system.epoch(0)[0])
    batch.texts[3] = batch.texts[5]  # as if they had the same caption
    batch.input_ids[3] = batch.input_ids[5]
    model = system.model
    with torch.no_grad():
        images = torch.cat([model.embed_images(system.processor.normalize(one[None])) for one in batch.images])
        texts = torch.cat([model.embed_texts(ids[None]) for ids in batch.input_ids])
        logits = model.logit_scale.exp() * images @ texts.T
        expected, number = 0.0, len(logits)
        for i in range(number):
            others = [j for j in range(number) if j == i or {i, j} != {3, 5}]
            for line in (logits[i], logits[:, i]):
                expected += (line[others].logsumexp(0) - line[i]).item() / 2
        loss, _ = system.loss(batch)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert batch.counts == (8, 8)


def test_a_silent_batch_has_no_loss_and_moves_nothing(data, tmp_path):
    system = system_of(data, tmp_path / "run")
    silent = system.batch(system.epoch(0)[0]).silent()
    loss, right = system.loss(silent)
    loss.backward()
    assert silent.counts == (0, 0) and loss.item() == right.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in system.model.parameters())


def test_the_scale_stays_below_a_hundred(data, tmp_path):
    """It is clamped after the step, by whatever optimizer, so what is saved is what was used."""
    for kind in ("muon", "adamw"):
        system = system_of(data, tmp_path / kind)
        rates = {"learning_rate": 1e-3, "matrix_learning_rate": 1e-3, "weight_decay": 0.0}
        optimizers = Optimizers(system.model, kind=kind, **rates)
        system.trained_by(optimizers)
        with torch.no_grad():
            system.model.logit_scale.fill_(5.0)
        train_step(system.loss, system.batch(system.epoch(0)[0]), optimizers, system.precision)
        assert system.model.logit_scale.item() == pytest.approx(math.log(100), abs=1e-6)


@pytest.mark.parametrize(("ranks", "parallel"), [(3, "ddp"), (2, "fsdp")])
def test_ranks_are_one_process(data, tmp_path, ranks, parallel):
    """Batches of two pairs, so that one of three ranks is silent: losses, gradients and figures of every step agree."""
    changes = {"pairs_per_step": 2, "optimizer": "adamw", "learning_rate": 1e-3}
    run(flags(data, tmp_path / "alone", **changes))
    for ended in run_ranks(ranks, train_program, flags(data, tmp_path / "ranks", parallel=parallel, **changes)):
        assert ended.code == 0, ended.err
    alone, together = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("alone", "ranks")
    )
    for one, other in zip(alone, together, strict=True):
        assert one["samples"] == other["samples"]
        for key in {"loss", "token_accuracy", "grad_norm"} & one.keys():
            assert one[key] == pytest.approx(other[key], rel=2e-5, abs=1e-6), (one["step"], key)
        if "val" in one:
            assert one["val"] == pytest.approx(other["val"], abs=1e-6)


# ------------------------------------------------------------------------------------------------- figures


def test_ranks_against_counting():
    torch.manual_seed(0)
    asked, found = torch.randn(40, 6), torch.randn(40, 6)
    found[7] = found[3]  # equally similar: neither comes first
    asked[9] = float("nan")
    ranks = ranks_of(asked, found)
    for i, rank in enumerate(ranks.tolist()):
        similar = (found @ asked[i]).tolist()
        before = sum(not other < similar[i] for j, other in enumerate(similar) if j != i)
        assert rank == before + 1
    assert ranks[9] == 40 and ranks[3] >= 2 and ranks[7] >= 2
    figures = recalls(torch.tensor([1, 1, 2, 5, 6, 10, 11, 40]))
    assert figures == {"R@1": 0.25, "R@5": 0.5, "R@10": 0.75, "median_rank": 5.5}


def test_ranks_in_parts_are_ranks(monkeypatch):
    torch.manual_seed(0)
    asked, found = torch.randn(50, 6), torch.randn(50, 6)
    whole = ranks_of(asked, found)
    monkeypatch.setattr("vqa_scratch.systems.retrieval.ROWS", 7)
    assert torch.equal(ranks_of(asked, found), whole)


def test_the_ceiling_is_what_perfect_vectors_reach():
    """Equal captions, different images: a model that knows everything gives them the best similarity there is."""
    captions = ["a", "b", "b", "c", "c", "c", "d"]
    torch.manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(4, 16), dim=1)[[0, 1, 1, 2, 2, 2, 3]]
    images = torch.nn.functional.normalize(texts + 0.01 * torch.randn(7, 16), dim=1)
    figures = retrieval(images, texts, captions)
    assert ceilings(captions) == {"image_to_text": 2 / 7, "text_to_image": 4 / 7}
    for way in ("image_to_text", "text_to_image"):
        assert figures[way]["R@1"] == pytest.approx(figures[way]["ceiling"])


def test_preferred_of_two():
    images = torch.eye(4)
    right, wrong = torch.eye(4) * torch.tensor([2.0, 2, 1, 0])[:, None], torch.eye(4)
    assert share_preferred(images, right, wrong) == (2 + 0.5) / 4


def test_contrasts_say_the_same_words_of_another_scene(data):
    scenes = read_scenes(data / "scenes_test.json")
    found = 0
    for scene in scenes.values():
        for name, change in CONTRASTS.items():
            other = change(scene)
            if other is None:
                continue
            found += 1
            assert places_of(other) != places_of(scene) and in_places(other) != in_places(scene)
            assert not {(thing.color, thing.shape) for thing in other} & HELD_OUT
            words = [Counter(re.findall(r"\w+", in_places(one))) for one in (scene, other)]
            if name != "sides":
                assert words[0] == words[1]
            else:
                swapped = {"left": "right", "right": "left"}
                assert words[0] == Counter({swapped.get(w, w): n for w, n in words[1].items()})
    assert found > len(scenes)
    one = (Object("circle", "red", "small", 8, 8), Object("circle", "red", "small", 56, 8))
    assert all(change(one) is None for change in CONTRASTS.values())


def test_single_objects_are_one_of_every_class():
    drawn = single_objects(2)
    assert len(drawn) == 2 * len(CLASSES) == 72 and len({place for _, place in drawn}) == 36
    for image, place in drawn:
        colors = np.asarray(image).reshape(-1, 3).astype(int)
        share = (np.abs(colors - np.median(colors, 0)).sum(1) > 60).mean()  # of the image that is not background
        assert (share > 0.02) == (CLASSES[place][0] == "large"), (CLASSES[place], share)


# ------------------------------------------------------------------------------------------------- files


def test_a_run_reports_what_its_folder_says(finished, data):
    """The figures of summary.json are those of the reopened run, on one caption that names places for each image."""
    folder = finished["clip"]
    summary, system = json.loads((folder / "summary.json").read_text()), systems.load(folder)
    scenes = read_scenes(data / "scenes_test.json")
    samples = {sample.image_id: sample for sample in system.texts_and_images()}
    captions = [in_places(scenes[image_id]) for image_id in samples]
    images = system.embed_images([load_image(sample.image_path) for sample in samples.values()])
    figures = retrieval(images, system.embed_texts(captions), captions)
    assert summary["image_to_text"] == pytest.approx(figures["image_to_text"])
    assert summary["accuracy"] == pytest.approx(figures["accuracy"])
    assert summary["baselines"]["chance"] == 1 / 6 and set(summary["contrasts"]) == {"colors", "shapes", "sides"}
    assert summary["holdout"]["images"] == 6 and 0 <= summary["zero_shot"]["held_out"] <= 1
    page = (folder / "samples.html").read_text()
    assert page.count("<article>") == 6 + 4 * 2 and "its own caption is number" in page


def test_what_is_sought_names_places_if_the_scene_is_known(data, tmp_path):
    system = system_of(data, tmp_path / "run")
    for name in ("val", "test", "holdout"):
        scenes, samples = read_scenes(data / f"scenes_{name}.json"), system.splits[name].questions.samples
        assert [sample.answer for sample in samples] == [in_places(scene) for scene in scenes.values()]
    read = system.data
    read.scenes.clear()
    system.train_on(read)
    first = {sample.image_id: sample.answer for sample in reversed(read.samples["test"])}
    assert [sample.answer for sample in system.splits["test"].questions.samples] == list(first.values())[::-1]


def test_figures_that_have_no_time_are_of_fewer_images_and_say_so(data, tmp_path):
    system = system_of(data, tmp_path / "run")
    system.seconds_to_finish(60.0)
    for kind in system.pace.seconds:
        system.pace.seconds[kind] = 1e6
    system.pace.ends = 0.0
    (tmp_path / "run").mkdir()
    figures = system.finish(tmp_path / "run")
    cut = {"retrieval": "1 of 6", "zero-shot": "1 of 10", "hold-out": "1 of 6"}  # the contrasts are of that one image
    assert figures["images"] == 1 and figures["cut_short"] == cut and 0 <= figures["zero_shot"]["held_out"] <= 1
    assert any("no time for all" in line for line in system.lines(figures))


def test_contrasts_and_drawn_objects_have_their_share_of_the_time(data, tmp_path):
    """All that takes time is a pass, so a figure that comes later still has the time that was kept for it."""
    system = system_of(data, tmp_path / "run")
    system.seconds_to_finish(60.0)
    assert [one.label for one in system.pace.left] == ["retrieval", "contrasts", "zero-shot", "hold-out"]
    assert all(system.pace.seconds[one.kind] > 0 for one in system.pace.left)
    asked, embed = [], system.embed_texts
    system.embed_texts = lambda texts: asked.append(len(texts)) or embed(texts)
    test, system.pace.seconds["contrasts", False], system.pace.ends = system.embed_split("test"), 1e6, 0.0
    system.contrasts(test, "contrasts")
    assert asked and set(asked) == {1} and system.pace.cut == {"contrasts": "1 of 6"}, "as many as there is time for"
    system.data.scenes.clear()
    assert [one.label for one in system.passes()] == ["", "retrieval", "hold-out"], "nothing is known of their scenes"


@pytest.mark.parametrize("name", ["clip", "siglip", "linear clip"])
def test_the_exported_program_says_what_the_run_says(finished, data, tmp_path, monkeypatch, capsys, name):
    system, out = systems.load(finished[name]), tmp_path / "out"
    with torch.no_grad():  # so short a training leaves all texts alike
        for parameter in system.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        if name == "siglip":
            system.model.logit_bias.zero_()  # at -10 every share is 0.000
    notes = system.export(out)
    assert ("under names of our own" in " ".join(notes)) == (name == "clip")
    monkeypatch.chdir(out)
    picture = sorted((data / "test2015").glob("*.png"))[0]
    Image.open(picture).save("picture.png")
    program = re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.S)[1]
    texts = ["a small red circle at the top left", "a large blue square " * 30]
    own = program.replace('"a large blue square at the bottom right"', repr(texts[1]))
    assert own != program
    for written, second in ((program, "a large blue square at the bottom right"), (own, texts[1])):
        capsys.readouterr()
        exec(compile(written, "README.md", "exec"), {"__name__": "readme"})
        shares = [float(line.split("  ")[0]) for line in capsys.readouterr().out.splitlines()]
        expected = system.classify(load_image(picture), [texts[0], second], ("{}",))
        assert shares == pytest.approx(expected, abs=1.1e-3)


@pytest.mark.parametrize(("name", "kind"), [("siglip", hf.SiglipModel), ("linear clip", hf.CLIPModel)])
def test_an_export_is_a_released_checkpoint(finished, data, tmp_path, name, kind):
    """The reference's model gives its embeddings, and its tower is an image encoder of other systems."""
    system = systems.load(finished[name])
    system.export(tmp_path)
    reference = kind.from_pretrained(tmp_path).eval()
    image = load_image(sorted((data / "test2015").glob("*.png"))[0])
    texts = ["a small red circle", "a large blue square"]
    ids = torch.stack([torch.tensor(system.tokenizers.text.encode(f"{text} .")) for text in texts])
    if system.text_width:
        ids = torch.nn.functional.pad(ids, (0, system.text_width - ids.shape[1]), value=0)
    with torch.no_grad():
        theirs = reference(pixel_values=system.processor(image)[None], input_ids=ids)
    ours = system.embed_images([image]), system.embed_texts([f"{text} ." for text in texts])
    torch.testing.assert_close(ours[0], theirs.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[1], theirs.text_embeds, rtol=0, atol=1e-5)
    assert type(image_encoder(tmp_path)) is type(system.model.image)


# ------------------------------------------------------------------------------------------------- retrieve


def said(*argv):
    """What a command prints, and its notes."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        command(*argv)
    return out.getvalue().splitlines(), err.getvalue()


def test_retrieve_ranks_images_by_a_text(finished, data, tmp_path):
    system, text = systems.load(finished["clip"]), "a small red circle at the top left"
    lines, _ = said("retrieve", finished["clip"], "--text", text, "--top", 3, "--out", tmp_path / "page.html")
    samples = system.texts_and_images()
    images = system.embed_images([load_image(sample.image_path) for sample in samples])
    similar = (images @ system.embed_texts([text])[0]).tolist()
    best = sorted(zip(similar, samples, strict=True), key=lambda pair: -pair[0])[:3]
    assert lines[:3] == [f"{score:.3f}  {sample.image_path}" for score, sample in best]
    page = (tmp_path / "page.html").read_text()
    assert page.count("<article>") == 3 and text in page and lines[3] == f"written to {tmp_path / 'page.html'}"


def test_retrieve_leaves_out_what_it_cannot_read(finished, data, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted((data / "val2014").glob("*.png"))[:3]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either")
    long = f"zebra {'a red circle ' * 60}"
    lines, err = said("retrieve", finished["clip"], "--text", long, "--images", folder, "--out", tmp_path / "x.html")
    assert len(lines) == 4
    assert "note: 1 of 4 images cannot be read: broken.png" in err
    assert "note: the text is longer than 77 tokens; only its beginning was read" in err
    assert "has no tokens for zebra" in err


def test_retrieve_ranks_texts_by_an_image(finished, data, tmp_path):
    system, path = systems.load(finished["siglip"]), sorted((data / "val2014").glob("*.png"))[0]
    to_page = ("--image", path, "--out", tmp_path / "page.html")
    lines, _ = said("retrieve", finished["siglip"], *to_page, "--top", 2)
    texts = [sample.answer for sample in system.texts_and_images()]
    similar = (system.embed_texts(texts) @ system.embed_images([load_image(path)])[0]).tolist()
    best = sorted(zip(similar, texts, strict=True), reverse=True)[:2]
    assert lines[:2] == [f"{score:.3f}  {text}" for score, text in best]

    labels = "red circle, blue square,green triangle"
    lines, _ = said("retrieve", finished["siglip"], *to_page, "--labels", labels, "--template", "a {}")
    shares = system.classify(load_image(path), labels.replace(", ", ",").split(","), ["a {}"])
    assert sorted(lines[:3]) == sorted(
        f"{share:.3f}  {label.strip()}" for share, label in zip(shares, labels.split(","), strict=True)
    )
    system = systems.load(finished["clip"])
    lines, _ = said("retrieve", finished["clip"], *to_page, "--labels", labels)
    shares = [float(line.split("  ")[0]) for line in lines[:3]]
    expected = system.classify(load_image(path), [label.strip() for label in labels.split(",")], ["{}"])
    assert shares == pytest.approx(sorted(expected, reverse=True), abs=6e-4) and sum(shares) == pytest.approx(
        1, abs=2e-3
    )


def test_retrieve_says_in_a_line_what_is_wrong(finished, data, tmp_path):
    run_folder, image = finished["clip"], sorted((data / "val2014").glob("*.png"))[0]
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"")
    for message, argv in {
        "give --text, to find images, or --image, to find texts": [],
        "one of the two": ["--text", "a", "--image", image],
        "--images goes with --text": ["--image", image, "--images", tmp_path],
        "--labels goes with --image": ["--text", "a", "--labels", "a,b"],
        "--template goes with --labels": ["--image", image, "--template", "a {}"],
        "the text is empty": ["--text", " "],
        r"'\ud800' is not valid text": ["--text", "\ud800"],
        r"'a \ud800' is not valid text": ["--image", image, "--labels", "a,b", "--template", "{} \ud800"],
        "empty holds no images: none of its 0 files": ["--text", "a", "--images", tmp_path / "empty"],
        "is not a folder: there is no such folder": ["--text", "a", "--images", tmp_path / "none"],
        "none of the 1 images can be read; the first:": ["--text", "a", "--images", tmp_path / "broken"],
        "labels must differ; given more than once: a": ["--image", image, "--labels", "a,b, a"],
        "a template has {} once": ["--image", image, "--labels", "a,b", "--template", "a"],
        "there is no such image": ["--image", tmp_path / "none.png"],
    }.items():
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            command("retrieve", run_folder, *argv, "--out", tmp_path / "page.html")
        assert len(str(caught.value)) <= 300
    assert not (tmp_path / "page.html").exists()


def test_one_image_or_one_caption_is_nothing_to_learn_from(data, tmp_path):
    with pytest.raises(UserError, match="here are 1 images and"):
        system_of(data, tmp_path / "run", max_images=1)
    system = system_of(data, tmp_path / "run")
    train = [replace(sample, answer="a red circle") for sample in system.data.samples["train"]]
    with pytest.raises(UserError, match="here are 24 images and 1 different captions"):
        system.train_on(replace(system.data, samples=system.data.samples | {"train": train}))


def test_retrieve_takes_the_place_of_no_other_file(finished, data):
    folder = finished["clip"]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name, message in {"config.json": "another file, which would be lost", "checkpoints": "a folder"}.items():
        with pytest.raises(UserError, match=message):
            command("retrieve", folder, "--text", "a red circle", "--out", folder / name)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_names_of_files_stand_in_the_page_as_text(finished, data, tmp_path):
    """Quotes, tags and umlauts; bytes that are no UTF-8, which Python holds as halves of letters; a line break makes no
    second line of output."""
    picture = sorted((data / "val2014").glob("*.png"))[0].read_bytes()
    for name in ("a'\"<b>ü&.png".encode(), b"caf\xe9.png", b"two\nlines.png"):
        (tmp_path / os.fsdecode(name)).write_bytes(picture)
    lines, _ = said("retrieve", finished["clip"], "--text", "<i>&", "--images", tmp_path, "--out", tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text()
    assert len(lines) == 4 and any(line.endswith(r"two\nlines.png") for line in lines)
    assert r"<b>caf\udce9.png</b>" in page and "<b>a&#x27;&quot;&lt;b&gt;ü&amp;.png</b>" in page
    assert "<h1>&lt;i&gt;&amp;</h1>" in page


def test_retrieve_reads_photos_as_the_run_does(finished, data, tmp_path, monkeypatch):
    """Those of a split in COCO's layout as they are stored, as in training; those of a folder as their EXIF says."""
    pixels = np.random.default_rng(0).integers(0, 255, (60, 40, 3), dtype=np.uint8)
    turn = Image.Exif()
    turn[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=turn)
    system = systems.load(finished["clip"])
    stored, turned = system.embed_images([Image.open(tmp_path / "turned.png"), load_image(tmp_path / "turned.png")])
    text, page = system.embed_texts(["a red circle"])[0], ("--out", tmp_path / "x.html")
    sample = VQASample(1, tmp_path / "turned.png", 1, "", "", "", ("a",), "a", upright=False)
    monkeypatch.setattr(type(system), "texts_and_images", lambda _: [sample])
    for vector, more in ((stored, ()), (turned, ("--images", tmp_path))):
        lines, _ = said("retrieve", finished["clip"], "--text", "a red circle", *more, *page)
        assert float(lines[0].split()[0]) == pytest.approx(float(vector @ text), abs=6e-4)
    assert abs(float((stored - turned) @ text)) > 2e-3


# ------------------------------------------------------------------------------------------------- ask, study


def test_what_it_cannot_be_asked_is_said(finished, data, tmp_path):
    run_folder, image, out = finished["clip"], sorted((data / "val2014").glob("*.png"))[0], ("--out", tmp_path / "out")
    for message, argv in {
        "which answers nothing; `python -m vqa_scratch retrieve` finds": ["ask", run_folder, "--image", image],
        "compares images with texts: give it --text": ["study", run_folder, "--image", image, *out],
        'give it --image FILE and a --text "...", and no --question': [
            *("study", run_folder, "--image", image, "--question", "what?", *out)
        ],
        'looks at images: give it --image FILE and a --text "..."': ["study", run_folder, "--text", "a circle", *out],
        "the text is empty": ["study", run_folder, "--image", image, "--text", " ", *out],
        "--faithfulness goes over questions, and": ["study", run_folder, "--faithfulness", data, *out],
        "which answers no questions": ["study", run_folder, "--ablation", data, *out],
    }.items():
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            command(*argv)
        assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_study_shows_the_text_and_its_words(finished, data, tmp_path, name):
    image, text = sorted((data / "val2014").glob("*.png"))[0], "a red circle, and a zebra"
    lines, err = said("study", finished[name], "--image", image, "--text", text, "--out", tmp_path)
    texts = [text, "a", "red", "circle", "and", "zebra"]
    system = systems.load(finished[name])
    similar = (system.embed_texts(texts) @ system.embed_images([load_image(image)])[0]).tolist()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [token["label"] for token in summary["tokens"]] == texts
    assert [token["similarity"] for token in summary["tokens"]] == pytest.approx(similar, abs=1e-5)
    assert lines[0] == f"run: {text}  (similarity {similar[0]:.3f})" and "has no tokens for zebra" in err
    assert summary["certificate"]["attentions"] == (2 if name == "clip" else 3)
    assert max(summary["certificate"][key] for key in ("mass", "output", "softmax")) <= 1e-5
    with Image.open(tmp_path / "overlay_nearness.png") as sheet:
        assert sheet.size == (7 * 448 + 6 * 8, 448)  # the image and a map of each text


def test_pointing_by_words(finished, data, tmp_path, capsys):
    """Colors and shapes that one object of a scene has alone."""
    command("study", finished["clip"], "--pointing", data, "--split", "val", "--out", tmp_path, "--questions", 999)
    found = json.loads((tmp_path / "figures.json").read_text())["pointing"]
    scenes = read_scenes(data / "scenes_val.json").values()
    for part, of in {
        "color": lambda o: o.color,
        "shape": lambda o: o.shape,
        "color shape": lambda o: o.words[1:],
    }.items():
        once = [thing for scene in scenes for thing in scene if sum(of(other) == of(thing) for other in scene) == 1]
        figure = found[f"{part}: nearness"]
        assert figure["questions"] == len(once) > 0
        areas = [(o.box[2] - o.box[0]) * (o.box[3] - o.box[1]) / 64**2 for o in once]
        assert figure["area"] == pytest.approx(np.mean(areas), rel=1e-5)  # summed in fp32
    assert "color shape: parts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 2}, "--accumulate would show each pair only those of its part.*--pairs-per-step"),
        ({"pairs_per_step": 1}, "--pairs-per-step must be at least 2"),
        ({"loss": "sigmoid"}, "--projection"),
        ({"width": 18, "heads": 4}, "does not divide"),
        ({"patch_size": 24, "stem": "linear"}, "not a multiple of the patch size"),
    ],
)
def test_options_that_are_refused(data, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        options = read_command_line(flags(data, tmp_path / "run", **changes))
        systems.find("clip").check(options)
    assert len(str(caught.value)) <= 300
