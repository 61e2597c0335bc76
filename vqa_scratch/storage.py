"""Writes files so that each appears whole or not at all, even if the program is killed; reads JSON."""

import errno
import fcntl
import json
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from vqa_scratch.errors import UserError

LOCK = ".lock"  # the file in a folder by which a process keeps others out of it


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


def unfinished_name(path: Path) -> Path:
    """A temporary name beside `path`, unique among all machines that share the disk."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary name beside `path`, then rename the file. After an error the old file remains."""
    unfinished = unfinished_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(unfinished)
        unfinished.chmod(usual_mode(0o666))
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; what was there before is kept") from error
    except RuntimeError as error:  # torch's zip writer reports a full disk this way
        own_words = "PytorchStreamWriter" in str(error) or "file write" in str(error)
        if not own_words and not isinstance(error.__context__, OSError):
            raise
        raise UserError(f"cannot write {path}: is the disk full? what was there before is kept") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files below `folder` that killed calls of `write_whole` left."""
    for path in folder.rglob(".*.tmp"):
        if path.is_file():
            path.unlink(missing_ok=True)


def hold(folder: Path) -> IO[str]:
    """Lock a folder until the returned file is closed or the process ends, however it ends.

    Raises UserError if another process has the lock. On a disk that knows no locks it has no effect.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = lock(folder / LOCK)
    if file is None:
        raise UserError(f"another process is writing into {folder}: wait for it, or give another --out")
    return file


def lock(path: Path) -> IO[str] | None:
    """The file, open and locked until it is closed or the process ends; None if another process has the lock."""
    file = open(path, "a")  # noqa: SIM115 -- it stays open as long as the lock is held
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            file.close()
            return None
    if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
        file.close()  # its holder removed it in the meantime
        return lock(path)
    return file


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file. Raises UserError if it cannot be written."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """`write_whole` for text."""
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def write_json(path: Path, values: Any, *, compact: bool = False) -> None:
    """`write_whole` for JSON, indented, or `compact` in as few bytes as possible."""
    write_text(path, json.dumps(values, separators=(",", ":")) if compact else json.dumps(values, indent=2) + "\n")


def read_json(path: Path, object_hook: Any = None) -> Any:
    """The parsed file. Raises UserError that says where it stops being JSON."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file, object_hook=object_hook)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno} (character {error.pos} of {len(error.doc)})"
        raise UserError(f"{path} is not valid JSON at {where}: {error.msg}; is the file complete?") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); is it really the JSON file?") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply to be a file of this project") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
