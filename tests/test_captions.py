"""Descriptions of drawn scenes, captions files and their faults, and what a caption is scored by."""

import json
import random
from collections import Counter

import pytest
from PIL import Image

from vqa_scratch.data.captions import CAPTION, check_captions, read_captions
from vqa_scratch.data.descriptions import FORMS, describe, describe_all, objects_named, places_named
from vqa_scratch.data.scenes import MIN_OFFSET, Object, draw_scene
from vqa_scratch.data.shapes import ShapesSpec, ensure_shapes
from vqa_scratch.data.vqa_v2 import split_by_image
from vqa_scratch.errors import UserError
from vqa_scratch.systems.caption_scores import corpus_bleu, score_objects
from vqa_scratch.systems.captions import accuracy_of

SCENES = {i: draw_scene(random.Random(i)) for i in range(1, 300)}


# ---------------------------------------------------------------------------------------------- descriptions


def test_the_oracle_scores_one():
    """Every description names every object and nothing else, in its right place."""
    for seed in range(3):
        captions = {i: texts[seed % len(texts)] for i, texts in describe_all(SCENES, seed).items()}
        score = score_objects(captions, SCENES)
        assert (*score.values(), accuracy_of(score)) == (1, 1, 1, 1, 1)


def test_every_form_occurs_and_differs():
    texts = describe_all(SCENES, 0)
    assert all(len(set(some)) == len(some) >= 3 for some in texts.values())
    assert max(map(len, texts.values())) == len(FORMS)


def test_descriptions_are_a_function_of_seed_and_image():
    again = describe_all({i: SCENES[i] for i in (7, 3)}, 0)
    assert again[3] == describe_all(SCENES, 0)[3]
    assert describe_all(SCENES, 1) != describe_all(SCENES, 0)


def test_orders_are_those_of_the_scene():
    """Read back from the words: who is left of whom, who is below whom."""
    step = {"to the right of it": (1, 0), "to the left of it": (-1, 0), "below it": (0, 1), "above it": (0, -1)}
    checked = Counter()
    for scene in SCENES.values():
        where = {f"{o.size} {o.color} {o.shape}": (o.x, o.y) for o in scene}
        if len(where) < len(scene):
            continue  # two objects of one name
        for text in describe(scene, random.Random(0)):
            names = [" ".join(name) for name in _in_order(text)]
            pairs = list(zip(names, names[1:], strict=False))
            if text.startswith("from left"):
                assert all(where[b][0] - where[a][0] >= MIN_OFFSET for a, b in pairs)
                checked["left"] += 1
            elif text.startswith("from top"):
                assert all(where[b][1] - where[a][1] >= MIN_OFFSET for a, b in pairs)
                checked["top"] += 1
            elif " it a " in text:
                relations = [part.split(" a ")[0] for part in text.split(", ")[1:]]
                for (a, b), relation in zip(pairs, relations, strict=True):
                    (ax, ay), (bx, by), (dx, dy) = where[a], where[b], step[relation]
                    assert (bx - ax) * dx + (by - ay) * dy >= MIN_OFFSET
                checked["related"] += 1
    assert min(checked.values()) > 20 and len(checked) == 3


def _in_order(text: str) -> list[tuple[str, str, str]]:
    words = text.replace(",", "").split()
    return [tuple(words[i : i + 3]) for i, word in enumerate(words) if word in ("small", "large")]


def test_the_parser_counts_and_reads_anywhere():
    text = "Two things: a small red circle, and a SMALL red circle at the top left; no small red. A red circle."
    assert objects_named(text) == {("small", "red", "circle"): 2}
    assert places_named(text) == {("small", "red", "circle", "top left"): 1}
    assert not objects_named("smaller red circles, a large redcircle")


# ---------------------------------------------------------------------------------------------- scores


