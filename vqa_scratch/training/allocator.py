"""One setting of the C library that training on a CPU profits from."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h
MADV_HUGEPAGE = 14  # Linux' mman.h
PAGE = 2 * 2**20  # bytes of a huge page


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks instead of handing them back to the kernel, and the kernel to map the heap in
    huge pages; returns whether both could be done.

    A step frees and asks for the same big tensors again. By default each of them is mapped anew and its pages fault in
    one by one: 18,000 faults a step of the `shapes` preset, and at the book's sizes 140,000; with this, 30. Elsewhere
    than on Linux with glibc nothing happens. Call it before the first tensor is made.

    Big blocks also get the alignment of a page, not torch's 64 bytes. `posix_memalign` asks for the size and the
    alignment, and gives the cuttings back; cuttings as small as 64 bytes make lead a life of their own in the cache of
    small blocks, do not come back to their block when it is freed, and then it is too small for the next request of
    the same size. A step of PPO at the book's sizes took 15 % longer by that, in memory never used before.
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
