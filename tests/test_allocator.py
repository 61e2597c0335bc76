"""Kept memory: freed blocks are reused without page faults, in a process of its own since the setting is for good."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from vqa_scratch.training import allocator

PROGRAM = """
import resource, torch
from vqa_scratch.training.allocator import keep_freed_memory
kept = keep_freed_memory() if {keep} else None
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(2**24)  # 64 MiB
before = faults()
for _ in range(4):
    torch.ones(2**24)
print(kept, faults() - before)
"""


def run(keep: bool) -> tuple[str, int]:
    program = PROGRAM.format(keep=keep)
    kept, faults = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone has the setting")
def test_freed_blocks_are_used_again_without_page_faults():
    kept, faults = run(keep=True)
    if kept != "True":
        pytest.skip("not glibc, or huge pages are off")
    # 4 x 64 MiB are 65,536 pages of 4 KiB. A block that finds no room where an earlier one was costs 32 huge pages.
    # That depends on where the kernel put the heap, so up to four of them are no failure.
    assert faults <= 4 * 32
    assert run(keep=False)[1] >= 10 * 4 * 32


def test_elsewhere_the_memory_is_left_alone(monkeypatch):
    """Another system, a C library without the setting, and one that refuses it: False, and nothing is taken."""

    def refusing(*_: int) -> int:
        return 0

    def taken(*_: int) -> None:
        raise AssertionError("memory is taken although the setting did not hold")

    refuses = SimpleNamespace(mallopt=refusing, malloc=taken, free=taken, madvise=taken)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")  # else the test would leave it set
    for system, libc in (("darwin", None), ("linux", SimpleNamespace()), ("linux", refuses)):
        monkeypatch.setattr(allocator.sys, "platform", system)
        monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _, libc=libc: libc)
        assert allocator.keep_freed_memory() is False


def test_without_address_space_it_gives_up(monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    asked = []

    def malloc(size: int) -> None:
        asked.append(size)

    libc = SimpleNamespace(mallopt=lambda *_: 1, malloc=malloc, free=SimpleNamespace(), madvise=SimpleNamespace())
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: libc)
    assert allocator.keep_freed_memory() is False and len(asked) == 1
