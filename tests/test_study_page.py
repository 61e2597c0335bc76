"""The views of the page that draws a study: each is clicked, and what it shows is worked out again here."""

import json
import re
from types import SimpleNamespace

import browser
import numpy as np
import pytest
import torch
from PIL import Image
from study_helpers import SUBJECTS

from vqa_scratch.study import report
from vqa_scratch.study.activation import activations, image_lens
from vqa_scratch.study.lens import logit_direction
from vqa_scratch.study.number import opened_head
from vqa_scratch.study.opened import Opened, chosen
from vqa_scratch.study.record import take_apart
from vqa_scratch.study.report import joined, page, study_data

FOLDER = report.files("vqa_scratch.study").joinpath("page")
DELETE, RIGHT = "Delete", "ArrowRight"


def studied(name: str, seed: int = 1):
    torch.manual_seed(seed)
    subject = SUBJECTS[name]()
    image = None
    if name != "t5":
        size = (*subject.pixel_values.shape[2:], 3)
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))
    labels = ("red", "blue", "two") if name == "vilt" else tuple(f" word{i}" for i in range(30))
    words = chosen(labels, "[CLS]") | {"prompt": tuple(f"<{i}>" for i in subject.prompt)}
    return take_apart(Opened(name, subject, f"about {name}", image, **words))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Studies and their pages; and a page that draws a study with hooks, `live`."""
    root = tmp_path_factory.mktemp("page")
    studies = {name: studied(name) for name in ("tokens", "llava", "caption", "vilt", "idefics")}
    for name, study in studies.items():
        (root / f"{name}.html").write_text(page([study]), encoding="utf-8")
    script = joined(FOLDER, "study.js")[:-1] + "globalThis.renderStudy = renderStudy; }"
    style = FOLDER.joinpath("study.css").read_text(encoding="utf-8")
    head = f'<!doctype html><meta charset="utf-8"><style>{style}</style>'
    html = f'{head}<main><div id="box"></div></main><script>{script}</script>'
    (root / "live.html").write_text(html, encoding="utf-8")
    return SimpleNamespace(root=root, **studies)


# ---------------------------------------------------------------------------------------------- what is measured


def opened(study, layer, head):
    subject, t = study.opened.subject, study.trace
    directions = [logit_direction(subject, t, token.row, token.id) for token in study.tokens]
    return opened_head(subject, t, layer, head, [token.row for token in study.tokens], directions)


@pytest.mark.parametrize("name", ["tokens", "llava", "idefics"])
def test_an_opened_head_adds_up_to_its_part_of_the_logit(made, name):
    study = getattr(made, name)
    subject = study.opened.subject
    kind = subject.reading[0].rpartition(".")[2]
    for layer, read in enumerate(subject.reading):
        found, block = opened(study, layer, 1), int(read.split(".")[1])
        for i, attribution in enumerate(study.attributions):
            assert found["out"][i]["total"] == pytest.approx(float(attribution.heads[kind][block, 1]), abs=1e-5)
            z, projection = (array(found[label])[i] for label in ("z", "projection"))
            assert float(z @ projection) == pytest.approx(found["out"][i]["values"][0], abs=1e-5)


def array(packed):
    import base64

    return np.frombuffer(base64.b64decode(packed["data"]), "<f4").reshape(packed["shape"])


# ---------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def window():
    if not browser.available():
        pytest.skip("needs chromium and chromedriver")
    with browser.Browser() as opened:
        yield opened


def texts(window, selector):
    return window.script(f"return [...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")


def rows_of(window, selector):
    """The cells of a table's body as text."""
    return window.script(
        f"return [...document.querySelector({json.dumps(selector)}).tBodies[0].rows]"
        ".map(r => [...r.cells].map(c => c.textContent))"
    )


def figure(text):
    return float(text.replace("−", "-").replace("%", ""))


def strongest(window):
    """The strongest patch that the page speaks of: (row, column, share), from 1."""
    said = window.script("return document.querySelector('[role=status]').textContent")
    row, column, share = re.search(r"strongest patches row (\d+) column (\d+) \(([\d.]+) %\)", said).groups()
    return int(row), int(column), float(share)