def test_precision_and_recall_by_hand():
    scene = (Object("circle", "red", "small", 8, 8), Object("circle", "red", "small", 40, 8))
    captions = {1: "a small red circle at the bottom left, a large red circle and a small red circle"}
    score = score_objects(captions, {1: scene})
    names = ("object_precision", "object_recall", "exact_share", "places_share")
    assert score == dict(zip(names, (2 / 3, 1, 0, 0), strict=True))
    assert accuracy_of(score) == pytest.approx(0.8)
    nothing = score_objects({1: "hm"}, {1: scene})
    assert nothing == dict(zip(names, (None, 0, 0, None), strict=True)) and accuracy_of(nothing) == 0


def test_bleu_is_sacrebleus():
    """With as many references as an image has; one in common keeps a caption perfect."""
    score, signature = corpus_bleu(
        ["a red square on a table", "b c d e f"], [["x y", "a red square on a table"], ["b c d e f"]]
    )
    assert score == pytest.approx(100) and "tok:13a" in signature
    from sacrebleu import corpus_bleu as theirs

    captions, references = (
        ["a small cat sat on mats", "the dog ran away fast"],
        [["a cat sat on the mats"], ["dogs run"]],
    )
    assert corpus_bleu(captions, references)[0] == theirs(captions, [[r[0] for r in references]]).score
    assert "tok:zh" in corpus_bleu(["一个红色的方块"], [["一个红色的圆"]])[1]
    with pytest.raises(ValueError, match="at least one reference"):
        corpus_bleu(["a"], [[]])


# ---------------------------------------------------------------------------------------------- the drawn scenes


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return ensure_shapes(tmp_path_factory.mktemp("shapes"), ShapesSpec(8, 3, 3, 3, questions_per_scene=2), False)


def test_drawn_scenes_are_described(drawn):
    data = read_captions(drawn, "train")
    assert len({s.image_id for s in data.samples}) == data.report.images == 8
    assert len(data.samples) == data.report.kept == data.report.in_file >= 24
    for sample in data.samples:
        assert sample.question == "" and sample.question_type == sample.answer_type == CAPTION
        assert sample.answer in sample.answers and sample.image_path.is_file()
    assert len(read_captions(drawn, "train", max_images=2).samples) < len(data.samples)
    assert "kept" in str(data.report) and not data.report.skipped
    other = {s.image_id for s in read_captions(drawn, "test").samples}
    assert not other & {s.image_id for s in data.samples}


# ---------------------------------------------------------------------------------------------- captions files


