"""What the documents point at is there: files, headings, and every module in the list of docs/architecture.md."""

import re
from pathlib import Path

import pytest

from vqa_scratch import __version__

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "bench" / "RESULTS.md"])


def anchors(document: Path) -> set[str]:
    """The headings, as a link names them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_list_of_files_is_whole():
    """In the rows of each folder every module is named, and no other."""
    text = (ROOT / "docs" / "architecture.md").read_text().split("## Every file")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)/` \| (.*) \|$", text, re.M)
    listed = {folder: sorted(re.findall(r"`(\w+)`", files)) for folder, files in rows}
    there: dict[str, list[str]] = {}
    for path in sorted([*ROOT.glob("vqa_scratch/**/*.py"), *ROOT.glob("kernels/*.py")]):
        if path.name != "__init__.py":
            there.setdefault(path.parent.name, []).append(path.stem)
    assert listed.keys() == there.keys()
    for folder, names in there.items():
        assert listed[folder] == sorted(names), f"{folder}/ in the list of docs/architecture.md"


def test_the_changelog_ends_at_the_version():
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[0] == __version__  # the workflow holds a pushed tag to it