@pytest.mark.parametrize("name", ["tokens", "llava", "idefics"])
def test_one_number_is_followed_to_the_probability(made, window, name):
    study = getattr(made, name)
    window.open(made.root / f"{name}.html")
    token = min(1, len(study.tokens) - 1)
    window.click(f".token:nth-child({token + 1})")
    window.click('.thumb[data-layer="1"][data-head="2"]')
    tables = window.script(
        "return [...document.querySelectorAll('.number table.products')].map(t => "
        "[...t.tBodies[0].rows].map(r => [...r.cells].map(c => c.textContent)))"
    )
    assert len(tables) == 4
    for table in tables:  # each table adds up, and each product is one
        *lines, total = table
        assert sum(figure(line[3]) for line in lines) == pytest.approx(figure(total[3]), abs=1e-3)
        for _, left, right, product in lines:
            assert not left or figure(left) * figure(right) == pytest.approx(figure(product), abs=1e-2)
    subject, t, row = study.opened.subject, study.trace, study.tokens[token].row
    read = subject.reading[1]
    q, z = (subject.rows(t[f"{read}.{label}"][0])[2, row] for label in "qz")
    weights = subject.rows(t.pattern(read)[0])[2, row]
    key = int(weights.argmax())
    assert figure(tables[0][-1][3]) == pytest.approx(float(q @ t[f"{read}.k"][0, 2, key]), abs=1e-3)
    dimension = int(re.search(r"dimension (\d+) of what", texts(window, ".number table caption")[2])[1])
    assert figure(tables[1][-1][3]) == pytest.approx(float(z[dimension]), abs=1e-3)
    made_of = study.attributions[token]
    kind, block = read.rpartition(".")[2], int(read.split(".")[1])
    assert figure(tables[3][-1][3]) == pytest.approx(float(made_of.heads[kind][block, 2]), abs=1e-3)
    last = texts(window, ".number .formula")[-1]
    assert figure(re.search(r"= ([−\d.]+)   its probability", last)[1]) == pytest.approx(
        study.tokens[token].probability, abs=1e-4
    )
    other = int(weights.argsort()[0])
    window.script(
        f"const s = document.querySelector('.number select'); s.value = {other}; s.dispatchEvent(new Event('change'))"
    )
    softmax = texts(window, ".number .formula")[1]
    assert figure(re.search(r"= ([\d.]+)   the weight", softmax)[1]) == pytest.approx(float(weights[other]), abs=2e-6)
    assert window.log() == []


@pytest.mark.parametrize("name", ["tokens", "llava", "vilt"])
def test_patches_have_their_words_layer_by_layer(made, window, name):
    study = getattr(made, name)
    window.open(made.root / f"{name}.html")
    words = image_lens(study.opened.subject, study.trace, study.opened.label)
    subject = study.opened.subject
    places = subject.image[1]
    of_patch = [words.sources.index(i) for i in range(places.start, places.stop)]
    for layer in (0, len(words.layers) - 1):
        window.script(
            f"const s = document.querySelector('.patchwords input'); s.value = {layer};"
            "s.dispatchEvent(new Event('input'))"
        )
        expected = [words.best[layer][key][0][0].strip() for key in of_patch]
        assert texts(window, ".patchword") == expected
        assert texts(window, ".patchwords output") == [words.layers[layer]]
        common = max(expected, key=expected.count)
        assert f"“{common}” {expected.count(common)} of 9" in texts(window, ".patchwords .keys span")
    window.script("document.querySelectorAll('.patchword')[0].focus()")
    window.press(RIGHT)
    line = texts(window, ".patchwords li")[0]
    assert [figure(x) for x in re.findall(r" (−?\d+\.\d+)", line)] == pytest.approx(
        [p for _, p in words.best[0][of_patch[1]]], abs=6e-3
    )
    assert window.log() == []


@pytest.mark.parametrize("name", ["tokens", "llava", "vilt"])
def test_the_sequence_lies_as_the_model_has_it(made, window, name):
    study = getattr(made, name)
    window.open(made.root / f"{name}.html")
    subject = study.opened.subject
    window.click('button[data-value="mean"]')
    titles = window.script("return [...document.querySelectorAll('.seq')].map(e => e.title)")
    label = [source.labels[i] for source in subject.sources for i in range(len(source))]
    order = [label[int(i)].strip() for i in subject.mixing.argmax(1)]
    own = [] if name != "llava" else [text.strip() for text in study.read]
    assert [title.split(":")[0] for title in titles] == order + own
    weights = torch.stack([subject.rows(study.trace.pattern(n)[0])[:, study.tokens[0].row] for n in subject.reading])
    shown = [figure(re.search(r": ([\d.]+) %", title)[1]) for title in titles]
    # Weights have 8 bits here, and shares below a tenth one digit.
    assert shown == pytest.approx((100 * weights.mean((0, 1))[: len(shown)]).tolist(), abs=0.6)
    assert window.log() == []