def coco(folder, images=4, split="train2014", where=""):
    """A captions file with two captions an image, and its images. Returns the file's path and content."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    content = {"info": {}, "licenses": [], "images": [], "annotations": []}
    for i in range(1, images + 1):
        name = f"COCO_{split}_{i:012d}.jpg"
        Image.new("RGB", (9, 7), (20 * i, 0, 0)).save(folder / split / name)
        content["images"].append({"id": i, "file_name": name, "width": 9, "height": 7})
        content["annotations"] += [
            {"id": 10 * i + k, "image_id": i, "caption": f" Thing {i}\nseen {k}. "} for k in (0, 1)
        ]
    path = folder / where / f"captions_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path, content


@pytest.mark.parametrize("where", ["", "annotations"])
@pytest.mark.parametrize("split", ["train2014", "train2017", "train"])
def test_captions_files_are_found_and_read(tmp_path, where, split):
    coco(tmp_path, split=split, where=where)
    data = read_captions(tmp_path, "train")
    assert [s.answer for s in data.samples][:3] == ["Thing 1 seen 0.", "Thing 1 seen 1.", "Thing 2 seen 0."]
    assert data.samples[0].answers == ("Thing 1 seen 0.", "Thing 1 seen 1.")
    assert data.samples[0].image_path == tmp_path / split / f"COCO_{split}_000000000001.jpg"


def test_a_split_parts_images_not_captions(tmp_path):
    coco(tmp_path, images=40)
    parts = split_by_image(read_captions(tmp_path, "train").samples, (0.7, 0.3), 0)
    ids = [{s.image_id for s in part} for part in parts]
    assert ids[0] and ids[1] and not ids[0] & ids[1]
    assert all(sum(s.image_id == i for s in part) == 2 for part, some in zip(parts, ids, strict=True) for i in some)


def test_what_is_left_out_is_counted(tmp_path):
    path, content = coco(tmp_path)
    (tmp_path / "train2014" / "COCO_train2014_000000000001.jpg").unlink()
    content["annotations"] += [
        {"id": 20, "image_id": 2, "caption": "again"},
        {"id": 98, "image_id": 2, "caption": "  "},
        {"id": 99, "image_id": 77, "caption": "no such image"},
    ]
    path.write_text(json.dumps(content))
    data = read_captions(tmp_path, "train")
    assert {s.answers for s in data.samples if s.image_id == 2} == {("Thing 2 seen 0.", "Thing 2 seen 1.")}
    report = data.report
    assert report.skipped == {
        "the image is missing": 2,
        "the caption id occurred before": 1,
        "the caption is empty": 1,
        'the image is not listed under "images"': 1,
    }
    assert "left out 2: the image is missing (first: COCO_train2014_000000000001.jpg)" in str(report)
    limited = read_captions(tmp_path, "train", max_images=2)
    assert {s.image_id for s in limited.samples} == {2, 3} and limited.report.skipped["over max_images"] == 2


def test_no_caption_left_is_an_error(tmp_path):
    coco(tmp_path, images=1)
    (tmp_path / "train2014" / "COCO_train2014_000000000001.jpg").unlink()
    with pytest.raises(UserError, match=r"no caption of .*json is left: 2 because the image is missing"):
        read_captions(tmp_path, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("annotations"), r'has no list "annotations"'),
        (lambda c: c["annotations"][3].pop("caption"), r"annotations\[3\] has no 'caption'"),
        (lambda c: c["annotations"][2].update(caption=None), r"annotations\[2\]: 'caption' is None, not str"),
        (lambda c: c["annotations"].insert(1, "x"), r"annotations\[1\] is a str, not an object"),
        (lambda c: c["images"][1].update(id="1"), r"images\[1\]: 'id' is '1', not int"),
        (lambda c: c["images"][0].update(file_name="../x.jpg"), r"images\[0\]: 'file_name' is '../x.jpg'"),
        (lambda c: c["images"].append({"id": 1, "file_name": "y.jpg"}), r"images\[4\]: image 1 has two file names"),
    ],
)
def test_malformed_entries_are_named(tmp_path, change, message):
    path, content = coco(tmp_path)
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_captions(tmp_path, "train")


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(UserError, match=r"no captions of split val: .* captions_val2014.json or captions_val2017.json"):
        read_captions(tmp_path, "val")
    with pytest.raises(UserError, match="is not a folder"):
        read_captions(tmp_path / "no", "val")
    (tmp_path / "table.csv").write_text("image,caption\n")
    with pytest.raises(UserError, match="nor a captions file of COCO's layout"):
        check_captions(tmp_path / "table.csv", ["train"])
    (tmp_path / "captions_val2014.json").write_text('{"images": [')
    with pytest.raises(UserError, match="is not valid JSON"):
        read_captions(tmp_path, "val")
    (tmp_path / "scenes_test.json").write_text('{"1": {"objects": [{"shape": "circle"}], "about": {}}}')
    with pytest.raises(UserError, match="scene '1', object 0 has no 'color' and no 'size'"):
        read_captions(tmp_path, "test")


def test_images_of_the_official_files_are_read_as_they_are_stored(tmp_path):
    """Those of one's own captions are turned as a phone stored them."""
    official, _ = coco(tmp_path, images=1)
    assert not read_captions(tmp_path, "train").samples[0].upright
    official.rename(official.with_name("captions_train.json"))
    (tmp_path / "train2014").rename(tmp_path / "train")
    assert read_captions(tmp_path, "train").samples[0].upright
