"""`export --push` against a stand-in of the Hub on this machine, spoken to by the real client; and the model's page."""

import base64
import json
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import ModelCard, constants
from run_helpers import command, make_run
from vqa_helpers import ROOT

from vqa_scratch.errors import UserError

OLD = ROOT / "tests" / "old_runs"


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    folder = make_run(data, tmp_path_factory.mktemp("secret") / "run", question_prompt=True)
    summary = {"accuracy": 0.5, "scored_by": "exact match", "scored_split": str(data / "mine.csv")}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


class Hub(ThreadingHTTPServer):
    """A Hub with one user, `me`. What is uploaded is in `files`; `others` names answers that a path gets instead."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.files: dict[str, bytes] = {}
        self.private: dict[str, bool] = {}
        self.others: dict[str, tuple[int, dict]] = {}
        self.address = f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, token: str, body: bytes) -> tuple[int, dict]:
        if token != "Bearer hf_mine":
            return 401, {"error": "Invalid username or password."}
        for part, other in self.others.items():
            if part in path:
                return other
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if wanted["organization"] != "me":
                return 403, {"error": f"You don't have the rights to create a model under {wanted['organization']}"}
            address = {"url": f"{self.address}/{name}"}
            if name in self.private:
                return 409, address | {"error": "You already created this model repo"}
            # None stands for what the owner has set as the usual: here, public
            self.private[name] = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            return 200, address
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            return 200, {
                "files": [dict(f, uploadMode="regular", shouldIgnore=False) for f in json.loads(body)["files"]]
            }
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"{self.address}/me/x/commit/1", "commitOid": "1" * 40, "hookOutput": ""}
        name = path.removeprefix("/api/models/").partition("?")[0]
        return (200, {"id": name, "private": self.private[name]}) if name in self.private else (404, {})


class Answering(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, values = self.server.answer(self.path, self.headers.get("Authorization", ""), body)
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Hub:
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    yield server
    server.shutdown()
    server.server_close()


def test_what_is_published_is_what_was_exported(run, data, hub, tmp_path, capsys):
    """The files of this export to the byte, nothing that lay in the folder before, and no path of this machine."""
    out = tmp_path / "out"
    command("export", run, out)
    exported = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    (out / "diary.txt").write_text("mine")
    (out / "image" / "photo.png").write_bytes(b"mine too")
    command("export", run, out, "--push", "me/my-vqa")
    assert hub.files == {name: (out / name).read_bytes() for name in exported}
    assert hub.private == {"me/my-vqa": False} and f"published: {hub.address}/me/my-vqa" in capsys.readouterr().out
    for name, content in hub.files.items():
        for secret in (run.parent.name, data.name, str(tmp_path.parent), "mine.csv"):
            assert secret.encode() not in content, (name, secret)
    command("export", run, out, "--push", "me/my-vqa")  # once more: a new version


def test_private_stays_private(run, hub, tmp_path):
    command("export", run, tmp_path / "out", "--push", "me/a", "--private")
    assert hub.private == {"me/a": True} and "README.md" in hub.files
    hub.private["me/b"], hub.files = False, {}
    with pytest.raises(UserError, match="me/b is a public model already, so --private cannot hold"):
        command("export", run, tmp_path / "out", "--push", "me/b", "--private")
    assert hub.files == {}


def test_what_the_hub_refuses_is_said_in_a_line(run, hub, tmp_path, monkeypatch):
    def refused(message: str, name: str = "me/x") -> None:
        with pytest.raises(UserError, match=message) as error:
            command("export", run, tmp_path / "out", "--push", name)
        assert str(tmp_path / "out") in str(error.value) and len(str(error.value)) < 300

    refused("you/x is not published: the Hub says the token may not write there", "you/x")
    hub.private["you/x"] = False  # it exists, so making it is no error, but writing is
    hub.others["/preupload/"] = (403, {"error": "Forbidden"})
    refused("you/x is not published: the Hub says the token may not write there", "you/x")
    hub.others = {"/api/validate-yaml": (400, {"errors": [{"message": '"license" must be one of them'}]})}
    refused("me/x is not published .ValueError: Invalid metadata in README.md")
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    refused("me/x is not published: the Hub says it does not accept the token")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    refused("me/x is not published .ConnectError: .*: is there a network")


@pytest.mark.parametrize("name", ["x", "me/x/y", "me/a b", "/x", "me/", "../x", "me/-x", "", "me/" + 97 * "x"])
def test_names_are_checked_before_anything_is_written(run, hub, tmp_path, name):
    with pytest.raises(UserError, match="a model on the Hub is named OWNER/NAME"):
        command("export", run, tmp_path / "out", "--push", name)
    assert not (tmp_path / "out").exists()


def test_a_login_is_asked_for_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(UserError, match="not logged in to the Hub: run `hf auth login`, or set HF_TOKEN"):
        command("export", run, tmp_path / "out", "--push", "me/x")
    with pytest.raises(UserError, match="--private says how to publish: it needs --push OWNER/NAME"):
        command("export", run, tmp_path / "out", "--private")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "task", "metric"),
    [
        ("vqa-mean", "visual-question-answering", "accuracy"),
        ("vilt", "visual-question-answering", "accuracy"),
        ("caption", "image-to-text", "bleu"),
    ],
)
def test_the_page_has_the_hubs_metadata(name, task, metric, tmp_path):
    """Read back by the Hub's own client: the figures are those of summary.json."""
    shutil.copytree(OLD / name, tmp_path / "run")
    command("export", tmp_path / "run", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md", ignore_metadata_errors=False)
    values = card.data.to_dict()
    assert values["pipeline_tag"] == task and values["metrics"] == [metric] and values["license"] == "other"
    assert values["library_name"] in ("vqa-scratch", "transformers") and "vqa-scratch" in values["tags"]
    (result,) = card.data.eval_results
    assert result.metric_value == json.loads((OLD / name / "summary.json").read_text())[metric]
    assert card.text.lstrip().startswith("# A ")
    (tmp_path / "run" / "summary.json").unlink()  # a run that was stopped before its final figures
    command("export", tmp_path / "run", tmp_path / "out")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.eval_results is None
