"""From samples to batches: every question once an epoch, images shared, labels that end with EOS, padding by length."""

import math
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqa_scratch.data.batches import IGNORE, Batch, Questions, Ragged, prefetch
from vqa_scratch.data.groups import batches_by_image
from vqa_scratch.data.images import ImageProcessor, Images
from vqa_scratch.data.mapped import stamps
from vqa_scratch.data.tokenizers import Tokenizers
from vqa_scratch.data.vqa_v2 import VQASample, read_vqa
from vqa_scratch.errors import UserError
from vqa_scratch.systems.vqa_models import own_tokenizers


@pytest.fixture(scope="module")
def samples(data) -> list[VQASample]:
    """Images with 8, 5 and 1 questions, so that there are pieces of several sizes."""
    samples = read_vqa(data, "train").samples
    seen: Counter[int] = Counter()
    kept = []
    for sample in samples:
        seen[sample.image_id] += 1
        if seen[sample.image_id] <= (8, 5, 1)[sample.image_id % 3]:
            kept.append(sample)
    return kept


def tokenizers(samples: list[VQASample], **changes) -> Tokenizers:
    options = {"max_question_tokens": 32, "max_answer_tokens": 8, "question_prompt": False} | changes
    return Tokenizers(*own_tokenizers(samples), **options)


@pytest.fixture(scope="module")
def questions(samples) -> Questions:
    return Questions(samples, tokenizers(samples))


@pytest.fixture(scope="module")
def images(questions) -> Images:
    return Images(questions.image_paths, ImageProcessor(size=(64, 64)))


# ------------------------------------------------------------------------------------------------ order


@pytest.mark.parametrize(("per_step", "per_image"), [(32, 8), (7, 3), (1, 1), (10_000, 16)])
def test_an_epoch_covers_each_question_once(questions, per_step, per_image):
    batches = questions.epoch(0, 0, per_step, per_image)
    assert sorted(np.concatenate(batches)) == list(range(len(questions.samples)))
    for rows in batches:
        assert len(rows) <= max(per_step, per_image)
        runs = np.split(rows, np.flatnonzero(np.diff(questions.image_of[rows])) + 1)
        piece = math.gcd(*map(len, runs))  # all pieces have one size; two of an image may come one after the other
        assert piece <= per_image and len(rows) % piece == 0


def test_texts_of_about_one_length_come_together():
    """Each row once, and less padding than without the lengths; the batches themselves are in random order."""
    lengths = np.random.default_rng(0).integers(1, 40, 400)
    groups = [range(at, at + 4) for at in range(0, 400, 4)]
    padding = []
    for known in (None, lengths):
        batches = batches_by_image(groups, np.random.default_rng(1), 10, 1, known)
        assert sorted(np.concatenate(batches)) == list(range(400)) and {len(rows) for rows in batches} == {10}
        longest = [lengths[rows].max() for rows in batches]
        padding.append(sum((lengths[rows].max() - lengths[rows]).sum() for rows in batches))
    assert padding[1] < 0.4 * padding[0]
    assert sum(a <= b for a, b in zip(longest, longest[1:], strict=False)) < 30


def test_an_epoch_is_a_function_of_seed_and_number(questions):
    def order(seed: int, number: int) -> list[int]:
        return np.concatenate(questions.epoch(seed, number, 16, 4)).tolist()

    np.random.seed(1)
    first = order(3, 2)
    np.random.seed(2)
    assert first == order(3, 2)
    assert first != order(3, 3) and first != order(4, 2)


def test_in_order_takes_whole_images_up_to_the_limit(questions):
    everything = np.concatenate(questions.in_order(10_000, 20))
    assert sorted(everything) == list(range(len(questions.samples)))
    few = np.concatenate(questions.in_order(9, 20))
    taken = set(questions.image_of[few])
    assert taken == set(range(len(taken))) and len(few) >= 9
    assert len(few) == sum(len(questions.of_image[i]) for i in taken)


# ------------------------------------------------------------------------------------------------ content


def test_a_batch_is_made_of_its_samples(questions, images):
    """Ids, masks, labels and pixels against the samples, one by one."""
    words = questions.tokenizers
    for rows in questions.epoch(0, 0, 24, 8)[:6]:
        batch = questions.batch(rows, images)
        assert len(batch.images) == len(set(questions.image_of[rows])) or len(batch.images) <= len(rows)
        for i, row in enumerate(rows):
            sample = questions.samples[row]
            length = int(batch.attention_mask[i].sum())
            assert batch.attention_mask[i, :length].all()
            assert batch.question[i, :length].tolist() == words.text.encode(sample.question)
            asked = batch.labels[i] != IGNORE
            answer = words.answer(sample.answer)
            assert batch.labels[i][asked].tolist() == answer[1:] and answer[-1] == words.decoder.eos_id
            assert batch.decoder_input_ids[i][asked].tolist() == answer[:-1] and answer[0] == words.decoder.bos_id
            pixels = images.processor.to_uint8(Image.open(sample.image_path))
            assert np.array_equal(batch.images[batch.image_index[i]].numpy(), pixels)
        assert batch.rows.tolist() == list(rows)