def test_activation_is_drawn_as_it_is_measured(made, window):
    study = made.caption
    window.open(made.root / "caption.html")
    window.click('button[data-value="activation"]')
    flow = activations(study.opened.subject, study.trace, [token.id for token in study.tokens]).flow
    for i, token in enumerate(study.tokens[:3]):
        window.click(f".token:nth-child({i + 1})")
        of_token = flow.sources[token.row]
        place, share = int(of_token.argmax()), float(of_token.max() / of_token.sum().clamp(min=1e-9))
        if share:
            assert strongest(window) == (place // 3 + 1, place % 3 + 1, pytest.approx(100 * share, abs=0.51))
    assert window.log() == []


def test_a_patch_says_which_words_it_feeds_and_a_word_too(made, window):
    study = made.caption
    window.open(made.root / "caption.html")
    window.script(
        "const m = document.querySelector('.picture canvas'), b = m.getBoundingClientRect();"
        "const middle = {clientX: b.left + b.width / 2, clientY: b.top + b.height / 2};"
        "m.dispatchEvent(new PointerEvent('pointermove', middle))"
    )
    shares = [
        float(study.flows["relevancy"].sources[t.row, 4] / study.flows["relevancy"].sources[t.row].sum())
        for t in study.tokens
    ]
    fed = texts(window, ".token .fed")
    assert [figure(text.split("%")[0]) for text in fed] == pytest.approx([100 * s for s in shares], abs=0.51)
    note = texts(window, ".note")[0]
    assert f"it feeds “{study.tokens[int(np.argmax(shares))].label.strip()}”" in note
    window.open(made.root / "tokens.html")
    window.script("document.querySelectorAll('.words .word')[1].focus()")
    fed = texts(window, ".token .fed")
    flow, rows = made.tokens.flows["relevancy"], [token.row for token in made.tokens.tokens]
    place = made.tokens.opened.subject.where("text").start + 1
    assert [figure(text.split("%")[0]) for text in fed] == pytest.approx(
        [100 * float(flow.sources[row, place] / flow.sources[row].sum()) for row in rows], abs=0.51
    )
    assert window.log() == []


def test_in_a_stream_a_patch_feeds_the_words_that_read_it(made, window):
    study = made.vilt
    window.open(made.root / "vilt.html")
    window.script("document.querySelector('.picture canvas').focus()")
    window.press(RIGHT)  # the second patch
    subject = study.opened.subject
    patch = subject.image[1].start + 1
    weights = torch.stack([study.trace.pattern(name)[0] for name in subject.self_attentions]).mean((0, 1))[:, patch]
    word = 1 + int(weights[1:4].argmax())  # of "what is it", between the separators
    label = subject.sources[0].labels[word]
    note = window.script("return document.querySelector('.note').textContent")
    shown = figure(re.search(f"“{label}” ([\\d.]+) %", note)[1])
    assert shown == pytest.approx(100 * float(weights[word]), abs=0.6)
    assert window.log() == []


def test_a_sound_lies_along_its_time(made, window):
    """Drawn with the T5's encoder for a sound of six states, the last of which is behind the sound."""
    study = studied("t5")
    data = study_data(study)
    mel = torch.rand(8, 12)
    words = [["hello", 0.0, 0.04, 0.9], ["there", 0.04, 0.1, 0.8]]
    data["sound"] = {"source": "encoder", "step": 0.02, "seconds": 0.1, "words": words, "mel": report.packed(mel, "u8")}
    draw(window, made, data)
    assert texts(window, ".said") == ["hello", "there"]
    left, wide = window.script("const s = document.querySelectorAll('.said')[1].style; return [s.left, s.width]")
    assert [float(x.strip("%")) for x in (left, wide)] == pytest.approx([40, 60])
    token = 2
    window.click(f".token:nth-child({token + 1})")
    flow = study.flows["relevancy"].sources[study.tokens[token].row]
    heard = flow[:5]
    said = texts(window, ".lanes .note")[0]
    assert f"listens most at {0.02 * int(heard.argmax()):.2f} s ({100 * float(heard.max() / flow.sum()):.0f} %)" in said
    painted = window.script(
        "const c = document.querySelector('.lanes .tones').getContext('2d');"
        "return [...c.getImageData(0, 7, 12, 1).data]"
    )
    assert [255 - x for x in painted[::4]] == pytest.approx((255 * mel[0] / mel.max()).tolist(), abs=2)
    assert window.log() == []


# ---------------------------------------------------------------------------------------------- with hooks


def draw(
    window,
    made,
    data,
    hooks="knock: (e) => calls.push(['knock', e]), select: (v) => calls.push(['select', v])",
):
    """Draw `data` with hooks that write down how they are called."""
    window.open(made.root / "live.html")
    window.script(
        f"globalThis.calls = []; globalThis.edits = []; globalThis.data = {json.dumps(data)};"
        f"globalThis.drawn = renderStudy(document.getElementById('box'), data, {{ edits: () => edits, {hooks} }});"
    )


def calls(window, name):
    return window.script(f"return calls.splice(0).filter(c => c[0] === '{name}').map(c => c[1])")


def test_parts_are_knocked_out_by_mouse_and_by_key(made, window):
    draw(window, made, study_data(made.tokens))
    window.script('document.querySelector(\'.thumb[data-layer="1"][data-head="2"]\').focus()')
    window.press(DELETE)
    head = {"kind": "head", "name": "decoder.1.cross", "head": 2, "scale": 0}
    assert calls(window, "knock") == [head]
    window.click(".bar .plain")  # from now on a click knocks out
    window.click('.thumb[data-layer="0"][data-head="1"]')
    window.click(".words .word:nth-child(3)")
    window.click(".picture canvas")
    window.click("button.axis")
    window.click(".parts tr:nth-child(2) td:last-child button")
    assert calls(window, "knock") == [
        head | {"name": "decoder.0.cross", "head": 1},
        {"kind": "source", "source": "text", "token": 2},
        {"kind": "source", "source": "image", "token": 1 + 4},
        {"kind": "layer", "name": "decoder.0.cross"},
        {"kind": "layer", "name": "decoder.0.mlp"},
    ]
    window.script(f"edits.push({json.dumps(head)}); drawn.update(data)")
    assert texts(window, ".thumb.off .mark") == ["off"]
    assert window.script("return document.querySelector('.thumb.off').ariaLabel").endswith("knocked out")
    assert window.log() == []


def test_a_view_is_told_kept_and_taken_from_a_link(made, window):
    data = study_data(made.tokens)
    draw(window, made, data)
    window.click('button[data-value="rollout"]')
    window.click('.thumb[data-layer="0"][data-head="3"]')
    view = calls(window, "select")[-1]
    assert view == {"mode": "head", "kind": "cross", "layer": 0, "head": 3, "token": 0, "key": -1, "depth": -1}
    window.script("document.querySelector('.thumb[data-head=\"3\"]').focus(); drawn.update(data)")
    pressed = (
        "return document.querySelector('.thumb[aria-pressed=true]').dataset.head + document.activeElement.dataset.head"
    )
    assert window.script(pressed) == "33"
    window.script("drawn.select({mode: 'rollout', token: 'x', head: 1e9})")
    assert window.script("return document.querySelector('.segmented [aria-checked=true]').dataset.value") == "rollout"
    draw(window, made, data, hooks=f"view: {json.dumps(view | {'kind': 7, 'depth': 0})}")
    assert window.script("return document.querySelector('.thumb[aria-pressed=true]').dataset.head") == "3"
    assert texts(window, ".patchwords output") == ["layer 0"]
    window.script("drawn.destroy()")
    assert window.script("return document.getElementById('box').children.length") == 0
    assert window.log() == []


def test_a_change_stands_beside_the_unchanged_run(made, window):
    after, before = study_data(made.llava), study_data(studied("llava", 2))
    text, p = before["answer"]["text"], before["answer"]["probability"]
    after["plain"] = {"answer": text, "probability": p, "tokens": before["tokens"], "flows": before["flows"]}
    draw(window, made, after)
    rows = rows_of(window, ".difference table")
    shown = [figure(rows[0][i].split("”")[1]) for i in (1, 2)]
    assert shown == pytest.approx([100 * data["answer"]["probability"] for data in (before, after)], abs=0.51)
    row = after["tokens"][0]["row"]
    new, old = (array(data["flows"]["relevancy"]["sources"])[row] for data in (after, before))
    change = 100 * (new / new.sum() - old / old.sum())
    words, patches = change[:-10], change[-9:]
    assert [figure(text.split()[-1]) for text in texts(window, ".difference .words .word")] == pytest.approx(
        words, abs=0.06
    )
    place = int(np.abs(patches).argmax())
    said = f"most changed: row {place // 3 + 1} column {place % 3 + 1} ({patches[place]:+.1f} points)".replace("-", "−")
    assert said in texts(window, ".difference .note")[0]
    assert texts(window, ".difference .legend")[1] == f"−{np.abs(patches).max():.1f}+{np.abs(patches).max():.1f} points"
    painted = window.script(
        "return [...document.querySelectorAll('.difference canvas')].slice(0, 3).map(c => c.toDataURL())"
    )
    assert len(set(painted)) == 3
    for theme in ("dark", "light"):
        window.script(f"document.documentElement.dataset.theme = '{theme}'; drawn.update({{}})")
        assert window.script(browser.AUDIT) == [], f"texts without contrast, {theme}"
    assert window.log() == []


def test_heads_that_matter_are_counted_as_they_are_tried(made, window):
    data = study_data(made.tokens)
    p = data["answer"]["probability"]
    draw(window, made, data | {"matter": {"rows": [], "total": None, "done": False}})
    assert texts(window, ".count") == ["0 of all heads matter for this answer so far"]
    rows = [
        {"name": "decoder.0.cross", "head": 0, "answer": "red", "probability": p - 0.001, "changed": False},
        {"name": "decoder.1.cross", "head": 2, "answer": "blue", "probability": 0.6, "changed": True},
        {"name": "decoder.1.self", "head": 1, "answer": "red", "probability": p - 0.06, "changed": False},
    ]
    for tried in (1, 3):
        window.script(f"drawn.update({{matter: {json.dumps({'rows': rows[:tried], 'total': 16})}}})")
    assert texts(window, ".count") == ["2 of 16 heads matter for this answer so far"]
    assert "3 were tried" in texts(window, ".matter .lead")[0]
    assert [row[0] for row in rows_of(window, ".matter table")] == [
        "decoder.1.cross head 2", "decoder.1.self head 1", "decoder.0.cross head 0"
    ]  # fmt: skip
    assert texts(window, '.thumb[data-layer="1"][data-head="2"] .mark') == ["→ blue"]
    window.click(".matter td button")
    assert window.script("return document.querySelector('.thumb[aria-pressed=true]').dataset.head") == "2"
    assert window.log() == []


def test_a_head_that_the_page_lacks_is_asked_for(made, window):
    data = study_data(made.tokens)
    missing = json.dumps(opened(made.tokens, 0, 3))
    data["opened"] = [opened(made.tokens, 1, 0)]
    draw(
        window, made, data,
        hooks=f"needs: (what) => {{ calls.push(['needs', what]); return Promise.resolve({missing}); }}",
    )  # fmt: skip
    window.script("calls.splice(0)")
    window.click('.thumb[data-layer="0"][data-head="3"]')
    assert calls(window, "needs") == [{"kind": "number", "name": "decoder.0.cross", "head": 3}]
    assert "sum to 1.000000" in texts(window, ".check")[0]
    assert window.log() == []


def test_every_view_bears_the_certificate_and_turns_red(made, window):
    data = study_data(made.tokens)
    draw(window, made, data)
    count = len(texts(window, ".study > section"))
    assert len(texts(window, ".study > section .badge.good")) == count > 6
    data["certificate"]["softmax"] = 3e-5
    draw(window, made, data)
    assert texts(window, ".study > section .badge.bad") == ["✗ shown = ran only to 3.0e−5"] * count
    assert window.log() == []


@pytest.mark.parametrize("width", [360, 1280, 3840])
def test_the_page_fits_every_screen(made, window, width):
    window.resize(width)
    for name in ("tokens", "llava"):
        window.open(made.root / f"{name}.html")
        assert window.script("return document.documentElement.scrollWidth") <= width
    window.resize(1280)
    assert window.log() == []


def test_the_page_is_small_and_its_modules_too():
    modules = [file for file in FOLDER.iterdir() if file.name.endswith(".js")]
    lines = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in modules}
    assert max(lines.values()) <= 300 and sum(lines.values()) <= 1_600
    assert sum(len(file.read_bytes()) for file in FOLDER.iterdir()) < 150_000
