"""Writes files so that each appears whole or not at all, even if the program is killed; reads JSON."""

import fcntl
import functools
import gc
import glob
import json
import os
import re
import secrets
import shutil
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vqa_scratch.errors import UserError

LOCK = ".lock"  # the file in a folder by which a process keeps others out of it
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # the escape of half a letter: two of them make one


def usual_mode(mode: int) -> int:
    """The usual permissions of a new file (0o666) or folder (0o777); temporary ones are private to the user."""
    mask = os.umask(0)
    os.umask(mask)
    return mode & ~mask


def check_writable(folder: Path) -> None:
    """Raises UserError if no file could be written into `folder`, which need not exist yet. Creates nothing."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"cannot write into the folder {folder}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into the folder {folder}: Permission denied")


@contextmanager
def unfinished(path: Path, *, folder: bool = False, tidy: bool = False) -> Iterator[Path]:
    """A new empty file or folder of a temporary name beside `path`, to be filled and renamed in the block.

    The name is unique among all machines that share the disk, and a lock says that it is in use until the block ends,
    when it is removed if it is still there. `tidy` first removes those that killed writers of the same `path` left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if tidy:
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            remove_left(left)
    held = None
    while held is None:  # once, unless another process tidies up just now
        own = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        own.mkdir() if folder else own.touch()
        with suppress(FileNotFoundError):
            held = lock(own)
    try:
        yield own
    finally:
        os.close(held)
        if own.is_dir():
            shutil.rmtree(own, ignore_errors=True)
        with suppress(OSError):
            own.unlink(missing_ok=True)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary name beside `path`, then rename the file. After an error the old file remains."""
    try:
        with unfinished(path) as own:
            write(own)
            own.chmod(usual_mode(0o666))
            os.replace(own, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; what was there before is kept") from error
    except RuntimeError as error:  # torch's zip writer reports a full disk this way
        own_words = "PytorchStreamWriter" in str(error) or "file write" in str(error)
        if not own_words and not isinstance(error.__context__, OSError):
            raise
        raise UserError(f"cannot write {path}: is the disk full? what was there before is kept") from error


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files below `folder` that killed processes left."""
    for path in folder.rglob(".*.tmp"):
        if path.is_file():
            remove_left(path)


def remove_left(path: Path) -> None:
    """Remove a temporary file or folder, unless a process is writing it or the disk knows no locks to tell by."""
    with suppress(OSError):
        held = lock(path, or_none=True)
        if held is not None:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            os.close(held)


def lock(path: Path, *, or_none: bool = False) -> int | None:
    """A descriptor of a file or folder that is locked until it is closed or the process ends, however it ends.

    None if another process has the lock, or has just removed the file. On a disk that knows no locks there is none, and
    the descriptor has no effect; `or_none` gives None there too.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(path), os.fstat(descriptor)):
            return descriptor
    except (BlockingIOError, PermissionError, FileNotFoundError):
        pass
    except OSError:
        if not or_none:
            return descriptor
    os.close(descriptor)
    return None


@contextmanager
def hold(folder: Path) -> Iterator[Path]:
    """Keep other processes out of a folder during the block. Yields the file that stands for the lock.

    Raises UserError if another process is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, held = folder / LOCK, None
    open(file, "a").close()
    with suppress(FileNotFoundError):
        held = lock(file)
    if held is None:
        raise UserError(f"another process is writing into {folder}: wait for it, or give another --out")
    try:
        yield file
    finally:
        os.close(held)


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file. Raises UserError if it cannot be written."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """`write_whole` for text; half a letter, as a file name may have, is written as its escape."""
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_json(path: Path, values: Any, *, compact: bool = False) -> None:
    """`write_whole` for JSON, indented, or `compact` in as few bytes as possible."""
    write_text(path, json.dumps(values, separators=(",", ":")) if compact else json.dumps(values, indent=2) + "\n")


def read_text(path: str | Path) -> str:
    """A UTF-8 text file. Raises UserError if it cannot be read or is something else."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); is it the right file?") from error


def is_text(value: str) -> bool:
    """Whether a file can hold it: half a letter (a lone surrogate), as a command line or JSON may have, is no text."""
    return value.encode("utf-8", "ignore").decode() == value


def parse_json(text: str, where: object, object_hook: Any = None) -> Any:
    """The value of a JSON text. Raises UserError that names `where` and says where it stops being JSON, or holds text
    that is none."""
    try:
        value = json.loads(text, object_hook=object_hook)
        if _HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno} (character {error.pos} of {len(error.doc)})"
        raise UserError(f"{where} is not valid JSON at {place}: {error.msg}; is the file complete?") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds {error.object[error.start]!a}, half of a letter: it is not text") from error
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply to be a file of this project") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{where} is not valid JSON: {error}") from error


def read_json(path: str | Path, object_hook: Any = None) -> Any:
    """The parsed file. Raises UserError as `read_text` and `parse_json` do."""
    return parse_json(read_text(path), path, object_hook)


@contextmanager
def without_collections() -> Iterator[None]:
    """Inside, Python looks for no circles of garbage: it would go through all that was read again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_object(path: str | Path) -> dict[str, Any]:
    """`read_json` of a file that must hold an object; UserError if it does not."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


@functools.cache
def _kinds(wanted: Any) -> tuple[Any, ...]:
    """The types of a union; of another type itself."""
    return typing.get_args(wanted) or (wanted,)


def typed(where: object, entry: Any, types: Mapping[str, Any]) -> list[Any]:
    """The values of the named keys of `entry`, each of the given type; else UserError that names `where` and the key.

    A type may be a union; with None in it, the key may be missing. A bool is no int here: it is neither id nor size.
    """
    if type(entry) is dict:  # nearly always all is right, and data sets have hundreds of thousands of entries
        values = [entry.get(key) for key in types]
        if all(type(value) in _kinds(wanted) for value, wanted in zip(values, types.values(), strict=True)):
            return values
    if not isinstance(entry, dict):
        raise UserError(f"{where} is a {type(entry).__name__}, not an object")
    missing = [key for key, wanted in types.items() if key not in entry and not isinstance(None, wanted)]
    if missing:
        raise UserError(f"{where} has no {' and no '.join(map(repr, missing))}")
    for key, wanted in types.items():
        value, kinds = entry.get(key), _kinds(wanted)
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in kinds):
            raise UserError(f"{where}: {key!r} is {value!r}, not {getattr(wanted, '__name__', wanted)}")
    return [entry.get(key) for key in types]