def test_the_prompt_is_read_and_not_asked(samples, images):
    """With a prompt the decoder reads the question, BOS, the answer; labels begin where BOS is read."""
    words = tokenizers(samples, question_prompt=True)
    questions = Questions(samples, words)
    rows = questions.epoch(0, 0, 24, 8)[0]
    batch = questions.batch(rows, images)
    prompts, mask = questions.prompt_batch(rows)
    for i, row in enumerate(rows):
        prompt, answer = words.prompt(samples[row].question), words.answer(samples[row].answer)
        read = prompt + answer[:-1]
        assert batch.decoder_input_ids[i, : len(read)].tolist() == read
        asked = (batch.labels[i] != IGNORE).nonzero()[:, 0].tolist()
        assert asked == list(range(len(prompt), len(read))) and batch.labels[i, asked].tolist() == answer[1:]
        assert prompts[i][mask[i]].tolist() == [*prompt, answer[0]], "padding on the left, BOS last"
        assert int(mask[i].sum()) == len(prompt) + 1 and mask[i, -1]
    assert words.decoder.decode(words.prompt("is there a red circle?")).strip() == "is there a red circle?"


def test_the_words_of_a_prompt_can_be_labels_too(samples, images):
    """Every token read is asked for its next one, up to the end of the answer: a plain language model's labels."""
    words = tokenizers(samples, question_prompt=True)
    questions = Questions(samples, words)
    rows = questions.epoch(0, 0, 24, 8)[0]
    batch, without = questions.batch(rows, images, words=True), questions.batch(rows, images)
    assert torch.equal(batch.decoder_input_ids, without.decoder_input_ids)
    for i, row in enumerate(rows):
        prompt, answer = words.prompt(samples[row].question), words.answer(samples[row].answer)
        assert batch.labels[i][batch.labels[i] != IGNORE].tolist() == [*prompt[1:], *answer]
        assert batch.labels[i, 0] == prompt[1] and batch.counts[1] > without.counts[1]
        assert without.labels[i][without.labels[i] != IGNORE].tolist() == answer[1:]


def test_without_a_prompt_the_decoder_starts_at_bos(questions):
    prompts, mask = questions.prompt_batch(np.arange(3))
    assert prompts.tolist() == [[questions.tokenizers.decoder.bos_id]] * 3 and mask.all()


def test_another_image_can_be_shown(questions, images):
    rows = questions.in_order(8, 8)[0]
    swap = np.roll(np.arange(len(images.paths)), 1)
    shown = questions.batch(rows, images, image_map=swap).images
    expected = np.stack([images.read(int(swap[i])) for i in dict.fromkeys(questions.image_of[rows])])
    assert np.array_equal(shown.numpy(), expected)


