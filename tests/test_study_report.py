"""The study of one answer from the command line: the page, the files beside it, and one line for every bad input."""

import base64
import json
import re
from types import SimpleNamespace

import browser
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, safe_open
from study_helpers import SUBJECTS, spread, tiny_sparse_subject, tiny_t5

from vqa_scratch.__main__ import PROGRAM
from vqa_scratch.commands.line import call
from vqa_scratch.commands.study_files import write_study
from vqa_scratch.data.text import train_wordpiece
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.nn.states import Places
from vqa_scratch.study.opened import Opened, chosen
from vqa_scratch.study.overlay import overlay
from vqa_scratch.study.record import take_apart
from vqa_scratch.study.report import packed
from vqa_scratch.systems.base import RunData
from vqa_scratch.systems.options import VQAOptions
from vqa_scratch.systems.run_folder import WEIGHTS, save_weights
from vqa_scratch.systems.vqa import VQASystem
from vqa_scratch.training.precision import Precision

SCRIPT = "<script>alert(1)</script> & {{DATA}}"


def study(*arguments):
    call(PROGRAM, ["study", *map(str, arguments)], "python -m vqa_scratch")


def tiny_run(folder, connector="tokens"):
    words = ("what color is the circle?", "is there a red square?", "how many large objects are there?")
    samples = [VQASample(1, folder, i, q, "what", "other", ("red",) * 10, "red") for i, q in enumerate(words)]
    options = VQAOptions(
        out=folder, width=16, heads=2, image_layers=2, text_layers=1, decoder_layers=2, patch_size=16,
        max_answer_tokens=3, connector=connector,
    )  # fmt: skip
    data = RunData({"train": samples}, lambda sample: "all")
    system = VQASystem.build(options, data, Precision("fp32", torch.device("cpu")))
    system.save(folder)
    save_weights(folder / WEIGHTS, spread(system.model, 0.15))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs, a T5 and an image, studied once each."""
    root = tmp_path_factory.mktemp("study")
    tiny_run(root / "run")
    tiny_run(root / "mean", "mean")
    text = "the museum cut the night trains because of rising costs ."
    tokenizer = train_wordpiece([text], 64)
    tokenizer.save(root / "rlhf" / "policy")
    tiny_t5(len(tokenizer)).save_pretrained(root / "rlhf" / "policy")
    (root / "rlhf" / "config.json").write_text(json.dumps({"prefix": "", "max_new_tokens": 4}))
    (root / "article.txt").write_text(text, encoding="utf-8")
    pixels = np.full((64, 64, 3), 240, np.uint8)
    pixels[16:32, 32:48] = (200, 30, 30)
    Image.fromarray(pixels).save(root / "scene.png")
    one = ("--image", root / "scene.png", "--question", "what color is the circle?")
    study(root / "run", *one, "--out", root / "out")
    study(root / "run", "--image", root / "scene.png", "--question", SCRIPT, "--out", root / "escaped")
    study(root / "run", *one, "--compare", root / "mean", "--out", root / "compared")
    study(root / "rlhf", "--text", root / "article.txt", "--out", root / "text")
    return SimpleNamespace(root=root, one=one)


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["out", "escaped", "compared", "text"])
def test_the_page_is_whole_small_and_asks_no_network(made, name):
    page = (made.root / name / "report.html").read_text(encoding="utf-8")
    assert len(page) < 600_000
    assert not re.search(r"https?:|(src|href)=.//", page)
    assert not re.search(r"\b(fetch|XMLHttpRequest|import)\b", page)
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert len(data_of(page)) == (2 if name == "compared" else 1)


def test_markup_in_a_question_is_text(made):
    page = (made.root / "escaped" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert data_of(page)[0]["text"] == SCRIPT
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; {{DATA}}" in page


def test_the_summary_has_answer_certificate_and_heads(made):
    for name in ("out", "text"):
        summary = json.loads((made.root / name / "summary.json").read_text())
        assert {"answer", "probability", "tokens", "certificate", "heads"} <= set(summary)
        certificate = summary["certificate"]
        assert max(certificate[k] for k in ("mass", "output", "softmax")) <= 1e-5
        assert certificate["rows"] > 0 and summary["heads"][0].keys() >= {"entropy", "image", "text", "sink"}
    compared = json.loads((made.root / "compared" / "summary.json").read_text())
    assert compared["compared"]["run"].endswith("mean")


def test_weights_follow_from_the_trace_file(made):
    path = made.root / "out" / "trace.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    names = {name.rpartition(".")[0] for name in tensors if name.endswith(".lse")}
    assert {"decoder.0.cross", "decoder.1.self", "image.1.self", "text.0.self"} <= names
    for name in names:
        q, k, v, mask, z, lse = (tensors[f"{name}.{label}"] for label in ("q", "k", "v", "mask", "z", "lse"))
        pattern = (float(metadata[f"{name}.scale"]) * q @ k.mT + mask - lse[..., None]).exp()
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(lse), atol=1e-5, rtol=0)
        torch.testing.assert_close(pattern @ v, z, atol=1e-5, rtol=0)
    assert {"relevancy.sources", "rollout.decoder", "cross.sources"} <= set(tensors)


def test_overlays_are_pictures_of_every_word(made):
    summary = json.loads((made.root / "out" / "summary.json").read_text())
    for method in ("cross", "rollout", "relevancy"):
        with Image.open(made.root / "out" / f"overlay_{method}.png") as sheet:
            assert sheet.height == 448 and sheet.width % 456 == 448
            assert sheet.width // 448 >= min(2, len(summary["tokens"]))
    assert not list((made.root / "text").glob("*.png"))


def test_an_overlay_colours_the_patch_it_means():
    image = Image.new("RGB", (32, 32), (255, 255, 255))
    drawn = np.asarray(overlay(image, torch.tensor([0.0, 1.0, 0.0, 0.0]), Places((2, 2), 8.0, 16), size=64))
    assert (drawn[:32, :32] == 255).all() and (drawn[32:] == 255).all()
    assert drawn[5, 60, 1] < 80  # full colour is a deep red
    even = np.asarray(overlay(image, torch.ones(4), Places((2, 2), 8.0, 16), size=64))
    assert even[5, 5, 1] > 150  # an even map is pale, not all at full colour


def test_an_overlay_is_drawn_around_the_centres():
    """Tokens of a convolutional stem look at the corners of their patches: squares move by half a patch."""
    image = Image.new("RGB", (32, 32), (255, 255, 255))
    values = torch.tensor([0.0, 0.0, 0.0, 1.0])
    drawn = np.asarray(overlay(image, values, Places((2, 2), 0.5, 16), size=64))
    coloured = (drawn != 255).any(2)
    # The token in row 1, column 1 is centred on pixel 16.5: its square goes from 8.5 to 24.5, twice as large here.
    assert coloured[17:49, 17:49].all() and coloured.sum() == 32 * 32
    plain = np.asarray(overlay(image, values, Places((2, 2), 8.0, 16), size=64))
    assert (plain != 255).any(2)[32:, 32:].all()
    long = Image.new("RGB", (96, 32), (255, 255, 255))
    drawn = np.asarray(overlay(long, torch.eye(6)[4], Places((1, 6), 8.0, 16), size=96))
    assert drawn.shape == (32, 96, 3) and (drawn != 255).any(2)[:16, 64:80].all() and (drawn[:, :64] == 255).all()


def test_packing_keeps_what_it_promises():
    tensor = torch.rand(3, 5, 7)
    u8 = packed(tensor, "u8")
    values = np.frombuffer(base64.b64decode(u8["data"]), np.uint8).reshape(3, 5, 7)
    scale = np.frombuffer(base64.b64decode(u8["scale"]), "<f4").reshape(3, 5, 1)
    assert np.abs(values * scale - tensor.numpy()).max() <= tensor.max() / 255 / 2 + 1e-6
    f32 = np.frombuffer(base64.b64decode(packed(tensor, "f32")["data"]), "<f4").reshape(3, 5, 7)
    assert (f32 == tensor.numpy()).all()


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{root}/nowhere", "--out", "{root}/x", "--image", "a", "--question", "b"], "no run folder"),
        (["{root}/out", "--out", "{root}/x", "--image", "a", "--question", "b"], "not a run folder"),
        (["{root}/run", "--out", "{root}/x", "--question", "b"], "give it --image FILE and a --question"),
        (["{root}/run", "--out", "{root}/x", "--image", "{root}/article.txt", "--question", "b"], "is not an image"),
        (["{root}/run", "--out", "{root}/x", "--image", "{root}/scene.png", "--question", " "], "question is empty"),
        (["{root}/run", "--out", "{root}/x", "--image", "{root}/none.png", "--question", "b"], "no such image"),
        (["{root}/rlhf", "--out", "{root}/x", "--image", "{root}/scene.png", "--question", "b"], "give it --text FILE"),
        (["{root}/rlhf", "--out", "{root}/x", "--text", "{root}/none.txt"], "No such file"),
        (["{root}/rlhf", "--out", "{root}/x", "--text", "{root}/scene.png"], "is not UTF-8 text"),
        (["{root}/run", "--out", "{root}/x", "--pointing", "{root}"], "only the built-in data set"),
        (
            ["{root}/run", "--out", "{root}/x", "--pointing", "{root}", "--question", "b"],
            "--pointing goes over a split",
        ),
        (["{root}/unfinished", "--out", "{root}/x", "--image", "a", "--question", "b"], "has no model to study"),
        (["{root}/run", "--out", "{root}/x", "--imge", "a"], "did you mean --image"),
        (["{root}/run", "--out", "{root}/scene.png", "--pointing", "{root}"], "scene.png is a file"),
    ],
)
def test_every_bad_input_is_one_clear_line(made, arguments, message):
    unfinished = made.root / "unfinished"
    unfinished.mkdir(exist_ok=True)
    (unfinished / "config.json").write_text(json.dumps({"preset": "mini-news", "prefix": ""}))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        study(*(argument.format(root=made.root) for argument in arguments))
    assert "\n" not in str(error.value)


def test_what_was_not_read_is_said(made, capsys):
    long = "what color is the circle? " * 20
    study(made.root / "run", *made.one[:2], "--question", long, "--out", made.root / "long")
    assert capsys.readouterr().err == "note: the question is longer than 32 tokens; only its beginning was read\n"
    (made.root / "long.txt").write_text("the museum cut the night trains " * 200, encoding="utf-8")
    study(made.root / "rlhf", "--text", made.root / "long.txt", "--out", made.root / "long")
    assert capsys.readouterr().err == "note: the text is longer than 512 tokens; only its beginning was read\n"
    study(made.root / "rlhf", "--text", made.root / "article.txt", "--out", made.root / "long")
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------- in a browser

needs_browser = pytest.mark.skipif(not browser.available(), reason=browser.MISSING)


@pytest.fixture(scope="module")
def window():
    with browser.Browser() as opened:
        yield opened


PAINTED = "return document.querySelector('.picture canvas').toDataURL()"


@needs_browser
def test_choosing_token_head_and_step_changes_what_is_drawn(made, window):
    window.open(made.root / "out" / "report.html")
    summary = json.loads((made.root / "out" / "summary.json").read_text())
    texts = window.script("return [...document.querySelectorAll('.token b')].map(b => b.textContent)")
    assert len(texts) == len(summary["tokens"])
    relevancy = window.script(PAINTED)
    empty = "const c = document.createElement('canvas'); c.width = c.height = 64; return c.toDataURL()"
    assert relevancy != window.script(empty)

    window.click('button[data-value="rollout"]')
    assert window.script(PAINTED) != relevancy
    window.click('.thumb[data-layer="1"][data-head="1"]')
    head = window.script(PAINTED)
    assert window.script("return document.querySelector('.thumb[aria-pressed=true]').dataset.head") == "1"
    assert window.script("return document.querySelector('.stepwise h2').textContent").startswith(
        "Cross-attention layer 1, head 1"
    )
    window.click('.thumb[data-layer="0"][data-head="1"]')
    assert window.script(PAINTED) != head
    check = window.script("return document.querySelector('.check').textContent")
    assert "sum to 1.000000" in check
    assert float(re.search(r"by at most ([\d.]+e[-+]\d+)", check)[1]) < 1e-2
    rows = window.script("return [...document.querySelectorAll('.stepwise tbody tr')].map(r => r.cells[5].textContent)")
    tensors = load_file(made.root / "out" / "trace.safetensors")
    pattern = 8**-0.5 * tensors["decoder.0.cross.q"] @ tensors["decoder.0.cross.k"].mT + tensors["decoder.0.cross.mask"]
    weights = pattern.softmax(-1)[0, 1, summary["tokens"][0]["row"]].sort(descending=True).values
    assert [float(x) for x in rows] == pytest.approx(weights[: len(rows)].tolist(), abs=6e-5)

    if len(texts) > 1:
        first = window.script(PAINTED)
        window.click(".token:nth-child(2)")
        assert window.script("return document.querySelector('.token:nth-child(2)').ariaChecked") == "true"
        assert window.script(PAINTED) != first
    assert window.log() == []


@needs_browser
def test_it_works_from_the_keyboard_and_speaks(made, window):
    window.open(made.root / "out" / "report.html")
    window.script("document.querySelector('.segmented button[aria-checked=true]').focus()")
    right, enter, down = "ArrowRight", "Enter", "ArrowDown"
    window.press(right)
    window.press(enter)
    assert window.script("return document.querySelector('.segmented [aria-checked=true]').dataset.value") == "rollout"
    said = window.script("return document.querySelector('[role=status]').textContent")
    assert said.startswith("rollout for token") and "strongest words" in said
    window.script("document.querySelector('.thumb[tabindex=\"0\"]').focus()")
    before = window.script("return document.activeElement.dataset.layer + '.' + document.activeElement.dataset.head")
    left, up = "ArrowLeft", "ArrowUp"
    for arrow in (left, up) if before == "1.1" else (right, down):  # the last head has no other to its right
        window.press(arrow)
    after = window.script("return document.activeElement.dataset.layer + '.' + document.activeElement.dataset.head")
    assert before != after
    unnamed = window.script(
        "return [...document.querySelectorAll('button,select,input,[role=img]')].filter(e => !e.ariaLabel && "
        "!e.textContent.trim() && !(e.labels && e.labels.length)).length"
    )
    assert unnamed == 0
    assert window.log() == []


@needs_browser
def test_markup_is_shown_as_text(made, window):
    window.open(made.root / "escaped" / "report.html")
    assert window.script("return document.querySelector('h1').textContent") == SCRIPT
    assert window.script("return document.querySelectorAll('script').length") == 2
    assert window.log() == []


@needs_browser
@pytest.mark.parametrize("name", ["compared", "text"])
def test_other_pages_draw_without_a_console_error(made, window, name):
    window.open(made.root / name / "report.html")
    assert window.script("return document.querySelectorAll('.study').length") == (2 if name == "compared" else 1)
    window.click('button[data-value="head"]')
    window.click(".thumb:last-child")
    window.click('button[data-value="decoder"]')
    assert window.log() == []


@needs_browser
def test_inside_the_image_a_patch_can_be_asked(made, window):
    window.open(made.root / "out" / "report.html")
    window.click('button[data-value="image"]')
    before = window.script(PAINTED)
    window.click(".picture canvas")
    assert window.script(PAINTED) != before
    assert "Read by patch" in window.script("return document.querySelector('.explain').textContent")
    window.click('button[data-value="text"]')
    window.click(".words .word:nth-child(3)")
    assert window.script("return document.querySelector('.word.query').textContent") == "color"
    assert window.log() == []


# ---------------------------------------------------------------------------------------------- every kind of subject


PAGES = {  # how each reads its sources
    "caption": "cross",
    "vilt": "stream",
    "blip2": "prefix",
    "prefix": "prefix",
    "qformer": "prefix",
    "llava": "prefix",
    "patches": "prefix",
    "resampler": "cross",
    "experts": "prefix",
    "pair": "stream",
    "probed pair": "cross",
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """All files of a study of every subject that has an image."""
    root = tmp_path_factory.mktemp("pages")
    for name in PAGES:
        torch.manual_seed(1)
        subject = SUBJECTS[name]()
        size = (*subject.pixel_values.shape[2:], 3)
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))
        labels = ("red", "blue", "two") if name == "vilt" else tuple(f" word{i}" for i in range(30))
        words = chosen(labels, "[CLS]") | {"prompt": tuple(f"<{i}>" for i in subject.prompt)}
        write_study(root / name, [take_apart(Opened(name, subject, f"about {name}", image, **words))])
    return root


@pytest.mark.parametrize("name", PAGES)
def test_every_subject_gives_all_files(pages, name):
    summary = json.loads((pages / name / "summary.json").read_text())
    assert summary["certificate"]["output"] <= 1e-5 and summary["certificate"]["rows"] > 0
    measure = "similarity" if "pair" in name else "probability"
    assert -1 <= summary[measure] <= 1 and summary["tokens"][0]["label"].strip()
    assert summary["tokens"][0].keys() == {"id", "label", "row", measure}
    tensors = load_file(pages / name / "trace.safetensors")
    assert {"relevancy.sources", "rollout.decoder", "cross.sources"} <= set(tensors)
    (data,) = data_of((pages / name / "report.html").read_text(encoding="utf-8"))
    assert data["way"] == PAGES[name] and data["flows"].keys() >= {"cross", "rollout", "relevancy"}
    layers = 2 if name == "experts" else 0
    assert [layer["weights"]["shape"] for layer in data["experts"]] == [[len(data["read"]), 4]] * layers
    assert ("nearness" in data["flows"]) == ("parts.sources" in tensors) == ("pair" in name) == (not data["lens"])
    assert bool(data["attributions"]) == (name != "vilt" and "pair" not in name)
    picture = next(source for source in data["sources"] if "grid" in source)
    assert (picture["first"], picture["stride"]) == ((0.5, 8) if name == "caption" else (4.0, 8))
    with Image.open(pages / name / "overlay_relevancy.png") as sheet:
        assert sheet.height == 448


@needs_browser
@pytest.mark.parametrize("name", PAGES)
def test_every_subject_has_a_page_that_draws(pages, window, name):
    window.open(pages / name / "report.html")
    for mode in ("rollout", "mean", "layer", "head", *(("nearness", "parts") if "pair" in name else ()), "relevancy"):
        window.click(f'button[data-value="{mode}"]')
        assert len(window.script(PAINTED)) > 500
    layer = 0 if name == "probed pair" else 1
    window.click(f'.thumb[data-layer="{layer}"][data-head="2"]')
    title = window.script("return document.querySelector('.stepwise h2').textContent")
    assert title.endswith(f"layer {layer}, head 2, step by step")
    check = window.script("return document.querySelector('.check').textContent")
    assert "sum to 1.000000" in check and float(re.search(r"by at most ([\d.]+e[-+]\d+)", check)[1]) < 1e-2
    kinds = window.script("return [...document.querySelectorAll('.bar .segmented button')].map(b => b.dataset.value)")
    inside = {"caption": ["cross", "decoder"], "vilt": ["cross", "stream"], "patches": ["cross"]}
    inside |= {"resampler": ["cross", "image", "decoder"]}
    inside |= {"pair": ["cross", "text", "image"], "probed pair": ["cross", "image", "text"]}
    assert kinds == inside.get(name, ["cross", "image"])
    text = window.script("return document.querySelector('main').textContent")
    assert "[object" not in text and "undefined" not in text and "NaN" not in text
    rows = window.script("return document.querySelectorAll('table.parts tbody tr').length")
    none = {"vilt": 0, "pair": 0, "probed pair": 0}
    # A header and two layers for each kind of attention.
    assert rows == (none | {"caption": 6, "resampler": 6}).get(name, 3)
    taken = window.script(
        "return [...document.querySelectorAll('table.experts tbody td.words')].map(t => t.textContent)"
    )
    read = window.script("return JSON.parse(document.getElementById('data').textContent)[0].read.length")
    assert len(taken) == (2 * read if name == "experts" else 0)
    for cell in taken:  # two experts for each token, whose weights sum to 1
        (_, first), (_, second) = (line.split(": ") for line in cell.split("\n"))
        assert float(first) + float(second) == pytest.approx(1, abs=0.011)
    window.click(f'button[data-value="{"image" if "image" in kinds else kinds[-1]}"]')
    before = window.script(PAINTED)
    if name not in ("caption", "patches"):  # they have no encoder with attentions
        window.click(".picture canvas")
        assert re.search(r"Read by patch \d,\d", window.script("return document.querySelector('.explain').textContent"))
        assert window.script(PAINTED) != before
    if name == "vilt":
        window.click(".words .word:nth-child(3)")
        assert "outlined word" in window.script("return document.querySelector('.explain').textContent")
    if "pair" in name:  # a text is asked at the token that is its state
        window.click('button[data-value="text"]')
        assert window.script("return document.querySelector('.word.query').textContent") == (
            "[SEP]" if name == "pair" else "[PAD]"
        )
        window.click('button[data-value="parts"]')
        shown = window.script("return document.querySelector('.explain').textContent")
        numbers = [float(x.replace("−", "-")) for x in re.findall(r"−?\d\.\d{3}", shown)]
        assert sum(numbers[:-1]) == pytest.approx(numbers[-1], abs=2e-3) and "in all" in shown
    assert window.log() == []


@needs_browser
@pytest.mark.parametrize("name", ["caption", "prefix", "llava"])
def test_a_square_is_painted_and_found_where_the_token_looks(pages, window, name):
    """The middle token's square lies around its centre, and pointing into its lower left corner finds it."""
    window.open(pages / name / "report.html")
    first, zoom = 0.5 if name == "caption" else 4.0, round(512 / 24)
    painted = window.script(
        """
        const context = document.querySelector('.picture canvas').getContext('2d'), drawn = [];
        context.fillRect = (...square) => drawn.push(square);
        document.querySelector('button[data-value="mean"]').click();
        return drawn;
        """
    )
    low, high = ((first + 8 + side) * zoom for side in (-4, 4))
    assert painted[4] == pytest.approx([low, low, high - low, high - low], abs=0.51)
    assert painted[0] == pytest.approx([0, 0, (first + 4) * zoom, (first + 4) * zoom], abs=0.51)
    note = window.script(
        f"""
        const map = document.querySelector('.picture canvas'), box = map.getBoundingClientRect();
        map.dispatchEvent(new PointerEvent('pointermove', {{
          clientX: box.left + box.width * {(first + 8 - 3) / 24}, clientY: box.top + box.height * {(first + 8 + 3) / 24}
        }}));
        return document.querySelector('.note').textContent;
        """
    )
    assert note.startswith("patch in row 2, column 2:")


