"""A user's own data: tables of every kind, images found by any name, splits, scoring with few answers."""

import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image
from run_helpers import command

import train
from vqa_scratch.data import hashes
from vqa_scratch.data.captions import read_captions
from vqa_scratch.data.own import find_image
from vqa_scratch.data.vqa_v2 import VQASample, find_split, is_shared_out, read_vqa
from vqa_scratch.errors import UserError
from vqa_scratch.metrics import rule, soft_targets, vqa_accuracy
from vqa_scratch.systems.options import read_command_line


def picture(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path, format="PNG")
    return path


@pytest.fixture
def photos(tmp_path):
    for number in range(10):
        picture(tmp_path / f"{number}.png", (20 * number, 0, 0))
    return tmp_path


def table(folder, text, name="qa.csv", encoding="utf-8"):
    path = folder / name
    path.write_text(text, encoding=encoding)
    return path


HEAD = "image,question,answer\n"


def samples(path, split="all"):
    return read_vqa(path, split).samples


def test_a_csv_with_marks_commas_and_line_breaks(photos):
    text = '\ufeffimage,question,answer\n0.png,"what, then,\nis ""this""?",a red thing\n1.png,and this?,"yes, it is"\n'
    first, second = samples(table(photos, text))
    assert (first.question, first.answer) == ('what, then,\nis "this"?', "a red thing")
    assert (second.question, second.answers) == ("and this?", ("yes, it is",))
    assert first.image_path == photos / "0.png"


@pytest.mark.parametrize("name", ["qa.tsv", "qa.jsonl", "qa.json", "list.json"])
def test_the_same_rows_from_every_format(photos, name):
    rows = [
        {"Image Path": "0.png", "query": "what?", "label": "x"},
        {"Image Path": "1.png", "query": "who?", "label": 3},
    ]
    if name == "qa.tsv":
        text = "\n".join("\t".join(map(str, line)) for line in (rows[0], *(r.values() for r in rows)))
    elif name == "qa.jsonl":
        text = "\n\n".join(map(json.dumps, rows))
    else:
        text = json.dumps(rows if name == "list.json" else {"version": 1, "data": rows})
    read = samples(table(photos, text, name))
    assert [(s.question, s.answers) for s in read] == [("what?", ("x",)), ("who?", ("3",))]


def test_parquet_with_pictures_inside(photos, tmp_path, monkeypatch):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data = (photos / "3.png").read_bytes()
    column = [{"bytes": data, "path": "x.png"}, {"bytes": None, "path": "1.png"}]
    made = arrow.table({"image": column, "question": ["a?", "b?"], "answers": [["x", "y"], ["z"]]})
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    picture(folder / "data" / "1.png")
    parquet.write_table(made, folder / "data" / "train-00000-of-00001.parquet")
    first, second = read_vqa(folder, "train", cache=tmp_path / "cache").samples
    assert first.image_path.read_bytes() == data and first.image_path.parent == tmp_path / "cache" / "pictures"
    assert first.answers == ("x", "y") and second.image_path == folder / "data" / "1.png"


def test_several_answers_in_every_notation(photos):
    rows = [
        {"image": "0.png", "question": "a?", "answer": ["red", "dark red"]},
        {"image": "1.png", "question": "b?", "answer": "red|dark red"},
        {"image": "2.png", "question": "c?", "answer": '["red", "dark red"]'},
        {"image": "3.png", "question": "d?", "answer": [{"answer": "red"}, {"answer": "dark red"}]},
    ]
    read = samples(table(photos, json.dumps(rows), "qa.json"))
    assert {s.answers for s in read} == {("red", "dark red")}
    numbered = table(photos, "image,question,answer_1,answer_2\n0.png,a?,red,dark red\n", "numbered.csv")
    assert samples(numbered)[0].answers == ("red", "dark red")


@pytest.mark.parametrize("name", ["Ä b.JPG", "deep/er/x.webp", "42", "back\\slash.png"])
def test_images_are_found_by_any_name(tmp_path, name):
    spelled = {"42": "images/42.png", "back\\slash.png": "back/slash.png"}.get(name, name)
    made = picture(tmp_path / spelled)
    assert find_image(tmp_path, name) == made
    assert find_image(tmp_path, str(made)) == made


def test_umlauts_composed_or_not_are_the_same_name(tmp_path):
    made = picture(tmp_path / "a\u0308.png")
    assert find_image(tmp_path, "\u00e4.png") == made


