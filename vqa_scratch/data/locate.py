"""Turns "a folder or a Hub id" into a folder. Only what looks like an id, never like a path, is asked of the Hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from vqa_scratch.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def locate(folder_or_hub_id: str | Path, patterns: Sequence[str]) -> Path:
    """The folder itself, or the local snapshot of the Hub repository with the files that match `patterns`.

    Raises UserError if it is neither a folder nor the id of a repository that can be reached (or is in the cache).
    """
    folder = Path(folder_or_hub_id)
    if folder.is_dir():
        return folder
    name = str(folder_or_hub_id)
    if folder.exists() or isinstance(folder_or_hub_id, Path) or not _HUB_ID.fullmatch(name):
        raise UserError(f"{name} is not a folder" + ("" if folder.exists() else " (there is no such path)"))
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name} is no folder here, and the Hub does not give it: {first_line}") from error
