"""Makes the C library keep freed memory, which speeds up training on a CPU."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h
MADV_HUGEPAGE = 14  # Linux' mman.h
PAGE = 2 * 2**20  # bytes of a huge page


def keep_freed_memory() -> bool:
    """Make glibc keep freed blocks and the kernel map the heap in huge pages; returns whether both worked.

    A step frees and allocates the same big tensors again. By default each is mapped anew and its pages fault in one by
    one: 18,000 faults a step of the `shapes` preset and 140,000 at the book's sizes; with this, 30. Does nothing
    except on Linux with glibc. Call it before the first tensor is made.

    Big blocks are also aligned to a page instead of torch's 64 bytes. `posix_memalign` allocates the size plus the
    alignment and frees the rest. Rests of 64 bytes go to the cache of small blocks and do not rejoin their block when
    it is freed, so it is too small for the next request of the same size. That made a step of PPO at the book's sizes
    15 % slower. Larger rests do rejoin it, unless something small was put there meanwhile.
    """
    if not sys.platform.startswith("linux"):
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch's c10/core/impl/alloc_cpu.cpp
    libc = ctypes.CDLL(None)
    try:
        mallopt, malloc, free, madvise = libc.mallopt, libc.malloc, libc.free, libc.madvise
    except AttributeError:
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 256 * 2**20))  # -1: never trim
    if not all(mallopt(parameter, value) == 1 for parameter, value in settings):
        return False
    malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # Address space for half of the memory, taken only when written to; the heap stays as large once this is freed.
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    block = malloc(size)
    if not block:
        return False
    start = -(-block // PAGE) * PAGE
    done = madvise(start, (block + size - start) // PAGE * PAGE, MADV_HUGEPAGE) == 0
    free(block)
    return done
