"""Keeps arrays that are too large for memory: each is written to a file once, row by row, and mapped from then on."""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from vqa_scratch.errors import UserError
from vqa_scratch.storage import unfinished


def _mapped(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | None:
    """The array in a finished file; None if there is no file, or if it holds another array."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # absent, or damaged from outside
        return None
    return array if array.shape == shape and array.dtype == dtype else None


def mapped_array(
    path: Path, shape: tuple[int, ...], kind: DTypeLike, blocks: Callable[[], Iterable[np.ndarray]], without: str
) -> np.ndarray:
    """The array in the file `path`, mapped read-only. `blocks()`, joined along the first axis, fill a missing file.

    It is written under a temporary name and renamed when it is complete, so a half-written file is never found. Raises
    UserError if it cannot be written; the line ends with `without`, the flag that does without this file.
    """
    dtype = np.dtype(kind)
    array = _mapped(path, shape, dtype)
    if array is not None:
        return array
    try:
        with unfinished(path, tidy=True) as own, open(own, "wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for block in blocks():
                file.write(np.ascontiguousarray(block, dtype).data)
            file.flush()
            os.replace(own, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; {without} does without it") from error
    array = _mapped(path, shape, dtype)
    assert array is not None, f"the blocks do not make an array of {shape}"
    return array


def stamps(paths: Iterable[Path]) -> Iterator[bytes]:
    """Of each file its real place, size and time, as a line: what a file made of them depends on."""
    real = cache(os.path.realpath)  # of the folders: to ask it of each file takes far longer than to look at it
    for path in map(os.fspath, paths):
        folder, name = os.path.split(path)
        place = os.path.realpath(path) if os.path.islink(path) else os.path.join(real(folder), name)
        stat = os.stat(path)
        yield f"{place}|{stat.st_size}|{stat.st_mtime_ns}\n".encode()
