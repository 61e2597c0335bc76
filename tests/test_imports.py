"""Who imports whom, read from the import statements: the direction, the leaves, no circle, no forbidden library.

And what follows from how the files are laid out: one class to a name, and what a wheel holds.
"""

import ast
import graphlib
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module may import those of a lower rank, its own package, and neighbours of the same rank (but see the circle test).
RANKS = {
    "vqa_scratch.kernels.reference": 0,
    "vqa_scratch.kernels": 1,
    "vqa_scratch.nn": 2,
    "vqa_scratch.models": 3,
    "vqa_scratch.data": 3,
    "vqa_scratch.connectors": 4,
    "vqa_scratch.generate": 5,
    "vqa_scratch.training": 6,
    "vqa_scratch.report": 6,
    "vqa_scratch.rl": 6,
    "vqa_scratch.study": 6,
    "vqa_scratch.systems": 7,
    "vqa_scratch.language_model": 7,
    "vqa_scratch.zero_shot": 7,
    "vqa_scratch.speech": 7,
    "vqa_scratch.transcription": 7,
    "vqa_scratch.play": 8,
    "vqa_scratch.commands": 9,
    "vqa_scratch.__main__": 10,
    "train": 10,
    "rlhf": 10,
    "tests": 11,
    "bench": 11,
}
# Anybody may import these; they import only each other.
LEAVES = {
    "vqa_scratch",
    "vqa_scratch.errors",
    "vqa_scratch.fastest",
    "vqa_scratch.storage",
    "vqa_scratch.options",
    "vqa_scratch.command_line",
    "vqa_scratch.generation_options",
    "vqa_scratch.metrics",
    "vqa_scratch.weights",
    "vqa_scratch.audio",
    "vqa_scratch.rl.types",
    "vqa_scratch.rl.functional",
}
# Pairs that rank alone would allow.
FORBIDDEN = {(f"vqa_scratch.{high}", "vqa_scratch.data") for high in ("models", "connectors", "generate")}
FORBIDDEN |= {("vqa_scratch.data", f"vqa_scratch.{low}") for low in ("kernels", "nn", "models")}
FORBIDDEN |= {("vqa_scratch.training", f"vqa_scratch.{other}") for other in ("report", "rl", "study")}
FORBIDDEN |= {("vqa_scratch.rl", "vqa_scratch.study"), ("vqa_scratch.study", "vqa_scratch.rl")}
ONLY_IN_TESTS = {"torchvision", "transformers", "trl", "accelerate", "peft", "datasets", "sentence_transformers"}
FOLDERS = ("kernels", "vqa_scratch", "tests", "bench")


def modules() -> dict[str, Path]:
    """Every module of the project by dotted name; a package's __init__ by the package's."""
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")] + list(ROOT.glob("*.py"))
    names = {}
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        names[f"vqa_scratch.{name}" if parts[0] == "kernels" else name] = file  # where it is installed
    return names


@cache
def statements(source: str) -> tuple[list[ast.stmt], list[ast.stmt]]:
    """The import statements of a module: all of them, and those that run when it is imported."""
    tree, kinds = ast.parse(source), (ast.Import, ast.ImportFrom)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)], [n for n in tree.body if isinstance(n, kinds)]


def imports(source: str, known: set[str], inside_functions: bool = True) -> set[str]:
    """Dotted names that a module imports; `from package import module` counts as that module."""
    found = set()
    for node in statements(source)[0 if inside_functions else 1]:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
    return found


def unit(module: str, table) -> str | None:
    """The longest entry of `table` that holds the module; "vqa_scratch" holds only itself."""
    entries = [entry for entry in table if module == entry or module.startswith(entry + ".") and entry != "vqa_scratch"]
    return max(entries, key=len, default=None)


def violations(sources: dict[str, str]) -> list[str]:
    """One line for each import that goes the wrong way."""
    known, wrong = set(sources), []
    for module, source in sources.items():
        leaf, own = unit(module, LEAVES), unit(module, RANKS)
        if leaf is None and own is None:
            wrong.append(f"{module} has no place among the layers")
            continue
        for target in sorted(imports(source, known)):
            top = target.split(".")[0]
            if top in ONLY_IN_TESTS and top not in known and own not in ("tests", "bench"):
                wrong.append(f"{module} imports {target}, which is for tests only")
            if top not in ("vqa_scratch", "train", "rlhf", "tests", "bench"):
                continue
            there_leaf, there = unit(target, LEAVES), unit(target, RANKS)
            if there_leaf is not None and (own is None or not own.startswith("vqa_scratch.kernels")):
                continue
            if module == "vqa_scratch":  # `open_run` imports what it needs when it is called
                continue
            if leaf is not None:
                wrong.append(f"{module} is a leaf but imports {target}")
            elif there_leaf is not None:
                wrong.append(f"{module} stands below everything but imports {target}")
            elif there is None:
                wrong.append(f"{module} imports {target}, which does not exist")
            elif RANKS[there] > RANKS[own] or (own, there) in FORBIDDEN:
                wrong.append(f"{module} must not import {target}")
    return wrong


def project() -> dict[str, str]:
    return {name: file.read_text(encoding="utf-8") for name, file in modules().items()}


def test_imports_go_one_way():
    assert violations(project()) == []