@pytest.mark.parametrize("name", ["no.png", "x\0y.png", "x" * 5000])
def test_a_missing_image_is_counted(photos, name):
    read = read_vqa(table(photos, f'{HEAD}0.png,a?,x\n"{name}",b?,y\n'), "all")
    assert len(read.samples) == 1 and read.report.skipped["the image is missing"] == 1


def test_string_ids_go_through(photos):
    path = table(photos, "qid,image,question,answer\nq-7,0.png,a?,x\nq-8,0.png,b?,y\n")
    assert [s.question_id for s in samples(path)] == ["q-7", "q-8"]


def test_splits_by_a_column(photos):
    rows = "".join(f"{n}.png,q{n}?,x,{split}\n" for n, split in enumerate(["Train", "training", "dev", "test"]))
    path = table(photos, "image,question,answer,split\n" + rows)
    assert [len(samples(path, name)) for name in ("train", "val", "validation", "test", "all")] == [2, 1, 1, 1, 4]
    with pytest.raises(UserError, match="no rows of split holdout; it has test, train, val"):
        read_vqa(path, "holdout")


def test_splits_by_share_keep_images_apart_and_do_not_depend_on_the_order(photos):
    rows = [f"{n}.png,q{n} {k}?,x\n" for n in range(10) for k in range(3)]
    path, turned = table(photos, HEAD + "".join(rows)), table(photos, HEAD + "".join(rows[::-1]), "turned.csv")
    parts = {name: {s.image_id for s in samples(path, name)} for name in ("train", "val", "test")}
    assert [len(parts[name]) for name in ("train", "val", "test")] == [8, 1, 1]
    assert set.union(*parts.values()) == {f"{n}.png" for n in range(10)}
    assert parts == {name: {s.image_id for s in samples(turned, name)} for name in parts}


def test_a_folder_with_a_table_a_split(photos):
    for name in ("train", "validation"):
        table(photos, HEAD + f"0.png,{name}?,x\n", f"{name}.csv")
    assert samples(photos, "train")[0].question == "train?"
    assert samples(photos, "val")[0].question == "validation?"
    assert samples(photos, str(photos / "train.csv"))[0].question == "train?"
    with pytest.raises(UserError, match="holds no questions of split test"):
        read_vqa(photos, "test")


def test_the_layout_of_easy_vqa(tmp_path):
    for split in ("train", "test"):
        picture(tmp_path / split / "images" / "0.png")
        (tmp_path / split / "questions.json").write_text(json.dumps([["is it red?", "yes", 0]]))
    (sample,) = samples(tmp_path, "test")
    assert (sample.question, sample.answer) == ("is it red?", "yes")
    assert sample.image_path == tmp_path / "test" / "images" / "0.png"


def test_vqa_v2_under_other_names(tmp_path):
    question = {"question_id": "a", "image_id": 5, "question": "is it red?"}
    answer = {
        "question_id": "a",
        "image_id": 5,
        "question_type": "is",
        "answer_type": "yes/no",
        "answers": [{"answer": "yes"}],
    }
    (tmp_path / "vqa_train2017_questions.json").write_text(json.dumps({"questions": [question]}))
    (tmp_path / "vqa_train2017_annotations.json").write_text(json.dumps({"annotations": [answer]}))
    made = picture(tmp_path / "train2017" / "000000000005.png")
    (sample,) = samples(tmp_path, "train")
    assert sample.image_path == made and sample.question_id == "a" and not sample.upright


BAD = {
    "image,answer\n0.png,x\n": "call one question or query or prompt (its columns are image, answer)",
    "image,question,answer\n": "holds no rows",
    "image,question,answer\nhttps://a.b/c.png,a?,x\n": "line 2: the image is an address, https://a.b/c.png; download",
    "image,question,answer\n,a?,x\n": "line 2 has no image",
    "image,question,answer\n0.png,a?,x,y\n": "line 2 has 4 cells, the first line 3",
    'image,question,answer\n0.png,"a?,x\n': "is a double quote missing?",
    "image,image,question\n0.png,1.png,a?\n": "two columns are called 'image'",
    "image,question,answer\nno.png,a?,x\n": "1 because the image is missing (no.png)",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_tables_are_one_line(photos, text):
    with pytest.raises(UserError) as error:
        read_vqa(table(photos, text), "all")
    assert BAD[text] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [None, True, {"a": 1}, [1], "\ud800"])
