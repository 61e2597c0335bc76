"""What the tests of the training program share: tiny data sets, tiny systems, and whole runs in their own processes."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from vqa_scratch.data.shapes import ShapesSpec, ensure_shapes
from vqa_scratch.systems.base import RunData
from vqa_scratch.systems.options import VQAOptions
from vqa_scratch.systems.vqa import VQASystem
from vqa_scratch.training.precision import Precision

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SPEC = ShapesSpec(train=24, val=6, test=6, holdout=6, questions_per_scene=8)
SIZES = {
    "width": 32,
    "heads": 2,
    "image_layers": 1,
    "text_layers": 1,
    "decoder_layers": 1,
    "questions_per_step": 32,
    "questions_per_image": 8,
    "warmup_steps": 4,
    "eval_questions": 40,
    "log_every": 1,
    "samples": 7,
    "device": "cpu",
    "precision": "fp32",
}


def small_data(folder: Path, **changes: Any) -> Path:
    """The built-in data set with few scenes, below `folder`."""
    return ensure_shapes(folder, replace(SPEC, **changes), progress=False)


def small_options(data: Path, out: Path, **changes: Any) -> VQAOptions:
    """A model of about 80,000 parameters on that data."""
    values = {"data": data, "cache": out.parent / "cache", "out": out, "image_cache": False, "steps": 8}
    return VQAOptions(**values | SIZES | changes)


def small_flags(data: Path, out: Path, **changes: Any) -> list[str]:
    """The command line of `small_options`."""
    values = {"data": data, "cache": out.parent / "cache", "out": out, "steps": 8} | SIZES | changes
    flags = [part for name, v in values.items() if v is not None for part in (f"--{name.replace('_', '-')}", str(v))]
    read_by = ["--text-encoder", "--no-question-loss"] if values["text_layers"] else []
    return [*flags, *read_by, "--no-image-cache"]


def small_system(options: VQAOptions, data: RunData | None = None) -> VQASystem:
    """The system that `train.py` would train, ready for its first step."""
    data = data or VQASystem.read(options)
    system = VQASystem.build(options, data, Precision("fp32", CPU))
    system.train_on(data)
    return system


@dataclass
class Ended:
    """How a process ended: its exit code (-n after signal n) and what it wrote to stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines that begin with "error:"; a traceback counts as one too."""
        return [line for line in self.err.splitlines() if line.startswith(("error:", "Traceback"))]


class Started:
    """A function running in a process of its own, forked from a server that has imported the project already."""

    def __init__(self, function: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        context.set_forkserver_preload(["train", "matplotlib.pyplot", "torch._dynamo"])
        # Pipes rather than files, so that a test may take the disk away.
        self.ends, theirs = zip(*(context.Pipe(duplex=False) for _ in range(2)), strict=True)
        self.process = context.Process(target=_redirected, args=(theirs, function, args))
        self.process.start()
        for end in theirs:
            end.close()

    def end(self) -> Ended:
        """Wait for the process."""
        with ThreadPoolExecutor(2) as pool:
            out, err = pool.map(_everything, self.ends)
        self.process.join()
        return Ended(self.process.exitcode, out, err)


def _everything(end: Connection) -> str:
    with open(os.dup(end.fileno()), errors="replace") as file:
        return file.read()


def _redirected(ends: Sequence[Connection], function: Callable[..., None], args: tuple) -> None:
    for number, end in zip((1, 2), ends, strict=True):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    torch.set_num_threads(1)
    try:
        function(*args)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def train_program(argv: Sequence[str], prepare: Callable[[], None] | None = None) -> None:
    """`python train.py ARGV`, with `prepare()` called first; pictures and the gallery are left out to save time."""
    import train
    from vqa_scratch.command_line import run_program
    from vqa_scratch.systems import questions

    train.draw_panels = questions.write_gallery = lambda *args: None
    if prepare is not None:
        prepare()
    run_program(lambda: train.main(train.read_command_line(argv)))
