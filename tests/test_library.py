"""The pages that show code: every block runs, in order, in a folder as `python train.py` leaves it."""

import json
import re
import sys
from pathlib import Path

import pytest
from run_helpers import make_run
from vqa_helpers import ROOT, small_data


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A folder with runs/vqa and cache/; it is the working directory."""
    make_run(small_data(tmp_path / "cache"), tmp_path / "runs" / "vqa")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_blocks_of_the_library_page_run(finished, capsys):
    page = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) >= 6
    names = {"__name__": "library"}
    for block in blocks:
        exec(compile(block, "docs/library.md", "exec"), names)
    assert (finished / "mine" / "v2_OpenEnded_mscoco_val2014_questions.json").is_file()
    assert len(json.loads((finished / "answers.json").read_text())) == 20
    printed = capsys.readouterr().out
    assert names["before"] in printed and str(names["study"].certificate) in printed


def test_the_cells_of_the_tour_run(tmp_path, monkeypatch, capsys):
    """With three steps instead of a minute and a half; a notebook is JSON, and its cells are Python."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert any('"--minutes", "1.5"' in text for text in code)
    names = {"__name__": "tour", "display": lambda *shown: None}
    data = small_data(tmp_path / "cache")
    small = "--steps 3 --questions-per-step 64 --eval-questions 20 --width 32 --precision fp32 --no-image-cache"
    flags = ", ".join(f'"{word}"' for word in [*small.split(), "--data", str(data)])
    for text in code:
        text = text.replace('"--minutes", "1.5"', flags)
        text = text.replace('ensure_shapes(Path("cache"), ShapesSpec(seed=0))', repr(str(data)))
        exec(compile(text, "docs/tour.ipynb", "exec"), names)
    assert Path("runs/tour/summary.json").is_file()
    assert "without head" in capsys.readouterr().out
