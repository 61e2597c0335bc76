"""The live page in a browser: a test that clicks for everything it does, then what must not happen."""

import base64
import io
import json
import os
import re
import time
import wave
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import browser
import pytest
from PIL import Image
from run_helpers import make_other, make_run
from test_systems import SYSTEMS
from voice_helpers import small_recordings, tiny_options, tiny_system

from bench import play
from vqa_scratch.systems.run_folder import save_weights

pytestmark = pytest.mark.skipif(not browser.available(), reason=browser.MISSING)
HOSTILE = "<img src=x onerror=document.title='taken'>"
EVENTS = "picked asked moved answered studied counted chosen viewed changed undone scaled borrowed shared trained"
COUNT = """
window.seen = {};
for (const name of %s)
  document.addEventListener("live-" + name, () => { window.seen[name] = (window.seen[name] || 0) + 1; });
"""


class Visit:
    """One window on the page, and what happened in it so far."""

    def __init__(self, address: str, **looks: object) -> None:
        self.window = browser.Browser(**looks)
        self.page, self.address = self.window.page, address
        self.page.add_init_script(COUNT % json.dumps(EVENTS.split()))

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *error: object) -> None:
        self.window.context.close()

    def open(self, after: str = "") -> "Visit":
        """The page with this at the end of its address, once the first answer is studied."""
        self.page.goto(self.address + after)
        self.page.wait_for_function("() => window.seen.studied")
        return self

    def until(self, event, act):
        """Do it, and wait for what the page tells then."""
        before = self.page.evaluate("(name) => window.seen[name] || 0", event)
        act()
        self.page.wait_for_function("([name, n]) => (window.seen[name] || 0) > n", arg=[event, before])

    def text(self, selector):
        return self.page.locator(selector).first.inner_text()

    def count(self, selector):
        return self.page.locator(selector).count()

    def click(self, selector, event="answered"):
        self.until(event, lambda: self.page.locator(selector).first.click())

    def choose(self, selector, label):
        self.page.locator(selector).first.select_option(label=label)


@pytest.fixture(scope="module")
def made(tmp_path_factory, data):
    """A server with two runs."""
    root = tmp_path_factory.mktemp("play")
    make_run(data, root / "run")
    make_run(data, root / "beside", connector="prefix")
    with play.served(root / "run", root / "beside") as (address, process):
        yield SimpleNamespace(root=root, address=address, process=process)


@pytest.fixture
def visit(made):
    """The page, in a window of its own; at the end its console has said nothing."""
    visited = Visit(made.address)
    with visited.window:
        visited.open()
        yield visited
        assert visited.window.log() == []
        assert visited.page.title() != "taken"


# ---------------------------------------------------------------------------------------------- 1: the scene


def test_a_scene_is_picked_drawn_and_moved(visit):
    visit.click("#scenes li:nth-child(2) button", "studied")
    assert visit.page.locator("#scenes li:nth-child(2) button").get_attribute("aria-pressed") == "true"
    item = visit.page.locator("#canvas .object").first
    label = item.get_attribute("aria-label")
    item.focus()
    visit.until("answered", lambda: visit.page.keyboard.press("Shift+ArrowRight"))
    assert item.get_attribute("aria-label") != label, "an arrow key moves it"
    box, stage = item.bounding_box(), visit.page.locator("#canvas").bounding_box()
    visit.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    visit.page.mouse.down()
    middle = stage["x"] + stage["width"] / 2, stage["y"] + stage["height"] / 2
    visit.until("answered", lambda: visit.page.mouse.move(*middle))
    visit.page.mouse.up()
    assert ", 32 across, 32 down" in item.get_attribute("aria-label"), "and so does the mouse"
    other = "square" if "triangle" in label else "triangle"
    visit.click(f'#tools label[title="{other}"]')
    assert other in item.get_attribute("aria-label")
    visit.click("#blank")
    assert visit.count("#canvas .object") == 1
    visit.click("#add-object")
    assert visit.count("#canvas .object") == 2
    visit.until("answered", lambda: visit.page.keyboard.press("Delete"))
    assert visit.count("#canvas .object") == 1


