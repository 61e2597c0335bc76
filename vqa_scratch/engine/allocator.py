"""One setting of the C library that training on a CPU profits from."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h
KEPT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks instead of handing them back to the kernel; returns whether it could.

    A step frees and asks for the same big tensors again. By default each of them is mapped anew and its pages fault in
    one by one: 18,000 faults a step of the `shapes` preset, 5,000 with this; at the book's sizes, where gradients of
    embeddings outgrow glibc's limit for blocks of its own, 140,000 and none. Elsewhere than on glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, KEPT), (M_TOP_PAD, 256 * 2**20))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
