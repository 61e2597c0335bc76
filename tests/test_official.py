"""What is kept of the files of VQA v2: the same as parsing gives, never stale, never half of it."""

import json
import os
import shutil

import pytest
import torch
from vqa_helpers import small_options, small_system

from vqa_scratch.data import official
from vqa_scratch.data.vqa_v2 import VQAFiles, official_files, read_vqa
from vqa_scratch.errors import note

PARSED = official.parsed


@pytest.fixture
def own(data, tmp_path):
    """A data set of one's own to change: of the built-in one the validation split, made unusual."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns("train*", "test*", "holdout*"))
    files = official_files(folder, "val")
    asked, annotated = (json.loads(path.read_text()) for path in (files.questions, files.annotations))
    questions, annotations = asked["questions"], annotated["annotations"]
    questions[0]["question"] = "  ¿qué \U0001f600\n color? "
    questions[1]["question"] = " "
    questions[2]["question_id"] = annotations[2]["question_id"] = "a text"
    annotations[3]["image_id"] = annotations[-1]["image_id"]
    annotations[4]["answers"] = annotations[4]["answers"][:3]
    del annotations[5]["answers"][0]["answer_id"], annotations[6]["multiple_choice_answer"], annotations[7]
    for path, content in ((files.questions, asked), (files.annotations, annotated)):
        path.write_text(json.dumps(content))
    return files


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def parse_nothing(monkeypatch):
    monkeypatch.setattr(official, "parsed", lambda files: pytest.fail("the files were parsed again"))


def as_before(path, change):
    """Change a file, and then give it the time that it had."""
    stamp = path.stat()
    path.write_text(change(path.read_text()))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stamp.st_size, stamp.st_mtime_ns)


def test_what_is_kept_is_what_was_parsed(own, cache, monkeypatch):
    limits = {"cache": cache, "keep": True, "max_questions_per_image": 5, "start_at": 0}
    plain = read_vqa(own.images, "val", max_questions_per_image=5)
    assert plain.report.notes and len(plain.report.skipped) == 4, "every kind of unusual entry is there"
    first = read_vqa(own.images, "val", **limits)
    parse_nothing(monkeypatch)
    again = read_vqa(own.images, "val", **limits)
    for read in (first, again):
        assert read.samples == plain.samples and read.ids == plain.ids
        assert [sample.upright for sample in read.samples] == [False] * len(plain.samples)
        assert str(read.report) == str(plain.report)
    assert official.read_official(own, cache) == PARSED(own)
    assert len(read_vqa(own.images, "val", cache=cache, keep=True, max_images=1).samples) < len(plain.samples)
    assert len(list(cache.iterdir())) == 1, "one file, whatever the limits"


def test_every_batch_is_the_same(data, tmp_path, monkeypatch):
    """Samples, ids, order and images of a run that finds its questions in the cache."""
    options = small_options(data, tmp_path / "run")
    first = small_system(options)
    parse_nothing(monkeypatch)
    again = small_system(options)
    assert again.data.samples == first.data.samples and again.tokenizers.cut == first.tokenizers.cut
    for one, other in zip(first.epoch(0), again.epoch(0), strict=True):
        for a, b in zip(vars(first.batch(one)).values(), vars(again.batch(other)).values(), strict=True):
            assert torch.equal(a, b)


def test_without_annotations(own, cache):
    bare = VQAFiles(own.questions, None, own.images)
    official.read_official(own, cache)
    assert official.read_official(bare, cache) == official.read_official(bare, cache) == PARSED(bare)


def test_a_changed_file_is_never_read_stale(own, cache):
    """Not even if it has its size and its time of before; and images are looked for anew."""
    read_vqa(own.images, "val", cache=cache, keep=True)
    as_before(own.annotations, lambda text: text.replace('"no"', '"on"'))
    as_before(own.questions, lambda text: text.replace("circle", "square"))
    changed = read_vqa(own.images, "val", cache=cache, keep=True)
    assert changed.samples == read_vqa(own.images, "val").samples
    assert not any("circle" in sample.question or "no" in sample.answers for sample in changed.samples)
    changed.samples[0].image_path.unlink()
    fewer = read_vqa(own.images, "val", cache=cache, keep=True)
    assert fewer.report.skipped["the image is missing"] and len(fewer.samples) < len(changed.samples)


def test_another_parser_reads_anew(own, cache, tmp_path, monkeypatch):
    official.read_official(own, cache)
    other = tmp_path / "official.py"
    other.write_text("")
    monkeypatch.setattr(official, "__file__", str(other))
    official.read_official(own, cache)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", ["", "{}", "half", "a letter"])
def test_a_damaged_file_is_made_again(own, cache, damage):
    official.read_official(own, cache)
    (path,) = cache.iterdir()
    whole = path.read_text()
    path.write_text({"half": whole[:-99], "a letter": whole.replace("circle", "cIrcle")}.get(damage, damage))
    assert official.read_official(own, cache) == PARSED(own)
    assert path.read_text() == whole and list(cache.iterdir()) == [path]


def test_a_file_that_changes_while_it_is_parsed_is_not_kept(own, cache, monkeypatch):
    def parsed(files):
        read = PARSED(files)
        as_before(files.questions, lambda text: text.replace("circle", "square"))
        return read

    monkeypatch.setattr(official, "parsed", parsed)
    official.read_official(own, cache)
    assert not cache.exists()


def test_two_runs_at_once_both_read_all(own, cache, monkeypatch):
    def parsed(files):
        monkeypatch.setattr(official, "parsed", PARSED)
        assert official.read_official(files, cache) == PARSED(files)  # another process, which is faster
        return PARSED(files)

    monkeypatch.setattr(official, "parsed", parsed)
    assert official.read_official(own, cache) == PARSED(own)
    assert len(list(cache.iterdir())) == 1, "nothing unfinished is left"


def test_a_cache_that_cannot_be_written_is_a_note(own, tmp_path, capsys):
    note.cache_clear()
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert official.read_official(own, tmp_path / "file" / "cache") == PARSED(own)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: cannot write ") and line.endswith("; every run will parse the questions again")
