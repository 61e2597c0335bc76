"""docs/ppo.md points at names: they exist, and the thirty-five details are all there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def names_in(path):
    """Functions, classes and methods (`Class.method`) of a file."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return found


def test_every_name_exists_and_no_detail_is_missing():
    text = (ROOT / "docs" / "ppo.md").read_text()
    pointers = re.findall(r"`(\w+\.py)::([\w.]+)`", text)
    assert len(pointers) > 40
    for file, name in pointers:
        assert name in names_in(ROOT / "vqa_scratch" / "rl" / file), f"{file}::{name}"
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", text, re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 36))
    for number, row in rows:
        cells = re.split(r"(?<!`)\|(?!`)", row)
        assert len(cells) == 4 and "::" in cells[2] and all(cell.strip() for cell in cells), number