def test_no_circles():
    """At import time; an import inside a function may look back."""
    sources = project()
    graph = {name: imports(source, set(sources), False) & set(sources) - {name} for name, source in sources.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError naming the circle


def test_nobody_imports_a_program():
    """`python -m package` starts one; it imports the others."""
    sources = project()
    for name, source in sources.items():
        programs = {target for target in imports(source, set(sources)) if target.endswith(".__main__")}
        assert not programs or name.startswith("tests."), f"{name} imports {programs}"


def test_a_class_name_occurs_once():
    package = [source for name, source in project().items() if name.startswith("vqa_scratch")]
    classes = [
        node.name for source in package for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)
    ]
    assert len(classes) > 150, "the walk found no package"
    assert {name for name, count in Counter(classes).items() if count > 1} == set()


def test_a_wheel_holds_the_package_and_nothing_beside_it(tmp_path):
    """A top-level `kernels` would hide Hugging Face's package of that name from the user's transformers."""
    pytest.importorskip("setuptools", "77")
    for name in ("vqa_scratch", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name, True, shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    build = [sys.executable, *"-m pip wheel . --no-deps --no-build-isolation --no-index -q -w".split(), str(tmp_path)]
    subprocess.run(build, check=True, cwd=tmp_path / "source")
    (wheel,) = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    assert {file.split("/")[0] for file in files if ".dist-info/" not in file} == {"vqa_scratch"}
    for folder, kind in (("vqa_scratch", "py"), ("vqa_scratch/study", "html"), ("vqa_scratch/study", "css")):
        assert {str(f.relative_to(ROOT)) for f in (ROOT / folder).rglob(f"*.{kind}")} <= set(files)
    assert "vqa_scratch/kernels/attention.py" in files and "vqa_scratch/study/page/report.js" in files


def test_the_walk_finds_the_project():
    names = modules()
    assert {
        "vqa_scratch.kernels",
        "vqa_scratch",
        "vqa_scratch.nn.attention",
        "vqa_scratch.models.gpt2",
        "tests.helpers",
    } <= set(names)


@pytest.mark.parametrize(
    ("module", "statement", "message"),
    [
        (
            "vqa_scratch.kernels.x",
            "from vqa_scratch.errors import UserError",
            "vqa_scratch.kernels.x stands below everything but imports",
        ),
        (
            "vqa_scratch.kernels.reference",
            "from vqa_scratch.kernels import x",
            "vqa_scratch.kernels.reference must not import vqa_scratch.kernels.x",
        ),
        ("vqa_scratch.nn.x", "def f():\n    import vqa_scratch.models.vit", "vqa_scratch.nn.x must not import"),
        (
            "vqa_scratch.models.x",
            "from vqa_scratch import data",
            "vqa_scratch.models.x must not import vqa_scratch.data",
        ),
        ("vqa_scratch.data.x", "from vqa_scratch.models import vit", "vqa_scratch.data.x must not import"),
        (
            "vqa_scratch.models.x",
            "from vqa_scratch.connectors import base",
            "vqa_scratch.models.x must not import vqa_scratch.connectors",
        ),
        ("vqa_scratch.connectors.x", "from vqa_scratch.data import vqa_v2", "vqa_scratch.connectors.x must not import"),
        ("vqa_scratch.study.x", "from vqa_scratch.systems import load", "vqa_scratch.study.x must not import"),
        ("vqa_scratch.training.x", "from vqa_scratch.rl import ppo", "vqa_scratch.training.x must not import"),
        ("vqa_scratch.weights.x", "from vqa_scratch.nn import taps", "vqa_scratch.weights.x is a leaf but imports"),
        ("vqa_scratch.rl.functional", "from vqa_scratch.rl import ppo", "vqa_scratch.rl.functional is a leaf"),
        ("vqa_scratch.training.x", "import train", "vqa_scratch.training.x must not import train"),
        ("vqa_scratch.training.x", "import transformers.utils", "is for tests only"),
        ("vqa_scratch.data.x", "def f():\n    import torchvision", "is for tests only"),
        ("vqa_scratch.stray", "", "vqa_scratch.stray has no place among the layers"),
    ],
)
def test_wrong_imports_are_found(module, statement, message):
    """The rule itself, on made-up modules."""
    names = (
        "vqa_scratch.kernels.x",
        "vqa_scratch.errors",
        "vqa_scratch.models.vit",
        "vqa_scratch.data",
        "vqa_scratch.nn.taps",
    )
    packages = ("vqa_scratch.models", "vqa_scratch.connectors", "vqa_scratch.systems", "vqa_scratch.rl.ppo", "train")
    sources = dict.fromkeys((*names, *packages), "")
    found = violations(sources | {module: statement})
    assert len(found) == 1 and message in found[0]


def test_right_imports_are_not_found():
    sources = {
        "vqa_scratch.errors": "import os",
        "vqa_scratch.weights.files": "from vqa_scratch.errors import UserError\nimport torch",
        "vqa_scratch.nn": "from vqa_scratch.kernels import attention",
        "vqa_scratch.nn.taps": "from vqa_scratch.nn import masks",
        "vqa_scratch.connectors.mean": "from vqa_scratch.models import vit",
        "vqa_scratch.rl.ppo": "from vqa_scratch.rl.types import A\nfrom vqa_scratch import generate, data, training",
        "vqa_scratch.systems.x": "from vqa_scratch import connectors, report, rl, study",
        "train": "from vqa_scratch.rl import ppo",
        "tests.test_x": "import transformers, train",
    }
    assert violations(sources) == []
