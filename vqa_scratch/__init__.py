"""Visual question answering and reinforcement learning from feedback, written out in PyTorch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from vqa_scratch.systems.base import System

__version__ = "0.3.0"


def open_run(folder: "Path | str", device: Any = "cpu", precision: str = "fp32") -> "System":
    """Open a run of `train.py`, ready to `ask`, `answer`, or to be studied (docs/library.md).

    Raises UserError if the folder is not such a run, or has no weights yet.
    """
    from vqa_scratch import systems

    return systems.load(folder, device, precision)
