"""Finds a checkpoint: a local folder, or a Hub id, whose files are downloaded.

The Hub is asked only for a name that is no folder and looks like an id. Downloaded files are kept: an interrupted
download continues with the missing files.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from vqa_scratch.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def locate(source: str | os.PathLike[str], patterns: Sequence[str], holds: str) -> Path:
    """The folder itself, or the local copy of the Hub repository with the files that match `patterns`.

    `holds` says what the folder should hold, for the error. Raises UserError, one line, if `source` is neither a folder
    nor the id of a repository that can be reached (or is in the cache, whole).
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{source} is a file; give the folder that holds {holds}")
    if isinstance(source, Path) or not _HUB_ID.fullmatch(str(source)):
        raise UserError(f"no folder {source}")
    # Imported here: local folders do not need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(patterns)))
    except LocalEntryNotFoundError as error:
        if "incomplete" in str(error):  # the library names the files
            raise UserError(f"{source} is not whole in the cache: {first_line(error)}") from None
        raise UserError(
            f"no folder {source} here, and the Hub cannot be reached to look for a model of that name"
        ) from None
    except HfHubHTTPError as error:
        raise UserError(f"no folder {source} here, and the Hub says: {first_line(error)}") from None
    except OSError as error:
        raise UserError(f"no folder {source} here, and the Hub cannot be reached ({first_line(error)})") from error
    except Exception as error:  # the library also raises those of its network layers
        raise UserError(
            f"the download of {source} was interrupted ({first_line(error)}); start it again: the files that have "
            "arrived are kept"
        ) from error


def first_line(error: Exception) -> str:
    """The type of the error, and the first line of its message if it has one."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