@needs_browser
def test_layers_are_called_by_their_blocks(tmp_path, window):
    """Where not every block reads the image; and each kind of attention has its own heads."""
    subject = tiny_sparse_subject()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    words = chosen(tuple(f" word{i}" for i in range(30)), "[CLS]") | {"prompt": ("<1>",)}
    write_study(tmp_path, [take_apart(Opened("gated", subject, "about it", image, **words))])
    window.open(tmp_path / "report.html")

    def texts(of):
        return window.script(f"return [...document.querySelectorAll('{of}')].map(e => e.textContent)")

    assert [text for text in texts(".grid .axis") if "layer" in text] == ["layer 0", "layer 2"]
    window.click('.thumb[data-layer="1"][data-head="1"]')
    assert "layer 2, head 1, step by step" in texts(".stepwise h2")[0]
    assert texts(".pickers select option") == ["0", "2", "0", "1"]
    title = window.script("return document.querySelector('.thumb[aria-pressed=true]').title")
    assert title.startswith("layer 2 head 1")
    assert "layer 2 head 1" in texts("[role=status]")[0]
    heads = [f"head {i}" for i in range(4)]
    assert texts("table.parts th") == ["cross", *heads[:2], "MLP", "self", *heads]
    window.click('button[data-value="decoder"]')
    assert [text for text in texts(".grid .axis") if "layer" in text] == [f"layer {i}" for i in range(4)]
    assert window.log() == []
