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
    assert faults < 100  # 4 x 64 MiB would be 65,536 pages of 4 KiB, or 128 of 2 MiB
    assert run(keep=False)[1] >= 100


REUSE = """
import torch
from vqa_scratch.training.allocator import keep_freed_memory
kept = keep_freed_memory()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def use():
    block = torch.ones(2**24)
    pinned.extend(bytes(size) for size in range(520, 640))  # what else a program allocates meanwhile
pinned = []
use()
before = resident()
for _ in range(20):
    use()
print(kept, (resident() - before) / 2**26)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone has the setting")
def test_a_block_finds_room_where_one_of_its_size_was():
    kept, blocks = subprocess.run(
        [sys.executable, "-c", REUSE], capture_output=True, text=True, check=True
    ).stdout.split()
    if kept != "True":
        pytest.skip("not glibc, or huge pages are off")
    assert float(blocks) < 5  # of 20; without the alignment most of them take new memory