def test_nothing_can_be_asked_before_the_runs_are_known(made):
    with Visit(made.address) as visit:
        held = []
        visit.page.route("**/api/models", lambda route: held.append(route))
        visit.page.goto(made.address)
        visit.page.wait_for_selector("#asked button")
        for selector in ("#asked button", "#blank", "#start-tour", "#share-part summary", "#temperature"):
            box = visit.page.locator(selector).bounding_box()
            visit.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        assert visit.window.log() == [] and not visit.page.locator("#tour").is_visible()
        held[0].continue_()
        visit.page.wait_for_function("() => window.seen.studied")
        visit.click("#blank")
        assert visit.window.log() == []


def test_a_picture_is_uploaded_and_pasted_and_its_name_is_text(visit, tmp_path):
    path = tmp_path / f"{HOSTILE}.png".replace("/", "")
    Image.new("RGB", (1500, 700), (200, 30, 30)).save(path)
    visit.until("answered", lambda: visit.page.set_input_files("#file", path))
    assert visit.text("#scene-note") == f"{path.name}, scaled to 1024 × 478 pixels"
    assert visit.page.locator("#picture").get_attribute("src").startswith("data:image/jpeg")
    paste = """async () => {
        const picture = Object.assign(document.createElement("canvas"), { width: 9, height: 9 });
        const held = new DataTransfer();
        const blob = await new Promise((made) => picture.toBlob(made));
        held.items.add(new File([blob], "", { type: blob.type }));
        window.dispatchEvent(new ClipboardEvent("paste", { clipboardData: held }));
    }"""
    visit.until("answered", lambda: visit.page.evaluate(paste))
    assert visit.text("#scene-note") == "the pasted picture"
    (tmp_path / "note.png").write_text("no picture")
    visit.page.set_input_files("#file", tmp_path / "note.png")
    visit.page.wait_for_function("() => document.getElementById('scene-note').textContent.startsWith('note.png is no')")


def test_a_question_is_spoken(made):
    """The server has no voice run here: what it is sent is looked at instead."""
    heard = []

    def voice(route):
        heard.append(route.request.post_data_buffer)
        route.fulfill(json={"text": "is there a red square?"})

    def models(route):
        route.fulfill(json=[model | {"voice": True} for model in route.fetch().json()])

    with Visit(made.address) as visit:
        visit.window.context.grant_permissions(["microphone"])
        visit.page.route("**/api/voice", voice)
        visit.page.route("**/api/models", models)
        visit.open()
        visit.page.locator("#record").click()
        visit.page.wait_for_function("() => document.getElementById('record').textContent === 'Stop'")
        time.sleep(0.4)
        visit.click("#record")
        assert visit.page.input_value("#question") == "is there a red square?"
        with wave.open(io.BytesIO(heard[0])) as sound:
            assert sound.getparams()[:3] == (1, 2, 16000) and sound.getnframes() > 1600
        assert visit.window.log() == []