def test_a_question_of_another_kind_is_one_line(photos, value):
    path = table(photos, json.dumps([{"image": "0.png", "question": value, "answer": "x"}]), "qa.json")
    with pytest.raises(UserError) as error:
        read_vqa(path, "all")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_two_images_cannot_make_three_splits(photos):
    with pytest.raises(UserError, match="has 2 images; train, val and test need one each"):
        read_vqa(table(photos, HEAD + "0.png,a?,x\n1.png,b?,y\n"), "train")


def test_few_answers_are_alternatives():
    assert vqa_accuracy("The Red", ["red"]) == 1.0 and vqa_accuracy("blue", ["red"]) == 0.0
    assert vqa_accuracy("two", ["2", "a pair"]) == vqa_accuracy("pair", ["2", "a pair"]) == 1.0
    assert vqa_accuracy("yes", ["yes", "yes", "no"]) == 1.0
    assert soft_targets(["yes"]) == {"yes": 1.0} and soft_targets(["a", "b"]) == {"a": 1.0, "b": 1.0}
    assert rule(10) == "official VQA accuracy" and rule(1) == "exact match after normalisation"


# ------------------------------------------------------------------------------------------------ training on it

COLOURS = ["red", "green", "blue", "white"]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """24 pictures of one colour each, two questions a picture with one answer each."""
    folder = tmp_path_factory.mktemp("own")
    rows = []
    for number in range(24):
        colour = COLOURS[number % 4]
        picture(folder / "pictures" / f"{number}.PNG", colour)
        rows += [
            f"pictures/{number}.PNG,what color is it?,{colour}",
            f"pictures/{number}.PNG,is it red?,{colour == 'red'}",
        ]
    (folder / "qa.csv").write_text(HEAD + "\n".join(rows) + "\n")
    return folder


