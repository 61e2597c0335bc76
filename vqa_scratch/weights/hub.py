"""Finds a checkpoint: a local folder, or a Hub id, whose files are downloaded; publishes one.

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


def check_publishable(name: str) -> None:
    """Raise UserError unless `name` is an OWNER/NAME of the Hub and a token is there. Asks nobody."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name if "/" in name else "")
    except HFValidationError:
        raise UserError(
            f"a model on the Hub is named OWNER/NAME, of letters, digits, '-', '_' and '.', at most 96; not {name!r}"
        ) from None
    if get_token() is None:
        raise UserError("not logged in to the Hub: run `hf auth login`, or set HF_TOKEN to a token that may write")


def publish(folder: Path, files: Sequence[str], name: str, private: bool) -> str:
    """Upload `files`, paths below `folder`, to the model OWNER/NAME of the Hub, which is made if it is missing.

    Returns its address. Raises UserError, one line, if the Hub refuses, cannot be reached, or has a public repository
    of that name where a `private` one is wanted.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api, kept = HfApi(), f"{folder} holds what was exported"
    try:
        address = api.create_repo(name, private=private or None, exist_ok=True)
        public = private and not api.model_info(name).private
        if not public:
            api.upload_folder(
                repo_id=name, folder_path=folder, allow_patterns=list(files), commit_message="Export of vqa_scratch"
            )
    except HfHubHTTPError as error:
        why = {401: "it does not accept the token (log in again: hf auth login)", 403: "the token may not write there"}
        raise UserError(
            f"{name} is not published: the Hub says {why.get(error.response.status_code) or first_line(error)}; {kept}"
        ) from None
    except Exception as error:  # the library also raises those of its network layers, and ValueError for a bad card
        raise UserError(f"{name} is not published ({first_line(error)}): is there a network? {kept}") from error
    if public:
        raise UserError(f"{name} is a public model already, so --private cannot hold; nothing was uploaded")
    return str(address)
