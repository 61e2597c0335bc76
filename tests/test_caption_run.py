"""`--preset caption` from the first line to the exported folder, on a tiny budget; and what its batches are made of."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_helpers import command
from vqa_helpers import CPU

import train
from vqa_scratch import systems
from vqa_scratch.data.answers import Answer
from vqa_scratch.data.augment import Augment, depends_on_side
from vqa_scratch.data.batches import IGNORE
from vqa_scratch.data.captions import read_captions
from vqa_scratch.data.text import train_bpe
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.models import GPT2, GPT2Config, ResNet, ResNetConfig
from vqa_scratch.report.lettering import choose
from vqa_scratch.systems.caption import CaptionSystem
from vqa_scratch.systems.captions import caption_cards, to_describe
from vqa_scratch.systems.options import CaptionOptions
from vqa_scratch.systems.presets import AUGMENTED
from vqa_scratch.training.precision import Precision
from vqa_scratch.training.ranks import World

SMALL = {
    "preset": "caption", "width": 32, "heads": 2, "decoder_layers": 1, "image_width": 16, "captions_per_step": 16,
    "captions_per_image": 4, "question_share": 0.4, "questions_per_step": 32, "warmup_steps": 2, "log_every": 1,
    "eval_every": 4, "eval_captions": 6, "eval_questions": 16, "samples": 5, "max_caption_tokens": 48, "device": "cpu",
    "precision": "fp32", "image_cache": False, **AUGMENTED,
}  # fmt: skip


def small(data: Path | None, out: Path, **changes) -> CaptionOptions:
    values = SMALL | {"data": data, "out": out, "cache": out.parent, "steps": 4} | changes
    return CaptionOptions(**values)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train.main(small(data, out, steps=8)) is None
    return out


@pytest.fixture
def system(data, tmp_path) -> CaptionSystem:
    options = small(data, tmp_path / "run")
    texts = CaptionSystem.read(options)
    system = CaptionSystem.build(options, texts, Precision("fp32", CPU))
    system.train_on(texts)
    return system


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


# ---------------------------------------------------------------------------------------------- a run


def test_the_final_figures_can_be_those_of_some_images(data, tmp_path):
    some = CaptionSystem.read(small(data, tmp_path / "run", test_images=3)).samples["test"]
    whole = CaptionSystem.read(small(data, tmp_path / "run")).samples["test"]
    assert to_describe(some) == to_describe(whole)[:3]
    shown = {s.image_id for s in to_describe(some)}
    asked = [s for s in some if s.question]
    assert asked == [s for s in whole if s.question and s.image_id in shown] and len(asked) > 3


def test_the_run_folder_is_complete(run):
    expected = (
        "config.json model.safetensors metrics.jsonl summary.json curves.png results.png samples.html checkpoints"
    )
    assert {p.name for p in run.iterdir()} == {*expected.split(), "decoder_tokenizer", "preprocessor_config.json"}
    for picture in ("curves.png", "results.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")


def test_the_summary_has_its_keys(run):
    summary = summary_of(run)
    figures = {"object_precision", "object_recall", "exact_share", "places_share", "bleu", "bleu_signature"}
    assert figures | {"accuracy", "eos_rate", "mean_caption_tokens", "texts_seen", "steps"} <= summary.keys()
    assert summary["baselines"].keys() == {"shuffled_images", "other_references"}
    assert all(baseline.keys() == figures for baseline in summary["baselines"].values())
    assert summary["holdout"].keys() == figures and summary["steps"] == 8
    assert summary["answers"]["baselines"].keys() == {"prior", "question_only", "shuffled_images"}


def test_the_loss_falls(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] and len(losses) == 8
    assert all({"loss", "accuracy", "bleu", "answer_accuracy"} <= row["val"].keys() for row in rows if "val" in row)


def test_the_page_shows_captions_beside_references(run, data):
    page = (run / "samples.html").read_text()
    assert page.count("data:image/png;base64,") == page.count("<article>") >= 5
    assert "<h2>captions</h2>" in page and page.count("<br>") >= 5 and "http" not in page
    assert any(s.answer in page for s in read_captions(data, "test").samples)


def test_texts_are_escaped(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    sample = VQASample(1, tmp_path / "x.png", 1, "", "caption", "caption", ("<b>&", "<i>"), "<b>&")
    (card,) = caption_cards([sample], {1: Answer("<script>", 1.0, 3, True)}, None)
    assert "&lt;script&gt;" in card and "&lt;b&gt;&amp;<br>&lt;i&gt;" in card and "<script>" not in card


# ---------------------------------------------------------------------------------------------- batches


def test_prompts_and_padding_carry_no_loss(system):
    """A caption starts at once; a question stands before BOS without a label; every text ends with EOS."""
    words, samples = system.tokenizers.decoder, system.splits["train"].questions.samples
    bos, eos = words.bos_id, words.eos_id
    kinds = set()
    for key in system.epoch(0):
        batch = system.splits["train"].questions.batch(key.rows, system.splits["train"].images)
        assert batch.question is None and batch.attention_mask is None
        for row, ids, labels in zip(key.rows, batch.decoder_input_ids, batch.labels, strict=True):
            sample = samples[row]
            start = ids.tolist().index(bos)
            prompt = words.decode(ids[:start]).strip()
            asked = labels[labels != IGNORE]
            assert prompt == sample.question and (labels[:start] == IGNORE).all() and labels[start] != IGNORE
            assert words.decode(asked).strip() == sample.answer and asked[-1] == eos
            kinds.add(bool(sample.question))
    assert kinds == {True, False}


def test_a_step_is_of_one_kind_and_every_caption_comes_once(system):
    captions = sum(not sample.question for sample in system.data.samples["train"])
    seen = []
    for key in system.epoch(3):
        kinds = {row < captions for row in key.rows.tolist()}
        assert len(kinds) == 1
        seen += [row for row in key.rows.tolist() if row < captions]
    assert sorted(seen) == list(range(captions))
    shares = [all(key.rows >= captions) for key in system.epoch(3)]
    assert sum(shares) == round(sum(not s for s in shares) * 0.4 / 0.6)


def test_questions_go_on_where_they_stopped(system):
    """Over consecutive epochs every question comes before any comes again."""
    captions = sum(not sample.question for sample in system.data.samples["train"])
    epochs = len(system._question_batches(0))  # so many epochs are a whole number of turns through the questions
    rows = np.concatenate([key.rows for n in range(epochs) for key in system.epoch(n) if key.rows[0] >= captions])
    counts = np.bincount(rows - captions)
    assert counts.min() == counts.max() == len(rows) / len(counts) > 1


def test_training_images_change_and_others_do_not(system):
    key = system.epoch(0)[0]
    plain = system.splits["train"].questions.batch(key.rows, system.splits["train"].images).images
    changed = system.batch(key).images
    assert changed.dtype == torch.uint8 and not torch.equal(plain, changed)
    assert torch.equal(changed, system.batch(key).images), "a function of the key"
    seen = []
    system.augment = lambda *args: seen.append(args)
    system.evaluate()
    assert not seen, "evaluation never augments"


def test_ranks_share_the_images_of_a_batch(system):
    """Put together, the shares of three ranks are the batch, changed images included; ranks too many weigh nothing."""
    key = system.epoch(0)[0]
    whole = system.batch(key)
    shares = [system.share(key, World(rank, 3)) for rank in range(3)]
    assert all(real for _, real in shares)
    parts = [system.batch(share) for share, _ in shares]
    assert torch.equal(torch.cat([p.images for p in parts]), whole.images)
    assert torch.equal(torch.cat([p.rows for p in parts]), whole.rows)
    many = [system.share(key, World(rank, 99)) for rank in range(99)]
    assert sum(real for _, real in many) == len(whole.images)
    assert all(len(system.batch(share).images) == 1 for share, _ in many)


def test_images_with_a_side_word_are_never_mirrored(system, monkeypatch):
    asked, samples = [], system.splits["train"].questions.samples
    monkeypatch.setattr(Augment, "__call__", lambda _, pixels, may_flip, chance: asked.append(may_flip) or pixels)
    both = set()
    for key in system.epoch(0):
        batch = system.batch(key)
        for image, may in enumerate(asked[-1].tolist()):
            texts = [samples[row] for row in key.rows[(batch.image_index == image).numpy()]]
            assert may == (not any(depends_on_side(f"{s.question} {s.answer}") for s in texts))
            both.add(may)
    assert both == {True, False}


# ---------------------------------------------------------------------------------------------- commands


def test_ask_describes_or_answers(run, data, capsys):
    image = next((data / "val2014").glob("*.png"))
    command("ask", run, "--image", image, "--device", "cpu")
    command("ask", run, "--image", image, "--question", "is there a red circle?", "--device", "cpu")
    assert capsys.readouterr().out.count("(probability ") == 2
    with pytest.raises(UserError, match="leave out --top"):
        command("ask", run, "--image", image, "--top", "3", "--device", "cpu")
    with pytest.raises(UserError, match="not found"):
        command("ask", run, "--image", f"{image}x", "--device", "cpu")


@pytest.mark.parametrize("size", [(1, 40), (50, 1), (1, 1)])
def test_thin_images_are_described(run, tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "thin.png")
    said, notes = systems.load(run, CPU).ask(tmp_path / "thin.png", None)
    assert len(said) == 1 and notes == []


def test_evaluate_gives_the_figures_of_the_run(run, data, capsys):
    """The same split scored again from the folder: the same figures, key by key."""
    command("evaluate", run, "--data", data, "--split", "test", "--captions", "--device", "cpu")
    again, summary = json.loads((run / "evaluation.json").read_text()), summary_of(run)
    assert again["images"] == 6
    for name in ("accuracy", "object_precision", "object_recall", "bleu", "baselines", "eos_rate"):
        assert again[name] == pytest.approx(summary[name]) if name != "baselines" else again[name] == summary[name]
    assert "object recall" in capsys.readouterr().out
    command("evaluate", run, "--data", data, "--split", "test", "--device", "cpu")
    answers = json.loads((run / "evaluation.json").read_text())
    assert answers["accuracy"] == pytest.approx(summary["answers"]["accuracy"])


def test_the_exported_folder_says_what_the_run_says(run, data, tmp_path, capsys, monkeypatch):
    """Its README's program, run as it stands (with the decoder of `transformers`), gives the caption of `ask`."""
    command("export", run, tmp_path / "out")
    image = next((data / "val2014").glob("*.png"))
    monkeypatch.chdir(tmp_path / "out")
    Image.open(image).save("picture.png")
    capsys.readouterr()
    program = re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.S)[1]
    exec(compile(program, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip() == systems.load(run, CPU).ask(image, None)[0][0].text


# ---------------------------------------------------------------------------------------------- other data, bad input


def coco(folder: Path, captions: tuple[str, ...] = ("a cat $5", "一只猫在桌子上")) -> Path:
    for split in ("train2014", "val2014"):
        (folder / split).mkdir(parents=True)
        content = {"images": [], "annotations": []}
        for i in range(1, 13):
            Image.new("RGB", (30, 20), (20 * i, 0, 0)).save(folder / split / f"{i}.png")
            content["images"].append({"id": i, "file_name": f"{i}.png"})
            content["annotations"] += [
                {"id": 10 * i + k, "image_id": i, "caption": f"{caption} {i}"} for k, caption in enumerate(captions)
            ]
        (folder / f"captions_{split}.json").write_text(json.dumps(content))
    return folder


def test_a_captions_file_trains_too(tmp_path, capsys):
    """No scenes: BLEU picks the checkpoint; characters without a font are said, not drawn as boxes."""
    changes = {"test_split": "val", "val_split": "auto", "val_fraction": 0.3, "question_share": 0.0}
    train.main(small(coco(tmp_path / "coco"), tmp_path / "run", **changes))
    summary = summary_of(tmp_path / "run")
    assert "object_recall" not in summary and summary["accuracy"] == summary["bleu"] / 100
    assert "tok:zh" in summary["bleu_signature"] and summary["holdout"] is None and summary["answers"] is None
    if choose(["猫"]).missing:
        assert re.search(r"note: no installed font has \d+ of the characters", capsys.readouterr().out)


def test_released_towers_train(tmp_path):
    """The preset coco: a ResNet file of torchvision's layout and a GPT-2 folder, here of small sizes."""
    from torchvision.models.resnet import BasicBlock
    from torchvision.models.resnet import ResNet as Theirs

    folder, weights = tmp_path / "gpt2", tmp_path / "resnet.pth"
    tokenizer = train_bpe([" a cat"], 300)
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    GPT2(GPT2Config(vocab_size=300, max_positions=64, dim=32, layers=1, heads=2, **ids)).save_pretrained(folder)
    tokenizer.save(folder)
    state = dict(Theirs(BasicBlock, [1, 1, 1, 1]).state_dict())
    torch.save(state, weights)
    towers = {"init": "pretrained", "image_model": weights, "decoder_model": str(folder), "steps": 1, "eval_every": 1}
    rest = {"val_split": "auto", "val_fraction": 0.3, "test_split": "val", "question_share": 0.0, "samples": 1}
    size = {"captions_per_step": 4, "captions_per_image": 2, "max_caption_tokens": 4, "eval_captions": 2}
    out = tmp_path / "run"
    train.main(small(coco(tmp_path / "coco"), out, preset="coco", **towers, **rest, **size))
    with pytest.raises(UserError, match="--max-caption-tokens 65 is more than the 64 positions of"):
        train.main(
            small(tmp_path / "coco", out / "2", preset="coco", **towers, **rest | size | {"max_caption_tokens": 65})
        )
    model = systems.load(out, CPU).model
    assert model.connector.grid == (7, 7) and torch.equal(model.image.norm1.running_var, state["bn1.running_var"])
    command("export", out, tmp_path / "out")
    assert isinstance(ResNet.from_pretrained(tmp_path / "out" / "image" / "model.safetensors").config, ResNetConfig)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"flip": 1.5}, "--flip must be at least 0 and at most 1, not 1.5"),
        ({"rotate": -1.0}, "--rotate must be at least 0 and at most 180, not -1.0"),
        ({"question_share": 1.0}, "--question-share must be at least 0 and below 1, not 1.0"),
        ({"captions_per_step": 0}, "--captions-per-step must be at least 1, not 0"),
        ({"init": "pretrained"}, "--init pretrained needs --image-model"),
        ({"preset": "coco"}, "--preset coco needs --data"),
    ],
)
def test_options_that_cannot_be_are_one_line(data, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        small(None if flags.get("preset") == "coco" else data, tmp_path, **flags)


def test_other_systems_say_what_they_are_not(run, data, tmp_path):
    """Questions without training on them, and a flag of another system."""
    train.main(small(data, tmp_path / "run", question_share=0.0, steps=1, eval_every=1, samples=1))
    opened = systems.load(tmp_path / "run", CPU)
    with pytest.raises(UserError, match="was trained to describe images alone"):
        opened.ask(next((data / "val2014").glob("*.png")), "what color is it?")
    with pytest.raises(UserError, match="--connector means nothing here: it is a flag of --preset shapes"):
        train.read_command_line(["--preset", "caption", "--connector", "mean"])
