"""Every snippet of the course runs and prints what its page says."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

COURSE = sorted((Path(__file__).parent.parent / "docs" / "course").glob("*.md"))
NUMBER = re.compile(r"-?\d+\.\d+")


def snippet_and_output(page: str) -> tuple[str, str]:
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    (output,) = re.findall(r"```text\n(.*?)```", page, re.S)
    return code, output


def printed_by(code: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "<course>", "exec"), {"__name__": "course"})
    return out.getvalue()


def test_there_are_seven_steps_and_each_leads_on():
    assert [page.name[0] for page in COURSE] == list("1234567")
    for page, following in zip(COURSE, COURSE[1:], strict=False):
        assert f"({following.name})" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", COURSE, ids=lambda page: page.stem)
def test_the_snippet_prints_what_the_page_says(page):
    code, expected = snippet_and_output(page.read_text(encoding="utf-8"))
    printed = printed_by(code)
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", expected)
    ours, theirs = (torch.tensor([float(x) for x in NUMBER.findall(text)]) for text in (printed, expected))
    # The last printed digit may round the other way on another machine.
    torch.testing.assert_close(ours, theirs, atol=1.1e-4, rtol=0)
    assert "False" not in expected