def train_on(data, out, *flags):
    small = "--width 32 --heads 2 --image-layers 1 --decoder-layers 1 --questions-per-step 16 --device cpu"
    train.main(
        read_command_line(
            [
                *small.split(),
                "--precision",
                "fp32",
                "--data",
                str(data),
                "--out",
                str(out),
                "--cache",
                str(out.parent / "c"),
            ]
            + ["--warmup-steps", "2", "--samples", "2", *flags]
        )
    )
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def trained(own, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "own"
    return out, train_on(own / "qa.csv", out, "--steps", "60", "--learning-rate", "5e-3")


def test_a_table_is_learned_and_scored_by_exact_match(trained):
    _, summary = trained
    assert summary["scored_by"] == "exact match after normalisation" and summary["scored_split"] == "test"
    assert summary["accuracy"] > 0.9 and summary["accuracy_lenient"] == summary["accuracy"]


def test_evaluate_and_ask_take_the_same_table(own, trained, capsys):
    run, summary = trained
    command("evaluate", run, "--data", own / "qa.csv", "--split", "test")
    assert json.loads((run / "evaluation.json").read_text())["accuracy"] == summary["accuracy"]
    command("data", own, "--out", run.parent / "look.html")
    said = capsys.readouterr().out
    assert "24 images, 48 questions, 6 different answers" in said and "scored by     exact match" in said
    assert "what color is it?" in (run.parent / "look.html").read_text()


def test_a_run_starts_from_another(own, trained, tmp_path):
    """One step at a tiny learning rate: what it knows comes from the first run, sizes and tokenizers too."""
    first, _ = trained
    flags = ["--steps", "1", "--learning-rate", "1e-9", "--matrix-learning-rate", "1e-9", "--weight-decay", "0"]
    start = ["--data", str(own / "qa.csv"), "--device", "cpu", "--precision", "fp32", "--cache", str(tmp_path / "c")]
    options = [*start, "--start-from", str(first), "--out", str(tmp_path / "second"), "--samples", "1", *flags]
    train.main(read_command_line(options))
    assert json.loads((tmp_path / "second" / "summary.json").read_text())["accuracy"] > 0.9
    assert (tmp_path / "second" / "decoder_tokenizer" / "tokenizer.json").read_bytes() == (
        first / "decoder_tokenizer" / "tokenizer.json"
    ).read_bytes()
    with pytest.raises(UserError, match="--width"):
        read_command_line([*options, "--width", "64"])
    with pytest.raises(UserError, match="is a run of shapes; it should be one of --preset book"):
        book = ["--preset", "book", *start, "--start-from", str(first), "--out", str(tmp_path / "third")]
        train.main(read_command_line(book))


def test_a_run_that_starts_from_one_with_a_text_encoder_has_it_too(own, tmp_path):
    """What the question is read by, and what of it is learned, comes with the sizes."""
    first, second = tmp_path / "first", tmp_path / "second"
    train_on(own / "qa.csv", first, "--steps", "1", "--text-encoder", "--no-question-loss")
    start = ["--data", str(own / "qa.csv"), "--device", "cpu", "--precision", "fp32", "--cache", str(tmp_path / "c")]
    flags = [*start, "--start-from", str(first), "--steps", "1", "--samples", "1"]
    train.main(read_command_line([*flags, "--out", str(second)]))
    kept = json.loads((second / "config.json").read_text())["train"]
    assert kept["text_encoder"] is True and kept["question_loss"] is False and (second / "text_tokenizer").is_dir()
    with pytest.raises(UserError, match="--question-loss means nothing with --start-from"):
        read_command_line([*flags, "--question-loss", "--out", str(tmp_path / "third")])


def test_a_test_table_without_answers_is_answered(own, tmp_path):
    (own / "unknown.csv").write_text("id,image,question\nx-1,pictures/0.PNG,what color is it?\n")
    summary = train_on(own / "qa.csv", tmp_path / "run", "--steps", "1", "--test-split", str(own / "unknown.csv"))
    (answer,) = json.loads((tmp_path / "run" / "submission.json").read_text())
    assert answer["question_id"] == "x-1" and summary["scored_split"] == "val"
    (own / "unknown.csv").unlink()


def test_where_a_split_is_has_one_answer(photos):
    """A stray table beside files of splits shares nothing out: the splits are where they are read from."""
    table(photos, "".join([HEAD, *(f"{n}.png,what?,a\n" for n in range(10))]), "questions.csv")
    assert is_shared_out(photos) and is_shared_out(photos / "questions.csv")
    (photos / "data").mkdir()
    (photos / "data" / "train-00000-of-00001.parquet").touch()
    assert find_split(photos, "train") == ([photos / "data" / "train-00000-of-00001.parquet"], "all")
    assert not is_shared_out(photos)
    split = table(photos, "image,question,answer,split\n0.png,what?,a,train\n", "split.csv")
    assert not is_shared_out(split) and not is_shared_out(photos / "data" / "none")


def test_captions_in_one_file_are_shared_out(tmp_path):
    images = [{"id": n, "file_name": f"{n}.png"} for n in range(10)]
    texts = [{"id": n, "image_id": n, "caption": f"number {n}"} for n in range(10)]
    (tmp_path / "mine.json").write_text(json.dumps({"images": images, "annotations": texts}))
    for n in range(10):
        picture(tmp_path / f"{n}.png")
    parts = [read_captions(tmp_path / "mine.json", name).samples for name in ("train", "val", "test")]
    assert [len(part) for part in parts] == [8, 1, 1] and len({s.image_id for part in parts for s in part}) == 10


def test_the_hash_of_data_is_that_of_its_facts_one_after_the_other(monkeypatch):
    """In whatever blocks they are hashed: a run of an older version is resumed by the same hash."""
    monkeypatch.setattr(hashes, "BLOCK", 2)
    rows = [(number, "what color?", ("red", "blue\udc80")) for number in range(5)]
    whole = "".join(map(repr, rows)).encode("utf-8", "backslashreplace")
    kept = {"samples": 5, "hash": hashlib.blake2b(whole, digest_size=12).hexdigest()}
    assert hashes.hashes_of({"train": rows, "val": []}) == {
        "train": kept,
        "val": {"samples": 0, "hash": hashlib.blake2b(digest_size=12).hexdigest()},
    }


def test_images_of_one_name_in_two_folders_are_two_images():
    """Folders may be moved, so they are not hashed; but which of two images a question is about is."""

    def hashed(*folders: str) -> dict:
        samples = [
            VQASample(i, Path(folder) / "a.png", i, "what color?", "", "", ("red",), "red")
            for i, folder in enumerate(folders)
        ]
        return hashes.hashes_of({"train": hashes.facts(samples)})

    assert hashed("x", "y") == hashed("moved", "too") != hashed("x", "x")
