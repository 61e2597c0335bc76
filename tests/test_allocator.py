"""Kept memory: freed blocks are reused without page faults, in a process of its own since the setting is for good."""

import subprocess
import sys

import pytest

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
