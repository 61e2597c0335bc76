"""`train.py --preset vilt` from its first line to summary.json, and the commands on what it leaves."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from run_helpers import command
from vqa_helpers import CPU

import train
from vqa_scratch import systems
from vqa_scratch.data.scenes import FAMILIES
from vqa_scratch.data.text import train_wordpiece
from vqa_scratch.errors import UserError

SIZES = "--width 32 --heads 2 --layers 1 --warmup-steps 4 --eval-questions 40 --log-every 1 --samples 8 --device cpu"
SIZES += " --precision fp32 --questions-per-step 32 --min-answer-count 2"


def flags(data: Path, out: Path, *more: str, preset: str = "vilt", sizes: str = SIZES) -> list[str]:
    where = ["--data", str(data), "--cache", str(out.parent / "cache"), "--out", str(out), "--preset", preset]
    return [*where, *sizes.split(), "--no-image-cache", *more]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train.main(train.read_command_line(flags(data, out, "--steps", "60", "--eval-every", "30"))) is None
    return out


def picture(data: Path) -> Path:
    return sorted(data.glob("val2014/*.png"))[0]


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_falls_and_the_summary_tells(run):
    losses = [row["loss"] for row in rows(run) if "loss" in row]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:3])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["accuracy_by_family"].keys() == FAMILIES.keys()
    assert summary["classification_accuracy"] == summary["accuracy"] and 20 < summary["answers"] < 40
    assert set(summary["baselines"]) == {"prior", "question_only", "shuffled_images"}
    assert summary["questions_seen"] == rows(run)[-1]["samples"] and 0 <= summary["holdout_accuracy"] <= 1


def test_the_labels_are_sorted_and_saved(run, data):
    names = json.loads((run / "config.json").read_text())["model"]["id2label"]
    labels = [names[str(i)] for i in range(len(names))]
    assert labels == sorted(set(labels)) and {"yes", "no", "2"} <= set(labels)
    assert systems.load(run, CPU).model.labels == tuple(labels)
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "samples.html").read_text().count("<article>") == len(FAMILIES)


def test_ask_gives_the_best_answers_with_scores(run, data, capsys):
    command("ask", run, "--image", picture(data), "--question", "is there a red circle?", "--top", "3")
    lines = capsys.readouterr().out.splitlines()
    scores = [float(line.split("probability ")[1].rstrip(")")) for line in lines]
    assert len(lines) == 3 and scores == sorted(scores, reverse=True)
    command("ask", run, "--image", picture(data), "--question", "is there a red circle?")
    assert capsys.readouterr().out.splitlines() == lines[:1]


def test_ask_refuses(run, data, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)  # closed: no prompt
    with pytest.raises(UserError, match="give it --question"):
        command("ask", run, "--image", picture(data))
    with pytest.raises(UserError, match="the question is empty"):
        command("ask", run, "--image", picture(data), "--question", " ")
    with pytest.raises(UserError, match="--top 9999 is more than the"):
        command("ask", run, "--image", picture(data), "--question", "what?", "--top", "9999")


@pytest.mark.parametrize("size", [(1, 64), (64, 1), (10, 500), (1, 1)])
def test_ask_about_thin_images(run, tmp_path, size, capsys):
    Image.new("RGB", size, "red").save(tmp_path / "thin.png")
    command("ask", run, "--image", tmp_path / "thin.png", "--question", "what color is it?")
    assert "probability" in capsys.readouterr().out


def test_evaluate_scores_as_the_summary_does(run, data, capsys):
    command("evaluate", run, "--data", data, "--split", "test")
    figures = json.loads((run / "evaluation.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert figures["accuracy"] == pytest.approx(summary["accuracy"])
    assert figures["baselines"]["shuffled_images"] == pytest.approx(summary["baselines"]["shuffled_images"])
    assert "eos_rate" not in figures and "blind baselines" in capsys.readouterr().out


def test_export_a_linear_stem(data, tmp_path, capsys):
    """The reference loads it and answers alike."""
    out = tmp_path / "run"
    train.main(train.read_command_line(flags(data, out, "--steps", "1", "--stem", "linear")))
    command("export", out, tmp_path / "out")
    assert "note" not in capsys.readouterr().err
    theirs = hf.ViltForQuestionAnswering.from_pretrained(tmp_path / "out").eval()
    ours = systems.load(out, CPU)
    assert tuple(theirs.config.id2label[i] for i in range(len(ours.model.labels))) == ours.model.labels
    pixels = torch.rand(2, 3, 64, 64)
    ids = torch.tensor(ours.tokenizers.question("is there a red circle?"))[None].repeat(2, 1)
    with torch.no_grad():
        wanted = theirs(input_ids=ids, pixel_values=pixels).logits
        torch.testing.assert_close(ours.model(pixels, ids), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stem", ["conv", "linear"])
def test_the_exported_page_runs(run, data, tmp_path, stem, capsys, monkeypatch):
    """The code in README.md says what `ask` says."""
    out = run
    if stem == "linear":
        out = tmp_path / "run"
        train.main(train.read_command_line(flags(data, out, "--steps", "1", "--stem", "linear")))
    command("export", out, tmp_path / "out")
    notes = capsys.readouterr().err
    assert ("convolutional stem" in notes) == (stem == "conv")
    monkeypatch.chdir(tmp_path / "out")
    Image.open(picture(data)).save("picture.png")
    code = Path("README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    command("ask", out, "--image", "picture.png", "--question", "what color is the square?", "--top", "3")
    asked = capsys.readouterr().out.splitlines()
    assert [line.split("(")[0].strip() for line in asked] == [line[:20].strip() for line in said]


# ---------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, data) -> Path:
    """A tiny ViLT for masked words in the released layout, with tokenizer and preprocessing."""
    folder = tmp_path_factory.mktemp("checkpoint")
    words = train_wordpiece(["is there a red circle?", "what color is the square?"], 100)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = hf.ViltConfig(vocab_size=len(words), image_size=64, patch_size=32, **sizes)
    hf.ViltForMaskedLM(config).save_pretrained(folder)
    words.save(folder)
    processor = {"feature_extractor_type": "ViltFeatureExtractor", "size": 64, "size_divisor": 32, "resample": 3}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True, "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


B32 = (
    "--eval-questions 20 --log-every 1 --samples 8 --device cpu --precision fp32 --questions-per-step 32 --accumulate 2"
)
B32 += " --min-answer-count 2 --steps 2 --test-split test --val-split val"


def test_a_checkpoint_is_tuned_on_images_of_many_sizes(data, checkpoint, tmp_path, capsys):
    """Its own preprocessing, padded batches, accumulation; the run folder opens and exports in the released layout."""
    shutil.copytree(data, tmp_path / "data")
    for i, path in enumerate(sorted((tmp_path / "data").rglob("*.png"))):
        Image.open(path).resize([(64, 64), (120, 64), (60, 100)][i % 3]).save(path)
    out = tmp_path / "run"
    argv = flags(tmp_path / "data", out, "--model", str(checkpoint), preset="vilt-b32", sizes=B32)
    assert train.main(train.read_command_line(argv)) is None
    command("ask", out, "--image", picture(tmp_path / "data"), "--question", "is there a red circle?", "--top", "2")
    command("export", out, tmp_path / "out")
    theirs = hf.ViltForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert len(theirs.config.id2label) == len(systems.load(out, CPU).model.labels)
    before = hf.ViltForMaskedLM.from_pretrained(checkpoint).vilt.embeddings.text_embeddings.word_embeddings.weight
    after = theirs.vilt.embeddings.text_embeddings.word_embeddings.weight
    assert 0 < (before - after).abs().max() < 1e-3, "it begins at the checkpoint's weights"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--width 64", "--width means nothing with --model .*: it goes without --model$"),
        ("--max-question-tokens 60", "--max-question-tokens 60 is more than the 40 positions"),
        ("--image-cache", "give --no-image-cache"),
        ("--connector mean", "--connector means nothing here: it is a flag of --preset shapes"),
        ("--decoder-layers 2", "--decoder-layers means nothing here"),
        ("--min-answer-count 9999", "the most frequent one is to .*--min-answer-count"),
    ],
)
def test_what_cannot_be_asked_for(data, checkpoint, tmp_path, more, message):
    argv = flags(data, tmp_path / "run", "--model", str(checkpoint), preset="vilt-b32", sizes=B32)
    argv = [*argv, *more.split()] if "cache" not in more else [*(a for a in argv if a != "--no-image-cache"), more]
    with pytest.raises(UserError, match=message):
        train.main(train.read_command_line(argv))


def test_b32_needs_data():
    with pytest.raises(UserError, match="--preset vilt-b32 needs --data"):
        train.read_command_line(["--preset", "vilt-b32"])