def test_parts_together_are_the_batch(questions, images):
    """Also where pieces of one image came one after the other, so that it has more questions than the rest."""
    batches = [questions.batch(rows, images) for rows in questions.epoch(0, 0, 60, 2)]
    batch = next(b for b in batches if len({*b.image_index.bincount().tolist()}) > 1)
    for number in (1, 2, 3, 100):
        parts = list(batch.parts(number))
        assert len(parts) <= number
        at = 0
        for part in parts:
            assert torch.equal(part.images[part.image_index], batch.images[batch.image_index[at : at + len(part.rows)]])
            at += len(part.rows)
        for name in ("question", "attention_mask", "labels", "decoder_input_ids", "rows"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert isinstance(batch.to("cpu"), Batch)


# ------------------------------------------------------------------------------------------------ limits


def test_long_questions_keep_their_special_tokens(samples):
    words = tokenizers(samples, max_question_tokens=6)
    long = "is there a small red circle? " * 2_000
    ids = words.question(long)
    assert len(ids) == 6 and ids[0] == words.text.cls_id and ids[-1] == words.text.sep_id
    assert ids[1:-1] == words.text.encode(long, add_special_tokens=False)[:4]
    assert words.cut["questions"] == 1
    assert words.question("is it") == words.text.encode("is it") and words.cut["questions"] == 1


def test_notes_on_a_question(samples):
    """Either reader's cut is told; so is a word that the text encoder has no token for, once."""
    short, long = "is there a small red circle?", "is there a small red circle? " * 20
    words = tokenizers(samples, max_question_tokens=40, question_prompt=True)
    assert words.notes_on(short) == [] and words.notes_on(" ".join([short, "\N{SNOWMAN} small \N{SNOWMAN}"])) == [
        "the text encoder has no tokens for \N{SNOWMAN}, and reads one and the same token in their place"
    ]
    assert words.notes_on(long) == ["the question is longer than 40 tokens; only its beginning was read"]
    snow = "\N{SNOWMAN}" * 30  # one unknown word for the text encoder, 90 bytes for the decoder
    assert words.notes_on(snow)[0] == words.notes_on(long)[0] and "\N{SNOWMAN}..., and reads" in words.notes_on(snow)[1]
    assert len(tokenizers(samples, max_question_tokens=40).notes_on(snow)) == 1
    assert words.cut == {"questions": 0, "answers": 0}


def test_long_answers_keep_their_end(samples):
    words = tokenizers(samples, max_answer_tokens=3)
    ids = words.answer("a very long answer in many words")
    assert len(ids) == 4 and ids[0] == words.decoder.bos_id and ids[-1] == words.decoder.eos_id
    assert words.cut["answers"] == 1


def test_ragged():
    rows = [[3, 1], [], [5], [2, 2, 2]]
    ragged = Ragged(rows)
    ids, mask = ragged.padded(np.array([3, 0, 1]), pad=9)
    assert ids.tolist() == [[2, 2, 2], [3, 1, 9], [9, 9, 9]] and mask.sum(1).tolist() == [3, 2, 0]
    ids, mask = ragged.padded(range(3), pad=9, left=True)
    assert ids.tolist() == [[3, 1], [9, 9], [9, 5]] and mask.tolist() == [[True, True], [False, False], [False, True]]
    again = Ragged(rows, np.array([3, 0, 0, 1]))
    assert len(again.flat) == 6, "each is kept once"
    for places in (again.places, Ragged([rows[3], rows[0], rows[0], rows[1]]).places):
        where, inside = places(np.array([1, 0, 2, 3]))
        assert inside.sum(1).tolist() == [2, 3, 2, 0] and len(where) == 7
    assert again.padded(np.array([2, 1]), pad=9)[0].tolist() == [[3, 1], [3, 1]]


def test_no_samples_are_refused(questions):
    with pytest.raises(ValueError, match="no samples"):
        Questions([], questions.tokenizers)


# ------------------------------------------------------------------------------------------------ images


def test_kept_images_are_the_decoded_ones(questions, tmp_path):
    """The file is written once, found again, and written anew when an image or the preprocessing changes."""
    paths = []
    for i, path in enumerate(questions.image_paths[:5]):
        paths.append(tmp_path / f"{i}.png")
        paths[-1].write_bytes(path.read_bytes())
    cache = tmp_path / "cache"
    fresh, kept = (Images(paths, ImageProcessor(size=(32, 32))) for _ in range(2))
    kept.cache_in(cache, progress=False)
    chosen = np.array([4, 0, 0, 2])
    assert torch.equal(kept.batch(chosen), fresh.batch(chosen))
    (file,) = cache.iterdir()
    stamp = file.stat().st_mtime_ns
    Images(paths, ImageProcessor(size=(32, 32))).cache_in(cache, progress=False)
    assert [p.stat().st_mtime_ns for p in cache.iterdir()] == [stamp]
    Images(paths, ImageProcessor(size=(16, 16))).cache_in(cache, progress=False)
    assert len(list(cache.iterdir())) == 2
    paths[0].write_bytes(paths[1].read_bytes())
    changed = Images(paths, ImageProcessor(size=(32, 32)))
    changed.cache_in(cache, progress=False)
    assert torch.equal(changed.batch([0]), changed.batch([1]))


def test_the_stamp_of_a_file_is_of_its_real_place(tmp_path, monkeypatch):
    """Whether the file, its folder or neither is a link, and the path relative or not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    for name in ("a", "b"):
        (tmp_path / "real" / name).write_text(name * 9)
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "real" / "file").symlink_to("b")
    (tmp_path / "file").symlink_to("folder/file")
    paths = [Path("real/a"), Path("folder/b"), Path("folder/file"), Path("file"), tmp_path / "folder" / "../file"]
    of_each = [(path.resolve(), path.stat()) for path in paths]
    lines = [f"{place}|{stat.st_size}|{stat.st_mtime_ns}\n".encode() for place, stat in of_each]
    assert list(stamps(paths)) == lines and len(set(lines)) == 2


def test_an_unreadable_image_leaves_no_file(questions, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(questions.image_paths[0].read_bytes()[:200])
    images = Images([questions.image_paths[0], broken], ImageProcessor(size=(32, 32)))
    with pytest.raises(UserError, match="broken.png is damaged or truncated"):
        images.cache_in(tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_images_of_many_sizes_are_refused(questions):
    with pytest.raises(UserError, match="images of one size"):
        Images(questions.image_paths, ImageProcessor(size=64))


# ------------------------------------------------------------------------------------------------ prefetching


def test_prefetch_gives_the_same_items_in_order():
    assert list(prefetch(range(100))) == list(range(100))


def test_errors_of_the_source_surface():
    def source():
        yield 1
        raise UserError("this image is broken")

    items = prefetch(source())
    assert next(items) == 1
    with pytest.raises(UserError, match="this image is broken"):
        next(items)


def test_a_closed_prefetch_lets_its_thread_end():
    before = threading.active_count()
    endless = prefetch(iter(int, 1))
    next(endless)
    endless.close()
    for _ in range(100):
        if threading.active_count() == before:
            return
        threading.Event().wait(0.05)
    raise AssertionError("the thread goes on")
