"""Reading and writing of VQA v2 files: round trip, every reason to leave something out, every error line."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from vqa_scratch.data.vqa_files import image_file_name
from vqa_scratch.data.vqa_v2 import VQAFiles, VQASample, read_vqa, split_by_image
from vqa_scratch.data.vqa_write import write_submission, write_vqa
from vqa_scratch.errors import UserError

QUESTIONS = "v2_OpenEnded_mscoco_train2014_questions.json"
ANNOTATIONS = "v2_mscoco_train2014_annotations.json"
PAIRS = "v2_mscoco_train2014_complementary_pairs.json"


def make_samples(folder, images=4, per_image=3, split="train", suffix=".jpg"):
    """Question k of an image has k "no" among its ten answers, the rest "yes"."""
    return [
        VQASample(
            image_id=image_id,
            image_path=folder / image_file_name(split, image_id, suffix),
            question_id=image_id * 1000 + k,
            question=f"is it {k}?",
            question_type="is it",
            answer_type="yes/no",
            answers=("yes",) * (10 - k) + ("no",) * k,
            answer="yes",
        )
        for image_id in range(1, images + 1)
        for k in range(per_image)
    ]


@pytest.fixture
def data(tmp_path):
    """A folder with the train split: 4 images with 3 questions each."""
    samples = make_samples(tmp_path)
    for path in {sample.image_path for sample in samples}:
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    write_vqa(tmp_path, "train", samples, pairs=[(1000, 2000)])
    return tmp_path, samples


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_round_trip_and_official_form(data):
    folder, samples = data
    result = read_vqa(folder, "train")
    assert result.samples == samples
    assert read_vqa(str(folder), "train2014").samples == samples
    assert json.loads((folder / PAIRS).read_text()) == [[1000, 2000]]
    assert (result.report.in_file, result.report.kept, result.report.images) == (12, 12, 4)
    assert not result.report.skipped

    questions = json.loads((folder / QUESTIONS).read_text())
    assert set(questions) == {"info", "task_type", "data_type", "data_subtype", "questions", "license"}
    assert (questions["task_type"], questions["data_type"]) == ("Open-Ended", "mscoco")
    assert questions["data_subtype"] == "train2014"
    assert set(questions["questions"][0]) == {"image_id", "question", "question_id"}
    annotations = json.loads((folder / ANNOTATIONS).read_text())
    assert set(annotations) == {"info", "data_type", "data_subtype", "annotations", "license"}
    entry = annotations["annotations"][2]
    assert set(entry) == {
        *("question_id", "image_id", "question_type", "answer_type", "answers", "multiple_choice_answer"),
    }
    assert [answer["answer_id"] for answer in entry["answers"]] == list(range(1, 11))
    assert {answer["answer_confidence"] for answer in entry["answers"]} == {"yes"}
    write_vqa(folder, "train", samples[:3])  # writing again replaces
    assert read_vqa(folder, "train").samples == samples[:3] and json.loads((folder / PAIRS).read_text()) == []
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]


@pytest.mark.parametrize(
    "place",
    [
        "train2014/COCO_train2014_000000000007.jpg",
        "train2014/COCO_train2014_000000000007.png",
        "images/train2014/COCO_train2014_000000000007.jpg",
        "train2014/000000000007.jpg",
        "images/7.png",
        "COCO_train2014_000000000007.jpeg",
    ],
)
def test_finds_images_by_each_known_name(tmp_path, place):
    sample = replace(make_samples(tmp_path, 1, 1)[0], image_id=7, question_id=7000)
    write_vqa(tmp_path, "train", [sample])
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(tmp_path / place)
    assert read_vqa(tmp_path, "train").samples[0].image_path == tmp_path / place


def test_jpg_is_preferred_to_png(data):
    folder, samples = data
    Image.new("RGB", (2, 2)).save(samples[0].image_path.with_suffix(".png"))
    assert read_vqa(folder, "train").samples[0].image_path == samples[0].image_path


def test_test_splits_need_no_annotations_and_test_dev_shares_images(tmp_path):
    samples = [replace(s, answers=(), answer="") for s in make_samples(tmp_path, 2, 1, split="test-dev")]
    assert samples[0].image_path.name == "COCO_test2015_000000000001.jpg"
    samples[0].image_path.parent.mkdir()
    for sample in samples:
        Image.new("RGB", (2, 2)).save(sample.image_path)
    files = write_vqa(tmp_path, "test-dev", samples)
    assert files.annotations is None
    read = read_vqa(tmp_path, "test-dev")
    assert [(s.image_path, s.answers, s.answer, s.answer_type) for s in read.samples] == [
        (s.image_path, (), "", "") for s in samples
    ]
    assert "annotations  none" in str(read.report)
    with pytest.raises(UserError, match="min_agreement=0.5 needs annotations"):
        read_vqa(tmp_path, "test-dev", min_agreement=0.5)


def test_explicit_files(data, tmp_path):
    folder, samples = data
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (folder / QUESTIONS).rename(moved / "q.json")
    (folder / ANNOTATIONS).rename(moved / "a.json")
    files = VQAFiles(moved / "q.json", moved / "a.json", folder / "train2014")
    assert read_vqa(files, "train").samples == samples
    assert read_vqa(replace(files, annotations=None), "train").samples[0].answers == ()
    with pytest.raises(UserError, match=r"b\.json not found"):
        read_vqa(replace(files, annotations=moved / "b.json"))


# ------------------------------------------------------------------------------------------- choosing


def ids(result):
    return [sample.question_id for sample in result.samples]


def test_limits(data):
    folder, samples = data
    every = [s.question_id for s in samples]
    assert ids(read_vqa(folder, start_at=2, end_at=7)) == every[2:7]
    assert ids(read_vqa(folder, end_at=99)) == every
    assert ids(read_vqa(folder, max_questions=5)) == every[:5]
    assert ids(read_vqa(folder, max_images=2)) == every[:6]
    assert ids(read_vqa(folder, max_questions_per_image=1)) == every[::3]
    both = read_vqa(folder, start_at=1, max_images=2, max_questions_per_image=2, max_questions=3)
    assert ids(both) == [1001, 1002, 2000]
    assert sum(both.report.skipped.values()) + both.report.kept == both.report.in_file == 12


@pytest.mark.parametrize("threshold, kept", [(0.0, 12), (0.8, 12), (0.81, 8), (0.9, 8), (1.0, 4)])
def test_min_agreement_is_the_share_of_the_majority(data, threshold, kept):
    result = read_vqa(data[0], min_agreement=threshold)
    assert len(result.samples) == kept
    assert result.report.skipped["the annotators agree less than min_agreement"] == 12 - kept


def test_report_counts_every_reason(data):
    folder, samples = data
    (folder / "train2014" / "COCO_train2014_000000000004.jpg").unlink()
    truncated = folder / "train2014" / "COCO_train2014_000000000003.jpg"  # its header is whole: only decoding tells
    truncated.write_bytes(truncated.read_bytes()[:-60])

    def break_questions(content):
        content["questions"][1]["question"] = "  "
        content["questions"].append(content["questions"][0])

    def break_annotations(content):
        entries = content["annotations"]
        entries[0]["answers"] = entries[0]["answers"][:3]
        entries[3]["image_id"] = 1
        for answer in entries[2]["answers"]:
            del answer["answer_id"]
        del entries[4]

    edit(folder / QUESTIONS, break_questions)
    edit(folder / ANNOTATIONS, break_annotations)
    report = read_vqa(folder, verify_images=True).report
    assert report.skipped == {
        "the image is missing": 3,
        "the image cannot be read": 3,
        "the question is empty": 1,
        "the question id occurred before": 1,
        "the annotation is about another image": 1,
        "the question has no annotation": 1,
    }
    assert report.notes["questions with other than ten answers"] == 1
    assert sum(report.notes.values()) == 11
    assert report.kept == 3 and report.kept + sum(report.skipped.values()) == report.in_file == 13
    text = str(report)
    assert len(text.splitlines()) == 12
    assert "kept 3 of 13 questions, on 2 images" in text
    assert f"left out 3: the image is missing (first: {folder / image_file_name('train', 4)})" in text
    # unless asked, files are not opened
    assert "the image cannot be read" not in read_vqa(folder).report.skipped


def test_missing_majority_answer_is_taken_from_the_annotators(data):
    edit(data[0] / ANNOTATIONS, lambda c: [entry.pop("multiple_choice_answer") for entry in c["annotations"]])
    assert read_vqa(data[0]).samples == data[1]


# ------------------------------------------------------------------------------------------- errors


def message(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_missing_files_name_what_was_looked_for(data, tmp_path):
    folder, _ = data
    assert "no questions of split val: neither v2_OpenEnded_mscoco_val2014_questions.json" in message(
        read_vqa, folder, "val"
    )
    assert f"{tmp_path / 'nowhere'} is not a folder" in message(read_vqa, tmp_path / "nowhere", "val")
    assert "v2_OpenEnded_mscoco_trian_questions.json" in message(read_vqa, folder, "trian")
    (folder / ANNOTATIONS).unlink()
    assert ANNOTATIONS in message(read_vqa, folder, "train")


def test_folder_without_any_image(data):
    folder, samples = data
    for sample in samples:
        sample.image_path.unlink(missing_ok=True)
    text = message(read_vqa, folder)
    assert "no image" in text and str(folder / "train2014") in text
    Image.new("RGB", (2, 2)).save(folder / "train2014" / "another.png")
    text = message(read_vqa, folder)
    assert "12 because the image is missing" in text and "COCO_train2014_000000000001.jpg" in text


@pytest.mark.parametrize("name", [QUESTIONS, ANNOTATIONS])
def test_broken_json(data, name):
    folder, _ = data
    path = folder / name
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    text = message(read_vqa, folder)
    assert str(path) in text and "not valid JSON at line 1, column" in text
    path.write_text("")
    assert "character 0 of 0" in message(read_vqa, folder)
    path.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in message(read_vqa, folder)
    path.write_text("[" * 100_000)
    assert "nested too deeply" in message(read_vqa, folder)
    path.write_text("[]")
    assert 'has no list "' in message(read_vqa, folder)
    path.write_text('{"questions": 3, "annotations": 3}')
    assert "is a int, not a list" in message(read_vqa, folder)


@pytest.mark.parametrize("key", ["question_id", "image_id", "question"])
def test_missing_or_wrong_key_in_questions(data, key):
    folder, _ = data
    edit(folder / QUESTIONS, lambda c: c["questions"][5].pop(key))
    assert message(read_vqa, folder) == f"{folder / QUESTIONS}: questions[5] has no '{key}'"
    edit(folder / QUESTIONS, lambda c: c["questions"][5].update({key: True}))
    assert f"questions[5]: '{key}' is True, not " in message(read_vqa, folder)
    edit(folder / QUESTIONS, lambda c: c["questions"].__setitem__(5, "text"))
    assert "questions[5] is a str, not an object" in message(read_vqa, folder)


@pytest.mark.parametrize("key", ["question_id", "image_id", "question_type", "answer_type", "answers"])
def test_missing_key_in_annotations(data, key):
    folder, _ = data
    edit(folder / ANNOTATIONS, lambda c: c["annotations"][5].pop(key))
    assert message(read_vqa, folder) == f"{folder / ANNOTATIONS}: annotations[5] has no '{key}'"


def test_annotation_without_usable_answers(data):
    folder, _ = data
    edit(folder / ANNOTATIONS, lambda c: c["annotations"][1]["answers"][3].pop("answer"))
    assert "annotations[1] (question 1001) has an answer without a text" in message(read_vqa, folder)
    edit(folder / ANNOTATIONS, lambda c: c["annotations"][1].update(answers=[{"answer": 3}]))
    assert "an answer without a text: {'answer': 3}" in message(read_vqa, folder)
    edit(folder / ANNOTATIONS, lambda c: c["annotations"][1].update(answers=[None]))
    assert "an answer without a text: None" in message(read_vqa, folder)
    edit(folder / ANNOTATIONS, lambda c: c["annotations"][1].update(answers=[]))
    assert "annotations[1] (question 1001) has no answers" in message(read_vqa, folder)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"start_at": -1}, "start_at must be 0 or more"),
        ({"start_at": 12}, "start_at=12 is past the end"),
        ({"start_at": 5, "end_at": 5}, "12 because outside start_at and end_at"),
        ({"max_images": 0}, "max_images must be 1 or more"),
        ({"max_questions": 0}, "max_questions must be 1 or more"),
        ({"max_questions_per_image": -2}, "max_questions_per_image must be 1 or more"),
        ({"min_agreement": 1.5}, "from 0 to 1"),
    ],
)
def test_options_out_of_range(data, options, text):
    assert text in message(read_vqa, data[0], **options)


def test_write_refuses_what_it_could_not_read_back(tmp_path):
    samples = make_samples(tmp_path)
    with pytest.raises(ValueError, match="a question id occurs twice"):
        write_vqa(tmp_path, "train", [*samples, samples[0]])
    with pytest.raises(ValueError, match="11 of 12 samples have answers"):
        write_vqa(tmp_path, "train", [replace(samples[0], answers=()), *samples[1:]])
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- splitting


def test_split_by_image_keeps_images_whole(tmp_path):
    samples = make_samples(tmp_path, images=2000, per_image=2)
    parts = split_by_image(samples, (0.8, 0.1, 0.1), seed=3)
    images = [{s.image_id for s in part} for part in parts]
    assert sum(map(len, parts)) == len(samples) and len(set.union(*images)) == sum(map(len, images)) == 2000
    # binomial with n = 2000: four standard deviations are 72 images at .8 and 54 at .1
    assert abs(len(images[0]) - 1600) < 72 and abs(len(images[1]) - 200) < 54 and abs(len(images[2]) - 200) < 54


def test_split_by_image_is_stable(tmp_path):
    samples = make_samples(tmp_path, images=200, per_image=1)
    whole = split_by_image(samples, (0.5, 0.5))
    fewer = split_by_image(samples[::-3], (0.5, 0.5))
    for part, smaller in zip(whole, fewer, strict=True):
        assert {s.image_id for s in smaller} <= {s.image_id for s in part}
    assert split_by_image(samples, (0.5, 0.5), seed=1) != whole
    # the same on every machine and in every version
    assert [s.image_id for s in split_by_image(samples, (0.05, 0.95))[0]] == [3, 37, 52, 62, 74, 173, 177, 183]


@pytest.mark.parametrize("fractions", [(0.5, 0.4), (1.2, -0.2), (1.0, 0.0)])
def test_split_fractions_must_sum_to_one(fractions):
    with pytest.raises(ValueError, match="sum to 1"):
        split_by_image([], fractions)


# ------------------------------------------------------------------------------------------- submissions


def test_submission_round_trip(tmp_path):
    path = tmp_path / "sub" / "results.json"
    write_submission(path, {3: "yes", 1: 'a "cat" é'}, [1, 3])
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {"question_id": 1, "answer": 'a "cat" é'},
        {"question_id": 3, "answer": "yes"},
    ]
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_submission_covers_exactly_the_split(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(ValueError, match=r"1 without an answer \(first 2\), 1 that were not asked \(first 5\)"):
        write_submission(path, {1: "x", 5: "y"}, [1, 2])
    assert not path.exists()


def test_two_annotations_of_a_question_are_counted(data):
    folder, samples = data

    def twice(content):
        content["annotations"].append(json.loads(json.dumps(content["annotations"][0])))
        content["annotations"][-1]["multiple_choice_answer"] = "later"

    edit(folder / ANNOTATIONS, twice)
    read = read_vqa(folder)
    assert read.samples[0].answer == "later"
    assert "note: 1 second annotations of a question (of two, the later counts)" in str(read.report)


def test_the_report_says_whether_images_are_turned(data, tmp_path):
    assert "on 4 images, read as they are stored (no EXIF turn)" in str(read_vqa(data[0]).report)
    (tmp_path / "own.csv").write_text(f"image,question,answer\n{data[1][0].image_path},what?,this\n")
    assert "on 1 images, turned as their EXIF says" in str(read_vqa(tmp_path / "own.csv", "all").report)


@pytest.mark.parametrize("images", range(2, 9))
def test_no_part_of_few_images_is_empty(images):
    """And with many images the one part of each depends on nothing but itself."""
    samples = [VQASample(i, None, i, "?", "", "", ("a",), "a") for i in range(images)]
    for seed in range(20):
        train, val = split_by_image(samples, (0.95, 0.05), seed)
        assert train and val and len(train) + len(val) == images
    alone = split_by_image(samples[:1], (0.95, 0.05))
    assert sorted(map(len, alone)) == [0, 1]