def test_of_a_run_that_hears_the_sound_stands_where_the_picture_does(made, tmp_path):
    """What it answers is tested with the server; here what it is sent."""
    asked = []

    def ask(route):
        asked.append(route.request.post_data_json)
        route.fulfill(status=400, json={"error": "heard"})

    with wave.open(str(tmp_path / "said.wav"), "wb") as sound:
        sound.setparams((2, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(4 * 4000))
    with Visit(made.address) as visit:
        visit.page.route("**/api/ask", ask)
        visit.page.route("**/api/scenes*", lambda route: route.fulfill(json=[]))
        models = [{"asked": "sound"}, {}]
        visit.page.route(
            "**/api/models",
            lambda route: route.fulfill(json=[a | b for a, b in zip(route.fetch().json(), models, strict=True)]),
        )
        visit.page.goto(made.address)
        visit.page.wait_for_selector("#voice")
        assert not visit.page.locator("#scene-part").is_visible() and not visit.page.locator("#question").is_visible()
        page, rest = (visit.page.locator(name).bounding_box()["width"] for name in (".live-page", ".asking"))
        assert rest > 0.9 * page, "what has no scene takes the room of one"
        assert visit.text("#heard").startswith("Nothing is heard yet") and not visit.page.locator("#sides").is_visible()
        visit.page.set_input_files("#sound", tmp_path / "said.wav")
        visit.page.wait_for_selector(".trouble:not([hidden])")
        assert len(asked) == 1, "nothing is asked before there is a sound"
        assert visit.page.locator("#player").is_visible()
        said = base64.b64decode(asked[0]["picture"]["sound"].removeprefix("data:audio/wav;base64,"))
        with wave.open(io.BytesIO(said)) as sound:
            assert sound.getparams()[:3] == (1, 2, 16000) and abs(sound.getnframes() - 8000) < 100


# ---------------------------------------------------------------------------------------------- 2: the answer


def test_words_have_probabilities_and_the_model_goes_on_from_another(visit):
    words = visit.count(".column")
    assert words >= 1 and re.search(r"\d %", visit.text(".live-word small"))
    assert visit.count(".column:first-child .other") == 5
    other = visit.text(".column:first-child li:nth-child(3) b")
    visit.click(".column:first-child li:nth-child(3) button", "studied")
    assert visit.text(".column:first-child .live-word b") == other
    assert visit.count(".column.forced") == 1
    assert other in visit.page.locator(".said").inner_text()
    visit.click(".unpin")
    assert visit.count(".column.forced") == 0
    visit.page.locator("#seed").fill("7")
    visit.until("answered", lambda: visit.page.keyboard.press("Tab"))
    visit.until("answered", lambda: visit.page.locator("#temperature").fill("2"))
    hot = visit.page.evaluate("() => [...document.querySelectorAll('.live-word b')].map((b) => b.textContent)")
    visit.click("#asked button")
    assert hot == visit.page.evaluate("() => [...document.querySelectorAll('.live-word b')].map((b) => b.textContent)")


# ---------------------------------------------------------------------------------------------- 3, 5: the study


def test_the_study_follows_the_word_and_keeps_its_view(visit):
    """What it draws is tested with the report, whose modules these are."""
    visit.click('button[data-value="rollout"]', "viewed")
    visit.click("#scenes li:nth-child(3) button", "studied")
    assert visit.page.locator('button[data-value="rollout"]').first.get_attribute("aria-checked") == "true"
    if visit.count(".column") > 1:
        visit.click(".column:nth-child(2) .live-word", "viewed")
        assert visit.page.locator(".token").nth(1).get_attribute("aria-checked") == "true"
    visit.click(".thumb", "viewed")
    assert visit.text(".stepwise h2") and visit.count(".stepwise table")


# ---------------------------------------------------------------------------------------------- 4: changes


def test_parts_are_switched_off_scaled_borrowed_and_taken_back(visit):
    visit.page.wait_for_function("() => window.seen.counted")
    assert re.match(r"\d+ of \d+ heads matter", visit.text(".count"))
    visit.choose(".make .head", "head 1")
    visit.click(".make button", "studied")
    assert visit.count(".list li") == 1 and "head 1" in visit.text(".list li")
    assert "Unchanged, the model says" in visit.text(".unchanged") and visit.count(".thumb.off") == 1
    with visit.page.expect_request("**/api/ask") as asked:
        visit.until("answered", lambda: visit.page.locator(".list input").fill("1.5"))
    assert asked.value.post_data_json["edits"][0]["scale"] == 1.5
    assert visit.text(".list output") == "× 1.5"
    visit.choose(".make .which", [o for o in visit.page.locator(".which option").all_inner_texts() if "MLP" in o][0])
    visit.click(".make button")
    visit.page.locator(".make .which").select_option(index=visit.count(".make .which option") - 1)  # a word
    visit.click(".make button")
    visit.page.locator(".make .which").select_option(index=0)
    visit.page.locator(".make .how").select_option(index=2)  # another scene
    visit.click(".make button")
    assert visit.count(".list li") == 4 and "as in scene 2" in visit.text(".list li:nth-child(4)")
    visit.click(".list li:nth-child(2) .plain")
    assert visit.count(".list li") == 3
    source, target = visit.page.locator("#scenes li:nth-child(5) button"), visit.page.locator("#stage")
    visit.until("borrowed", lambda: source.drag_to(target))
    assert "as in scene 5" in visit.text(".list li:nth-child(4)")
    visit.click(".undo", "studied")
    assert visit.count(".list li") == 0 and not visit.page.locator(".unchanged").is_visible()


# ---------------------------------------------------------------------------------------------- 6: two runs


def test_two_runs_answer_side_by_side(visit):
    def beside():
        visit.page.locator("#beside").select_option(index=2)

    visit.until("studied", beside)
    visit.page.wait_for_function("() => document.querySelectorAll('.side .study').length === 2")
    names = visit.page.locator(".side .name").all_inner_texts()
    assert len(set(names)) == 2
    visit.page.locator(".side:nth-child(2) .make button").click()
    visit.page.wait_for_function("() => document.querySelectorAll('.side:nth-child(2) .list li').length === 1")
    assert visit.count(".side:nth-child(1) .list li") == 0, "a change is of one run"
    visit.click('.side:nth-child(1) button[data-value="rollout"]', "viewed")
    assert visit.page.locator('.side:nth-child(2) button[data-value="rollout"]').get_attribute("aria-checked") == "true"


def test_each_of_two_runs_is_asked_what_it_takes(made):
    """The second one is asked nothing, chooses its answer, and numbers other scenes."""
    other = {"asked": "nothing", "writes": False, "scenes": "others", "lacks": ["it chooses its answer"]}
    asked = []

    def models(route):
        route.fulfill(json=[a | b for a, b in zip(route.fetch().json(), ({}, other), strict=True)])

    def ask(route):
        asked.append(route.request.post_data_json)
        route.continue_() if "scene" in asked[-1]["picture"] else route.fulfill(status=400, json={"error": "asked"})

    with Visit(made.address) as visit:
        visit.page.route("**/api/models", models)
        visit.open()
        visit.until("answered", lambda: visit.page.locator("#temperature").fill("0.5"))
        visit.page.route("**/api/ask", ask)
        visit.until("answered", lambda: visit.page.locator("#beside").select_option(index=2))
        visit.page.wait_for_function("() => document.querySelectorAll('.side .trouble')[1]?.textContent === 'asked'")
        (first,) = [one for one in asked if "scene" in one["picture"]]
        (second,) = [one for one in asked if "data" in one["picture"]]
        scene = visit.page.locator('.scene[aria-pressed="true"] img').get_attribute("src")
        assert first["question"] and first["temperature"] == 0.5
        assert second["question"] is None and second["temperature"] == 0 and second["picture"]["data"] == scene
        assert [visit.page.locator(".lacks").nth(i).inner_text() for i in (0, 1)] == [
            "",
            "This model: it chooses its answer.",
        ]
        asked.clear()
        visit.page.locator("#model").select_option(index=1)  # the one that is asked something still leads
        visit.page.locator("#beside").select_option(index=1)
        visit.page.locator("#question").wait_for()
        visit.page.locator("#beside").select_option(index=0)
        visit.page.wait_for_function("() => document.querySelectorAll('.side').length === 1")
        visit.page.locator("#question").wait_for(state="hidden")
        visit.page.locator("#examples").wait_for(state="hidden")
        visit.page.locator("#heat-row").wait_for(state="hidden")


# ---------------------------------------------------------------------------------------------- 7: tour and sharing


def taken(visit, *changed):
    """The tour from its first step to its last; `changed` are (number, what is done there in place of the usual)."""
    visit.page.locator("#start-tour").click()
    steps = [
        lambda: visit.click("#scenes li:nth-child(2) button"),
        lambda: visit.click("#examples li:nth-child(2) button"),
        None,  # whether an answer changes is for the model to say
        lambda: visit.click(".column:first-child li:nth-child(3) button"),
        lambda: visit.click('button[data-value="rollout"]', "viewed"),
        lambda: visit.click(".make button"),
        lambda: visit.click(".undo"),
        lambda: (visit.page.locator("#share-part summary").click(), visit.click(".copy", "shared")),
    ]
    for number, act in changed:
        steps[number - 1] = act
    for number, act in enumerate(steps, 1):
        assert visit.text("#tour .step") == f"Step {number} of 8"
        assert visit.count(".toured") == 1
        assert visit.text("#tour .next") == ("Finish" if number == 8 else "Skip")
        if act:
            act()
            assert visit.text("#tour .done").startswith("Done.")
        visit.page.locator("#tour .next").click()
    assert not visit.page.locator("#tour").is_visible() and visit.count(".toured") == 0


def test_the_tour_sees_what_was_done(visit):
    taken(visit)


@pytest.mark.parametrize("kind", ["vilt", "caption", "clip", "voice"])
def test_each_step_of_the_tour_can_be_done_with_every_kind_of_run(data, tmp_path, kind):
    folder, sound = tmp_path / kind, tmp_path / "said" / "test0.wav"
    if kind == "voice":
        system = tiny_system(tiny_options(folder, data=small_recordings(tmp_path / "said", train=4, test=2)))
        system.save(folder)
        save_weights(folder / "model.safetensors", system.model)
    else:
        make_other(data, folder, **SYSTEMS[kind] | ({"max_caption_tokens": 4} if kind == "caption" else {}))
    with play.served(folder) as (address, _), Visit(address) as visit:
        hear = partial(visit.page.set_input_files, "#sound", sound)
        visit.page.goto(address)
        if kind == "voice":
            visit.page.wait_for_selector("#voice")
            hear()
        visit.page.wait_for_function("() => window.seen.studied")
        hot = (2, lambda: visit.until("answered", lambda: visit.page.locator("#temperature").fill("0.3")))
        follow = (4, lambda: visit.until("viewed", lambda: visit.page.locator(".number select").select_option(index=1)))
        file = (8, lambda: (visit.page.locator("#share-part summary").click(), visit.click("button.file", "shared")))
        own = {
            "vilt": [follow],
            "caption": [hot],
            "clip": [(2, lambda: visit.click("#examples button")), follow],
            "voice": [(1, lambda: visit.until("studied", hear)), hot, file],
        }
        visit.page.wait_for_selector(".number")
        taken(visit, *own[kind])
        if kind in ("vilt", "clip"):
            assert visit.count(".other:enabled") == 0, "what chooses its answer goes on from none"
        assert visit.count(".badge.bad") == 0 and visit.window.log() == []


def test_a_link_to_a_scene_that_is_not_among_those_shown_opens_it(visit, made):
    visit.click("#scenes li:nth-child(2) button", "studied")
    label = visit.page.locator("#canvas .object").first.get_attribute("aria-label")
    visit.page.locator("#share-part summary").click()
    visit.click(".copy", "shared")
    with Visit(made.address) as other:
        other.page.route("**/api/scenes?*n=12*", lambda route: route.fulfill(json=route.fetch().json()[2:]))
        other.open("#" + visit.page.input_value("#link").partition("#")[2])
        assert other.page.locator("#canvas .object").first.get_attribute("aria-label") == label
        assert other.count('.scene[aria-pressed="true"]') == 0 and "The data set says" in other.text(".truth")
        assert other.window.log() == []


def test_a_state_travels_by_link_and_file_and_as_picture_and_report(visit, made, tmp_path):
    visit.page.locator("#question").fill(HOSTILE)
    visit.click("#asked button", "studied")
    visit.click(".make button", "studied")
    visit.page.locator("#share-part summary").click()
    visit.click(".copy", "shared")
    link = visit.page.input_value("#link")
    saved = {}
    for button, name in (("file", "state.json"), ("png", "view.png"), ("report", "report.html")):
        with visit.page.expect_download() as download:
            visit.page.locator(f"#share-part button.{button}").click()
        download.value.save_as(tmp_path / name)
        saved[name] = tmp_path / name
    with Image.open(saved["view.png"]) as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").resize((64, 64)).getcolors(4096)) > 50
    assert "Unchanged" not in saved["report.html"].read_text()[:200] and "<script" in saved["report.html"].read_text()
    state = json.loads(saved["state.json"].read_text())
    assert state["version"] == 1 and state["question"] == HOSTILE and len(state["sides"][0]["edits"]) == 1
    with Visit(made.address) as other:
        other.open(link.removeprefix(made.address).removeprefix("/"))
        assert other.page.input_value("#question") == HOSTILE and other.count(".list li") == 1
        assert other.text(".live-word b") == visit.text(".live-word b")
        other.click(".undo")
        other.until("answered", lambda: other.page.set_input_files(".open", saved["state.json"]))
        assert other.count(".list li") == 1
        assert other.window.log() == [] and other.page.title() != "taken"


UNFIT = [
    ({"version": 2}, "it is of version 2, and this page reads version 1"),
    ({"version": HOSTILE}, "it is of version <img src=x oner"),
    ({"temperature": "hot"}, "its state, temperature must be a number from 0 to 5"),
    ({"extra": 1}, "its state must be without “extra”"),
    ({"sides": []}, "its state, sides must be a list of 1 to 2"),
    ({"sides": [{"model": HOSTILE, "edits": [], "start": []}]}, f"the run “{HOSTILE}”, which is not open here"),
    ({"picture": {"data": "https://example.org/x.png"}}, "its state, picture, data must be a picture as a data URL"),
    ("not json", "it is no JSON"),
]


def test_a_state_that_does_not_fit_is_a_line(visit, tmp_path):
    model = visit.page.input_value("#model")
    whole = {"version": 1, "picture": {"objects": []}, "question": "?", "temperature": 0, "seed": 0}
    whole |= {"sides": [{"model": model, "edits": [], "start": []}], "view": None}
    for change, said in UNFIT:
        (tmp_path / "s.json").write_text(change if isinstance(change, str) else json.dumps(whole | change))
        visit.until("answered", lambda: visit.page.set_input_files(".open", tmp_path / "s.json"))
        assert said in visit.text("#notice") and "\n" not in visit.text("#notice")


# ---------------------------------------------------------------------------------------------- 8: training


def test_a_run_in_training_shows_its_curves_and_answers_anew(made):
    asked = []

    def training(route):
        asked.append(int(re.search(r"after=(\d+)", route.request.url)[1]))
        start = asked[-1]
        rows = [{"step": 20 * n + 20, "loss": 3.0 / (n + 1), "token_accuracy": 0.5} for n in range(start, start + 3)]
        rows[-1]["val"] = {"accuracy": 0.4 + 0.1 * len(asked)}
        route.fulfill(json={"rows": rows, "running": len(asked) < 2, "step": start, "loaded": len(asked)})

    def models(route):
        route.fulfill(json=[model | {"training": True, "loss_unit": "nats a token"} for model in route.fetch().json()])

    with Visit(made.address) as visit:
        visit.page.route("**/api/training*", training)
        visit.page.route("**/api/models", models)
        visit.open()
        visit.page.wait_for_function("() => window.seen.trained")
        assert asked == [0, 3], "only what is new is asked for"
        loss = visit.page.locator("#training svg").first.text_content()
        assert "nats a token" in loss and "step" in loss
        assert visit.count("#training polyline") == 3
        visit.page.evaluate("() => scrollTo(0, document.body.scrollHeight)")
        scene, curves = (visit.page.locator(name).bounding_box() for name in ("#scene-part", "#training"))
        assert curves["x"] >= scene["x"] + scene["width"], "the scene follows as one scrolls, and lies over no curve"
        said = "Training has ended: step 120. Answers come from the checkpoint of step 3."
        assert visit.text("#training .state") == said
        assert "validation 0.600" in visit.page.locator("#training svg").nth(1).get_attribute("aria-label")
        assert visit.window.log() == []


# ---------------------------------------------------------------------------------------------- what must not happen


def test_two_tabs_are_independent(visit, made):
    before = visit.text(".typed")
    with Visit(made.address) as other:
        other.open()
        other.choose(".make .head", "all heads")
        other.click(".make button", "studied")
        visit.click("#asked button")
        assert visit.text(".typed") == before and visit.count(".list li") == 0


def test_it_fits_every_screen_and_everything_has_a_name(visit):
    for width in (360, 1280, 3840):
        visit.window.resize(width)
        assert visit.page.evaluate("() => [innerWidth, document.documentElement.scrollWidth]") == [width, width]
    unnamed = visit.page.evaluate(
        "() => [...document.querySelectorAll('button, select, input:not([type=file]), [role=img], summary')]"
        ".filter((e) => !e.getAttribute('aria-label') && !e.textContent.trim() && !e.labels?.length)"
        ".filter((e) => !e.querySelector('img[alt]'))"
        ".map((e) => e.outerHTML)"
    )
    assert unnamed == []
    for scheme in ("dark", "light"):
        visit.page.emulate_media(color_scheme=scheme)
        visit.page.wait_for_function("(theme) => document.documentElement.dataset.theme === theme", arg=scheme)
        assert visit.window.script(browser.AUDIT) == []


def test_long_answers_are_whole_and_leave_the_figures_beside_them_in_sight(visit):
    visit.page.wait_for_function("() => window.seen.counted")
    visit.click(".make button", "studied")
    long = "a large blue square at the bottom right, " * 9
    fill = """(long) => {
        const all = (selector) => [...document.querySelectorAll(selector)];
        const held = (selector) => all(selector).every((e) => e.scrollWidth <= e.clientWidth + 1);
        all(".other b, .matter td:nth-child(2) b, .versus b, .mark").forEach((e) => { e.textContent = long; });
        const line = (e) => e.offsetHeight < 2 * parseFloat(getComputedStyle(e).lineHeight);
        const low = all(".mark").every((e) => line(e) && e.offsetWidth <= e.parentElement.offsetWidth);
        return [held(".other b"), low, held(".matter .scroll"), held(".difference .scroll")];
    }"""
    for width in (720, 1280):
        visit.window.resize(width)
        assert visit.page.evaluate(fill, long) == [True] * 4, width
    visit.window.resize(360)
    assert visit.page.evaluate(fill, long)[:2] == [True, True], "on a phone tables may be scrolled"
    dots = "() => getComputedStyle(document.querySelector('.stepwise td.key'), '::before').content"
    assert visit.page.evaluate(dots) == "none", (
        "the keys of the curves have a square of their colour, those of a head none"
    )


def test_a_server_that_is_gone_says_so_and_comes_back(made):
    with Visit(made.address) as visit:
        visit.open()
        visit.window.context.set_offline(True)
        visit.page.locator("#asked button").click()
        visit.page.wait_for_selector("#notice:not([hidden])")
        assert "does not answer" in visit.text("#notice") and "does not answer" in visit.text(".trouble")
        visit.until("answered", lambda: visit.window.context.set_offline(False))
        assert not visit.page.locator("#notice").is_visible() and not visit.page.locator(".trouble").is_visible()


def test_a_refusal_stands_beside_the_answer(made):
    with Visit(made.address) as visit:
        visit.page.route("**/api/ask", lambda route: route.fulfill(status=400, json={"error": f"no {HOSTILE}"}))
        visit.page.goto(made.address)
        visit.page.wait_for_selector(".trouble:not([hidden])")
        assert visit.text(".trouble") == f"no {HOSTILE}"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="counts threads in /proc")
def test_a_window_that_is_closed_leaves_no_thread(made):
    def threads():
        return len(os.listdir(f"/proc/{made.process}/task"))

    with Visit(made.address) as first:
        first.open()
    before = threads()
    for _ in range(2):
        with Visit(made.address) as visit:
            visit.page.goto(made.address)
            visit.page.wait_for_function("() => window.seen.answered")
    for _ in range(50):
        if threads() <= before:
            return
        time.sleep(0.1)
    assert threads() <= before


def test_the_figures_are_printed(made, capsys):
    """Of a tiny run, and never asserted: `python -m bench play` measures the default run."""
    with browser.Browser() as window:
        measured = play.figures(window.page, made.address, repeats=3, seconds=1.0)
    with capsys.disabled():
        print("", *(f"{name}: {value:.1f} (goal {play.GOALS[name]})" for name, value in measured.items()), sep="\n  ")
