"""The live page's server, asked over real connections: answers, changes, safety, many at once, and its end."""

import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from run_helpers import by_hand, command, make_other, make_run, picture
from test_systems import SYSTEMS
from voice_helpers import small_recordings, tiny_options, tiny_system

import vqa_scratch.play.models
from vqa_scratch.audio.reading import read_wav, write_wav
from vqa_scratch.commands.line import open_latest
from vqa_scratch.commands.play import bind
from vqa_scratch.data.image_files import bytes_in
from vqa_scratch.data.scenes import render
from vqa_scratch.data.shapes import ShapesSpec, scenes_of
from vqa_scratch.data.spoken import drawn_split, mel_of
from vqa_scratch.data.vqa_v2 import read_vqa
from vqa_scratch.errors import UserError
from vqa_scratch.play import answers
from vqa_scratch.play.models import Played
from vqa_scratch.play.pictures import FIRST, Pictures
from vqa_scratch.play.server import LARGEST_BODY, Play, Server
from vqa_scratch.storage import LOCK, append_line
from vqa_scratch.systems.run_folder import newest_run, save_weights
from vqa_scratch.systems.voice_options import VoiceOptions
from vqa_scratch.training.checkpoint import save_checkpoint

QUESTION = "what color is the circle?"
RED = [{"shape": "circle", "color": "red", "size": "large", "x": 20, "y": 20.4}]


