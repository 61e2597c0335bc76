"""`data --fetch`: what of a downloaded package becomes the data set, and what is said when it cannot be had."""

import subprocess
import zipfile
from pathlib import Path

import pytest
from run_helpers import command

from vqa_scratch.data import fetch as module
from vqa_scratch.data.fetch import fetch
from vqa_scratch.errors import UserError

FILES = {
    "easy_vqa/data/answers.txt": "red\n",
    "easy_vqa/data/train/questions.json": '[["what color?", "red", 0], ["what shape?", "circle", 1]]',
    "easy_vqa/data/test/questions.json": '[["what color?", "red", 0]]',
    "easy_vqa/__init__.py": "raise RuntimeError",
    "easy_vqa-1.0.dist-info/METADATA": "",
}


@pytest.fixture
def pip(monkeypatch):
    """In place of the program: leaves the wheel where it is told to. Returns its command lines."""
    lines = []

    def run(line: list[str], **_: object) -> subprocess.CompletedProcess:
        lines.append(line)
        with zipfile.ZipFile(Path(line[line.index("-d") + 1]) / "easy_vqa-1.0-py3-none-any.whl", "w") as wheel:
            for name, content in FILES.items():
                wheel.writestr(name, content)
        return subprocess.CompletedProcess(line, 0, "", "")

    monkeypatch.setattr(module.subprocess, "run", run)
    return lines


def test_the_data_of_the_package_and_nothing_else(pip, tmp_path):
    folder = tmp_path / "new" / "easy"
    fetch("easy-vqa", folder)
    found = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    inside = "easy_vqa/data/"
    assert found == {name.removeprefix(inside): text for name, text in FILES.items() if name.startswith(inside)}
    assert list(folder.parent.iterdir()) == [folder], "the wheel is left behind"
    assert pip[0][-1] == "easy-vqa==1.0" and "--no-deps" in pip[0]


def test_what_is_there_is_kept(pip, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine is there already: leave out --fetch"):
        fetch("easy-vqa", tmp_path / "mine")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write into the folder .*file is a file"):
        fetch("easy-vqa", tmp_path / "file" / "easy")
    assert not pip


def test_pip_that_fails_is_a_line_and_leaves_nothing(monkeypatch, tmp_path):
    for said, reason in (("warning\nERROR: No matching distribution\n", "No matching distribution"), ("", "no reason")):
        failed = subprocess.CompletedProcess([], 1, "", said)
        monkeypatch.setattr(module.subprocess, "run", lambda *_, failed=failed, **__: failed)
        with pytest.raises(UserError, match=f"pip could not download easy-vqa 1.0: .*{reason}"):
            command("data", tmp_path / "easy", "--fetch", "easy-vqa")
    assert list(tmp_path.iterdir()) == []