class Live:
    """A server in a thread of this process, and requests to it."""

    def __init__(self, models, token=None, ears=None):
        bound, self.hosts = bind("127.0.0.1", 0)
        self.port, self.token, self.models = bound.getsockname()[1], token, models
        self.server = Server(Play(models, ears, self.hosts, token))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [bound]})
        self.thread.start()

    def end(self):
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive() and not any(played.worker.thread.is_alive() for played in self.models)

    def open(self, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        if body is None:
            connection.request("GET", path, headers=headers or {})
        else:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("POST", path, data, {"content-type": "application/json"} | (headers or {}))
        return connection, connection.getresponse()

    def ask(self, path, body=None, headers=None):
        """(status, JSON, or a list of it if it comes line by line)."""
        connection, response = self.open(path, body, headers)
        text = response.read().decode()
        connection.close()
        if response.headers["content-type"].startswith("application/x-ndjson"):
            return response.status, [json.loads(line) for line in text.splitlines()]
        kind = response.headers["content-type"]
        return response.status, json.loads(text) if kind.startswith("application/json") else text


@pytest.fixture(scope="module")
def live(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("play")
    folders = [make_run(data, root / "tokens"), make_run(data, root / "prefix", connector="prefix", decoder_layers=2)]
    models = [
        Played(folder.name, lambda folder=folder: open_latest(folder, "cpu", "fp32"), folder) for folder in folders
    ]
    server = Live(models, ears=SimpleNamespace(words=lambda wave: f"{len(wave)} samples"))
    yield SimpleNamespace(ask=server.ask, open=server.open, port=server.port, folders=folders, models=models, data=data)
    server.end()


@pytest.fixture
def state(live):
    scene = live.ask("/api/scenes?model=tokens&n=1")[1][0]
    return {"model": "tokens", "picture": {"scene": scene["id"]}, "question": scene["questions"][0]["question"]}


def last(answer):
    status, lines = answer
    assert status == 200, lines
    return lines[-1]


# ---------------------------------------------------------------------------------------------------- what is there


def test_models_say_what_they_have_and_what_not(live):
    tokens, prefix = live.ask("/api/models")[1]
    assert (tokens["id"], tokens["asked"], tokens["loss_unit"]) == ("tokens", "question", "nats a token")
    assert prefix["writes"] and prefix["lacks"] == [] and prefix["scenes"] == tokens["scenes"]
    names = {one["name"]: one for one in tokens["attentions"]}
    assert names["decoder.0.cross"] == {"name": "decoder.0.cross", "heads": 2, "reads": True}
    assert not names["decoder.0.self"]["reads"] and "decoder.0.mlp" in tokens["mlps"]
    assert tokens["questions"] and not tokens["training"] and tokens["voice"]


def test_scenes_are_of_the_test_split_with_their_questions(live):
    status, scenes = live.ask("/api/scenes?model=tokens&n=3&seed=0")
    samples = read_vqa(live.data, "test").samples
    assert status == 200 and len(scenes) == 3
    assert scenes[0]["questions"][0] == {"question": samples[0].question, "answer": samples[0].answer}
    assert {"shape", "color", "size", "x", "y"} == set(scenes[0]["objects"][0])
    assert live.ask("/api/scenes?model=tokens&n=3&seed=1")[1] != scenes
    assert live.ask(f"/api/scenes?model=tokens&id={scenes[2]['id']}") == (200, scenes[2:])
    assert live.ask("/api/scenes?model=tokens&id=no") == (400, {"error": "there is no test scene 'no'"})
    assert live.ask("/api/scenes?model=tokens&n=x")[0] == 400 and live.ask("/api/scenes?model=7")[0] == 400


def test_built_in_scenes_are_drawn_without_files_as_in_the_data_set():
    pictures = Pictures(None, "question")
    for (number, scene, _, rng), _ in zip(scenes_of(ShapesSpec(), "test"), range(3), strict=False):
        assert number >= FIRST
        assert np.array_equal(np.asarray(pictures.of({"scene": str(number)})), np.asarray(render(scene, rng)))
    assert {question["answer"] for question in pictures.scenes(1, 0)[0]["questions"]} != {""}
    assert Pictures(None, "text").scenes(1, 0)[0]["questions"][0]["answer"] == ""


def test_what_the_editor_draws_is_what_the_model_sees(live, state):
    about = live.ask("/api/shapes")[1]
    assert about["colors"]["red"] == "#d62828" and about["background"] == "#f0f0f0" and about["sizes"]["large"] == 7
    found = live.ask("/api/study", state | {"picture": {"objects": RED}, "question": QUESTION})[1]
    image = Image.open(io.BytesIO(base64.b64decode(found["image"].partition(",")[2])))
    assert image.getpixel((20, 20)) == (214, 40, 40) and image.getpixel((50, 50)) == (240, 240, 240)


def test_pages_are_served_and_nothing_else(live):
    status, page = live.ask("/", None, {"sec-fetch-site": "cross-site"})  # as after a click on a link
    assert status == 200 and "page/main.js" in page and "export" in live.ask("/study/study.js")[1]
    paths = "/page/..%2fserver.py /page/%2e%2e/models.py /study/__init__.py /page/none.js /nothing /api/no"
    for path in paths.split():
        status, answer = live.ask(path)
        assert status == 404 and "error" in answer, path
    assert live.ask("/api/ask")[0] == 404 and live.ask("/api/models", {})[0] == 405
    connection, response = live.open("/api/shapes")
    assert "script-src 'self'" in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    connection.close()


# ---------------------------------------------------------------------------------------------------- answers


def test_an_answer_comes_token_by_token_as_the_command_gives_it(live, state):
    image = picture(live.data)
    coded = base64.b64encode(image.read_bytes()).decode()
    asked = state | {"picture": {"data": f"data:image/png;base64,{coded}"}, "question": QUESTION}
    *tokens, whole = live.ask("/api/ask", asked)[1]
    text, probability = by_hand(live.folders[0], image, QUESTION)
    assert whole["answer"] == text and whole["probability"] == pytest.approx(probability, rel=1e-4)
    assert [line["token"] for line in tokens] == whole["tokens"]
    assert len(whole["tokens"][0]["alternatives"]) == 5 and "plain" not in whole


def test_it_goes_on_from_an_alternative_and_samples_with_a_seed(live, state):
    whole = last(live.ask("/api/ask", state))
    other = whole["tokens"][0]["alternatives"][1]["id"]
    found = last(live.ask("/api/ask", state | {"start": [other]}))
    assert found["tokens"][0]["id"] == other and found["answer"] != whole["answer"]
    warm = state | {"temperature": 5.0}
    sampled = [last(live.ask("/api/ask", warm | {"seed": seed}))["tokens"] for seed in (1, 1, 2, 3)]
    assert sampled[0] == sampled[1] and not sampled[0] == sampled[2] == sampled[3]
    assert last(live.ask("/api/ask", state | {"temperature": 0}))["tokens"] == whole["tokens"]


EDITS = [
    {"kind": "head", "name": "decoder.0.cross", "head": 1, "scale": 0},
    {"kind": "layer", "name": "decoder.0.mlp"},
    {"kind": "source", "source": "image", "token": 9},
    {"kind": "source", "source": "text", "token": 2},
    {"kind": "key", "key": 3},
    {
        "kind": "patch",
        "name": "image.0.resid_post",
        "head": None,
        "from": {"picture": {"objects": RED}, "question": QUESTION},
    },
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit["kind"])
def test_a_change_is_shown_beside_the_unchanged_answer_with_its_certificate(live, state, edit):
    before = last(live.ask("/api/ask", state))
    found = last(live.ask("/api/ask", state | {"edits": [edit]}))
    assert found["plain"]["tokens"] == before["tokens"] and found["tokens"] != before["tokens"]
    status, answer = live.ask("/api/study", state | {"edits": [edit]})
    study, plain = answer, answer["plain"]
    assert status == 200 and max(study["certificate"][name] for name in ("mass", "output", "softmax")) <= 1e-5
    assert study["answer"]["text"] == found["answer"] and study["edits"] == [edit] and study["writer"] == "decoder"
    assert study["answer"]["probability"] == pytest.approx(found["probability"], abs=1e-5)
    assert plain["answer"] == before["answer"]
    for name, flow in study["flows"].items():
        assert plain["flows"][name]["sources"]["shape"] == flow["sources"]["shape"]
    assert last(live.ask("/api/ask", state))["tokens"] == before["tokens"]  # nothing stays on the model


def test_a_study_is_that_of_the_static_report(live, state):
    status, study = live.ask("/api/study", state)
    assert status == 200 and study["plain"] is None and study["run"] == "tokens" and study["edits"] == []
    assert study["prompt"] == len(study["read"]) - len(study["tokens"]) + 1
    text = next(source for source in study["sources"] if source["name"] == "text")
    twin = study["twins"]["text"]
    assert [study["read"][i].strip() for i in twin if i is not None] == [
        word for word, i in zip(text["labels"], twin, strict=True) if i is not None
    ]
    status, page = live.ask("/api/report", state)
    assert status == 200 and page.startswith("<!doctype html>") and study["answer"]["text"] in page


def test_a_question_asked_aloud_is_heard(live, tmp_path):
    write_wav(tmp_path / "a.wav", torch.zeros(800), 8_000)
    wav, kind = (tmp_path / "a.wav").read_bytes(), {"content-type": "audio/wav"}
    assert live.ask("/api/voice", wav, kind) == (200, {"text": "1600 samples"})
    assert live.ask("/api/voice", b"OggS" + wav, kind) == (
        400,
        {"error": "the recording: no WAV (it begins with b'OggSRIFF')"},
    )
    assert "cut off" in live.ask("/api/voice", wav[:-9], kind)[1]["error"]
    assert live.ask("/api/voice", wav)[0] == 415 == live.ask("/api/ask", wav, kind)[0]


def test_heads_are_knocked_out_one_by_one(live, state):
    status, (first, *found) = live.ask("/api/heads", state | {"model": "prefix"})
    assert status == 200 and first["total"] == len(found) == 4
    for knocked in found:
        edit = {"kind": "head", "name": knocked["name"], "head": knocked["head"]}
        now = last(live.ask("/api/ask", state | {"model": "prefix", "edits": [edit]}))
        assert now["answer"] == knocked["answer"]
        if not knocked["changed"]:
            assert knocked["probability"] == pytest.approx(now["probability"], abs=1e-5)
    everywhere = live.ask("/api/heads", state | {"model": "prefix", "all": True})[1]
    assert everywhere[0]["total"] == 6 == len(everywhere) - 1


@pytest.mark.parametrize("model", ["tokens", "prefix"])
def test_the_numbers_of_any_head_that_reads_are_those_of_the_study(live, state, model):
    state = state | {"model": model}
    study = live.ask("/api/study", state)[1]
    (opened,) = study["opened"]
    name = study["attentions"]["cross"]["names"][opened["layer"]]
    status, found = live.ask("/api/number", state | {"name": name, "head": opened["head"]})
    assert status == 200 and found == opened and name.endswith("cross" if model == "tokens" else "self")
    heads = study["attributions"][0]["heads"][name.rpartition(".")[2]]
    assert found["out"][0]["total"] == pytest.approx(heads[opened["layer"]][opened["head"]], abs=1e-5)
    for changes, message in (
        ({"name": "image.0.self", "head": 0}, "reads no source"),
        ({"name": name, "head": 9}, "heads 0 to 1"),
    ):
        status, answer = live.ask("/api/number", state | changes)
        assert status == 400 and message in answer["error"]


WRONG = [
    ({"question": " "}, "there is no question: write one"),
    ({"picture": {}}, "a picture has one of three: scene, objects or data"),
    ({"picture": {"scene": "0"}}, "there is no test scene '0'"),
    ({"picture": {"objects": [RED[0] | {"x": 65}]}}, "object 1 is at [65, 20.4], outside the 64 x 64 pixels"),
    ({"picture": {"objects": [RED[0] | {"x": float("nan")}]}}, "outside the 64 x 64 pixels"),
    ({"picture": {"objects": [RED[0] | {"color": "pink"}]}}, "object 1: 'pink' is none of red, green, blue"),
    ({"picture": {"objects": RED * 13}}, "a scene has at most 12 objects, not 13"),
    ({"picture": {"data": "http://example.org/a.png"}}, "what is sent is a data URL: data:image"),
    ({"picture": {"data": "data:image/png;base64,@@"}}, "what was sent is no base64"),
    ({"picture": {"data": "data:image/png;base64,AAAA"}}, "is not an image in one of the formats PNG"),
    ({"edits": [{"kind": "key", "key": 1}] * 65}, "at most 64 edits at once, not 65"),
    ({"edits": [{"kind": "head", "name": "decoder.0.cross", "head": 9}]}, "decoder.0.cross has heads 0 to 1, not 9"),
    ({"temperature": -1}, "a temperature is 0 (the likeliest token) or 0.01 to 100.0, not -1"),
    ({"start": ["x"]}, "an answer begins with at most 8 tokens"),
    ({"model": "9"}, "there is no model '9'; there are tokens, prefix"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_is_wrong_with_a_request_is_one_line(live, state, change, message):
    for path in ("/api/ask", "/api/study"):
        status, answer = live.ask(path, state | change)
        assert status == 400 and message in answer["error"] and "\n" not in answer["error"]


def test_hostile_text_is_only_text(live, state):
    hostile = "</script><script>alert(1)</script> \u202e\x00"
    found = last(live.ask("/api/ask", state | {"question": hostile}))
    assert found["notes"] and live.ask("/api/study", state | {"question": hostile})[1]["text"] == hostile.strip()
    for body in (b"{", b"[" * 100_000, b"\xff", b"[]", json.dumps({"model": []}).encode()):
        status, answer = live.ask("/api/ask", body)
        assert status == 400 and "\n" not in answer["error"]


def test_a_fault_of_ours_gives_no_traceback(live, state, monkeypatch):
    monkeypatch.setattr("vqa_scratch.play.answers.answered", lambda *asked: 1 / 0)
    status, answer = live.ask("/api/ask", state)
    assert status == 400 and answer == {"error": "the server failed at this request; its terminal says how"}


@pytest.mark.parametrize("kind", ["vilt", "caption", "clip", "mean", "resampler"])
def test_every_kind_of_system_is_played_with_what_it_has(data, tmp_path, kind):
    short = {"max_caption_tokens": 4} if kind == "caption" else {}
    make_other(data, tmp_path, **SYSTEMS[kind] | short)
    played = Played(kind, lambda: open_latest(tmp_path, "cpu", "fp32"), tmp_path)
    played.worker.close()
    about, job = played.about, SimpleNamespace(send=json.dumps)
    state = {"picture": {"objects": RED}, "question": "" if about["asked"] == "nothing" else (about["questions"])[0]}
    assert played.pictures.scenes(1, 0)[0]["questions"]
    head = {"kind": "head", "name": about["attentions"][0]["name"], "head": 0}
    for edits in ([], [head], [{"kind": "source", "source": "image", "token": 1}]):
        asked = state | {"edits": edits}
        if kind == "mean" and len(edits) and edits[0]["kind"] == "source":
            with pytest.raises(UserError, match="is averaged with others"):
                list(answers.ask(played, asked, job))
            continue
        (found,) = answers.ask(played, asked, job)
        (study,) = answers.study(played, asked, job)
        assert found["answer"] == study["answer"]["text"] and ("plain" in found) == bool(edits)
        assert max(study["certificate"][name] for name in ("mass", "output", "softmax")) <= 1e-5
        json.dumps([found, study], allow_nan=False)
    total, *found = answers.heads(played, state, job)
    assert total["total"] == len(found) > 0
    reading = next(one["name"] for one in about["attentions"] if one["reads"])
    assert next(answers.number(played, state | {"name": reading, "head": 0}, job))["head"] == 0
    if not about["writes"]:
        assert kind in ("vilt", "clip") and "it chooses its answer" in about["lacks"][0]
        assert not next(answers.ask(played, state, job))["ended"], (
            "no token ends what is chosen: the page would call the last word the end"
        )
        with pytest.raises(UserError, match="it has no temperature"):
            list(answers.ask(played, state | {"temperature": 1}, job))


def test_the_unchanged_answer_is_written_once_for_many_changes(live, state, monkeypatch):
    played, done, write = live.models[0], [], vqa_scratch.play.models.answered
    monkeypatch.setattr("vqa_scratch.play.models.answered", lambda opened: done.append(1) or write(opened))
    changes = [{"kind": "layer", "name": name} for name in ("decoder.0.mlp", "decoder.0.cross")]
    asked = state | {"seed": 77}  # nobody else's
    found = [last(live.ask("/api/ask", asked | {"edits": [change]})) for change in changes]
    study = live.ask("/api/study", asked | {"edits": changes})[1]
    assert len(done) == 1 and found[0]["plain"] == found[1]["plain"]
    assert study["plain"]["tokens"] == found[0]["plain"]["tokens"] == last(live.ask("/api/ask", asked))["tokens"]
    monkeypatch.setattr(played, "stamps", [])  # as after a checkpoint
    monkeypatch.setattr(played, "looked", 0.0)
    last(live.ask("/api/ask", asked | {"edits": changes}))
    assert len(done) == 2, "newer weights may answer otherwise"


def test_voices_that_training_never_heard_are_those_of_the_test_split():
    scenes = Pictures(VoiceOptions(seed=3), "sound").scenes(12, 0)
    drawn = drawn_split("test", 3, 3)
    for place in (0, 2):  # every second one is clean
        (said,) = scenes[place]["questions"]
        assert said["answer"] == drawn[place].text
        heard = mel_of(read_wav(bytes_in(scenes[place]["sound"], "audio"), "the sound"))
        assert np.abs(heard - drawn[place].mel).mean() < 0.01  # samples are rounded to 16 bits
    assert scenes[0] not in Pictures(VoiceOptions(seed=3), "sound").scenes(12, 1), "others for another seed"


def test_a_run_that_hears_is_played_with_a_sound(tmp_path):
    data = small_recordings(tmp_path / "data", train=4, test=2)
    system = tiny_system(tiny_options(tmp_path, data=data))
    system.save(folder := tmp_path / "run")
    save_weights(folder / "model.safetensors", system.model)
    played = Played("voice", lambda: open_latest(folder, "cpu", "fp32"), folder)
    played.worker.close()
    assert played.about["asked"] == "sound" and played.ears is not None
    assert played.pictures.scenes(3, 0) == [], "of recordings of one's own there are no others at hand"
    sound = base64.b64encode((data / "test0.wav").read_bytes()).decode()
    state, job = {"picture": {"sound": f"data:audio/wav;base64,{sound}"}}, SimpleNamespace(send=json.dumps)
    state["start"] = [1, played.system.vocabulary.end]  # a short answer
    (plain,) = answers.ask(played, state, job)
    changed = state | {"edits": [{"kind": "layer", "name": "decoder.1.cross"}]}
    (study,) = answers.study(played, changed, job)
    assert study["plain"]["answer"] == plain["answer"] and study["image"] is None and study["sound"]["seconds"] > 0
    assert max(study["certificate"][name] for name in ("mass", "output", "softmax")) <= 1e-5
    for wrong, message in (
        ({"objects": []}, "the picture has no 'sound'"),
        ({"sound": "data:audio/wav;base64,AAAA"}, "the recording: no WAV"),
        ({"sound": "data:image/png;base64,AAAA"}, "what is sent is a data URL: data:audio/"),
    ):
        with pytest.raises(UserError, match=message):
            list(answers.ask(played, {"picture": wrong}, job))


# ---------------------------------------------------------------------------------------------------- safety


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),  # a name that was pointed to 127.0.0.1
        ({"host": "127.0.0.1:1"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-length": str(LARGEST_BODY + 1)}, 413),
    ],
)
def test_only_the_servers_own_page_is_answered(live, state, headers, status):
    found = live.ask("/api/ask", state, headers)
    assert found[0] == status and "error" in found[1]
    if status == 403:
        assert live.ask("/api/models", None, headers)[0] == 403
    own = {"origin": f"http://localhost:{live.port}", "host": f"localhost:{live.port}", "sec-fetch-site": "same-origin"}
    assert live.ask("/api/ask", state, own)[0] == 200


def test_pictures_are_limited_in_bytes_pixels_and_formats(live, state):
    status, answer = live.ask("/api/ask", b" " * (LARGEST_BODY + 2))
    assert status == 413 and "at most 12,000,000 bytes" in answer["error"]
    wrong = (("png", (6000, 5000), "30,000,000 pixels, over the limit"), ("tiff", (9, 9), "formats PNG"))
    for kind, size, message in wrong:
        file = io.BytesIO()
        Image.new("1", size).save(file, kind)
        address = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
        status, answer = live.ask("/api/ask", state | {"picture": {"data": address}})
        assert status == 400 and message in answer["error"]


def test_a_server_for_others_needs_its_token(live):
    server = Live([], "secret")
    try:
        assert server.ask("/api/models")[0] == 403 == server.ask("/api/models?token=secrets")[0]
        assert server.ask("/api/models?token=secret") == (200, [])
        assert server.ask("/page/none.js")[0] == 404
        heard = server.ask("/api/voice?token=secret", b"RIFF", {"content-type": "audio/wav"})
        assert heard == (404, {"error": "nothing here hears: start with --voice-model"})
    finally:
        server.end()


# ---------------------------------------------------------------------------------------------------- many at once


def test_two_hundred_at_once_lose_none_and_each_has_its_own_changes(live, state):
    asked = [state | {"edits": [{"kind": "key", "key": 3}]}] + [
        state | {"temperature": 5, "seed": seed} for seed in range(19)
    ]
    expected = [last(live.ask("/api/ask", one))["tokens"] for one in asked]
    threads = threading.active_count()
    with ThreadPoolExecutor(200) as pool:
        found = list(pool.map(lambda place: last(live.ask("/api/ask", asked[place % 20]))["tokens"], range(200)))
    assert [tokens == expected[place % 20] for place, tokens in enumerate(found)] == [True] * 200
    assert threading.active_count() == threads


def test_long_work_lets_others_pass_and_ends_with_its_page(live, state, monkeypatch):
    pieces = []

    def slow(*asked):
        for piece in range(1000):
            pieces.append(piece)
            time.sleep(0.02)
            yield SimpleNamespace(_asdict=lambda: {})

    monkeypatch.setattr("vqa_scratch.play.answers.without_each_head", slow)
    threads = threading.active_count()
    connection, response = live.open("/api/heads", state)
    assert b"total" in response.readline()
    assert live.ask("/api/ask", state)[0] == 200 and live.ask("/api/models")[0] == 200
    assert 0 < len(pieces) < 1000  # before it was done
    response.close()
    connection.close()
    while (done := len(pieces)) < 1000:  # until no more are made
        time.sleep(0.3)
        if len(pieces) == done:
            break
    assert done < 1000 and threading.active_count() == threads


def test_answers_end_with_the_server_and_are_not_cut_off(live, state, monkeypatch):
    def slow(*asked):
        while True:
            time.sleep(0.01)
            yield SimpleNamespace(_asdict=lambda: {})

    monkeypatch.setattr("vqa_scratch.play.answers.without_each_head", slow)
    folder = live.folders[0]
    server = Live([Played("tokens", lambda: open_latest(folder, "cpu", "fp32"), folder)])
    connection, response = server.open("/api/heads", state)
    response.readline()
    server.server.should_exit = True
    assert response.read().endswith(b"{}\n")  # IncompleteRead if it were cut off
    server.end()
    connection.close()


def test_who_goes_before_the_turn_comes_costs_nothing(live, state, monkeypatch):
    ran, gate = [], threading.Event()
    monkeypatch.setattr("vqa_scratch.play.answers.head_of", lambda *asked: gate.wait(10) and {})
    monkeypatch.setattr("vqa_scratch.play.answers.take_apart", lambda opened: ran.append(opened))
    body = json.dumps(state | {"name": "decoder.0.cross", "head": 0}).encode()
    sent = []
    for path in ("number", "study"):  # the first holds the model, the second waits behind it and is given up
        link = socket.create_connection(("127.0.0.1", live.port))
        head = f"POST /api/{path} HTTP/1.1\r\nhost: 127.0.0.1:{live.port}\r\ncontent-type: application/json\r\n"
        link.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        sent.append(link)
        time.sleep(0.1)
    sent[1].close()
    time.sleep(0.1)
    gate.set()
    assert sent[0].recv(20).startswith(b"HTTP/1.1 200")
    sent[0].close()
    assert live.ask("/api/ask", state)[0] == 200 and ran == []


# ---------------------------------------------------------------------------------------------------- training runs


def test_a_run_that_trains_is_watched_and_opened_again(data, tmp_path):
    folder = make_run(data, tmp_path / "runs" / "old")
    assert newest_run(tmp_path / "runs") == folder
    append_line(folder / "metrics.jsonl", '{"step": 1, "loss": 2.0}')
    played = Played("old", lambda: open_latest(folder, "cpu", "fp32"), folder)
    played.worker.close()
    assert played.training(0) == {
        "rows": [{"step": 1, "loss": 2.0}],
        "total": 1,
        "running": False,
        "step": None,
        "loaded": 1,
    }
    (folder / LOCK).touch()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    assert played.training(1) == {
        "rows": [{"step": 2, "loss": 1.0}],
        "total": 2,
        "running": True,
        "step": None,
        "loaded": 1,
    }
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("{no JSON}\n")
    assert played.described()["training"], "to know whether it trains, no row is read"
    (folder / "metrics.jsonl").write_text(whole)
    os.utime(folder / "metrics.jsonl", (0, 0))
    assert not played.training(0)["running"]
    weights = {name: torch.zeros_like(tensor) for name, tensor in played.system.model.state_dict().items()}
    rest = {"optimizers": [], "scaler": {}, "state": {"step": 40}, "rng": {}, "precision": "fp32"}
    save_checkpoint(folder / "checkpoints" / "last.pt", {"model": weights} | rest)
    played.looked = -1e9
    played.refresh()
    assert played.step == 40 and played.loaded == 2 and not any(p.any() for p in played.system.model.parameters())
    (folder / "checkpoints" / "last.pt").write_bytes(b"cut short")
    played.looked = -1e9
    played.refresh()
    assert played.loaded == 2  # what was there stays
    (folder / "summary.json").write_text("{}")
    played.stamps, played.looked = [], -1e9
    played.refresh()
    assert played.step is None and played.loaded == 3  # the best weights, once it has ended
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == [LOCK]


def test_without_a_run_a_port_or_the_packages_it_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no run below .*: give RUN, or --model, or train one"):
        newest_run(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="Address already in use"):
        bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="cannot serve at 203.0.113.7"):
        bind("203.0.113.7", 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"play needs starlette and uvicorn: pip install 'vqa-scratch\[play\]'"):
        command("play")


def test_ctrl_c_ends_at_once_with_an_answer_open(live, state):
    arguments = ["play", str(live.folders[0]), "--port", "0", "--no-browser", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vqa_scratch", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's background ignores it
    )
    line = process.stdout.readline()
    port = int(line.partition("127.0.0.1:")[2].partition("/")[0])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    for _ in range(2):
        link = socket.create_connection(("127.0.0.1", port))  # one that says nothing
    connection.request("POST", "/api/heads", json.dumps(state | {"all": True}), {"content-type": "application/json"})
    connection.getresponse().readline()
    began = time.perf_counter()
    process.send_signal(signal.SIGINT)
    said = [process.stderr.readline() for _ in range(2)]
    assert said == ["\n", "interrupted\n"] and time.perf_counter() - began < 10
    out, err = process.communicate(timeout=30)  # Python itself takes a while to end beside other work
    assert (process.returncode, out, err) == (130, "", "")
    connection.close()
    link.close()
