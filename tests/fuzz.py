"""Throws mutated inputs at every entry point and counts the faults:  python tests/fuzz.py --seed 0 --inputs 2000

A fault is anything but success or one clear line: an exception that the programs do not turn into a line, a line of
more than 300 characters, or more than 10 seconds of a core. Input number n of a seed is always the same, and `--only n`
runs it alone and shows its traceback or its line. `tests/test_fuzz.py` runs 300 in the suite, 2,000 among the slow.
"""

import argparse
import contextlib
import io
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch
from fuzz_edges import edges
from fuzz_mutations import change_file
from fuzz_places import Place, Places, without_pictures

from vqa_scratch.command_line import errors_in_one_line

SECONDS, CHARACTERS = 10, 300
WAIT = 6 * SECONDS  # by the clock on the wall: a busy machine is no fault, but to wait for ever is
MEMORY = 6 * 2**30  # bytes that an input may take beside what is there already


class TooLong(BaseException):
    """Raised by the alarm; no `except Exception` catches it."""


@dataclass(frozen=True)
class Fault:
    """One input that ended badly."""

    number: int
    place: str
    change: str  # what was done to the valid input
    kind: str  # the type of the exception and where it was raised, or what is wrong with the line
    detail: str


def alarm(*_: object) -> None:
    raise TooLong


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Within it, calls that take too long are stopped, and memory is limited, so that no input fills the machine."""
    old_handlers = {number: signal.signal(number, alarm) for number in (signal.SIGALRM, signal.SIGPROF)}
    old_memory, threads, folder = resource.getrlimit(resource.RLIMIT_AS), torch.get_num_threads(), Path.cwd()
    sizes = Path("/proc/self/statm")
    if sizes.exists() and not torch.cuda.is_available():  # CUDA takes terabytes of addresses
        used = int(sizes.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, old_memory[1]))
    torch.set_num_threads(1)
    try:
        yield
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, old_memory)
        torch.set_num_threads(threads)
        os.chdir(folder)


def where_from(error: BaseException) -> str:
    """The innermost line of this project in a traceback."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/vqa_scratch/" in f.filename]
    last = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename.split('/vqa_scratch/')[-1].split('/tests/')[-1]}:{last.lineno} {last.name}"


def attempt(place: Place, sandbox: Path, rng: random.Random, out: TextIO, show: bool) -> tuple[str, str]:
    """(kind of the fault or "", detail); what the program prints goes to `out`.

    Without a fault the detail is the line that the program ended with, or "" if it succeeded.
    """
    errors = io.StringIO()
    try:
        signal.alarm(WAIT)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), errors_in_one_line():
            place.use(sandbox, rng)
        return "", ""
    except SystemExit as stop:
        line = errors.getvalue().rpartition("error: ")[2].removesuffix("\n") if stop.code == 2 else ""
        if show:
            print(f"exit {stop.code}: {line!r}")
        if not line:
            return "" if stop.code == 0 else f"exit {stop.code}", errors.getvalue()[-200:]
        if len(line.splitlines()) > 1 or any(ord(letter) < 32 for letter in line):
            return "a message of several lines", line[:400]
        return "a message that is too long" if len(line) > CHARACTERS else "", line[:400]
    except TooLong as error:
        return f"over {SECONDS} s in {where_from(error)}", ""
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or show:
            raise
        return f"{type(error).__name__} in {where_from(error)}", re.sub(r"\s+", " ", str(error))[:200]
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)


def one_input(
    places: list[Place], number: int, seed: int, sandbox: Path, show: bool = False
) -> tuple[str, Fault | None]:
    """Make input `number` of a seed and try it. Returns the place, and the fault if there is one."""
    rng = random.Random(f"{seed}:{number}")
    (place,) = rng.choices(places, [place.weight for place in places])
    shutil.copytree(place.folder, sandbox)
    change = ""
    if place.changed:
        found = [sorted(path for path in sandbox.glob(pattern) if path.is_file()) for pattern in place.changed]
        path = rng.choice(rng.choice([paths for paths in found if paths]))
        change = f"{path.relative_to(sandbox)}: {change_file(path, rng)}"
    os.chdir(sandbox)
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # as strict as a terminal is
    if show:
        print(f"{place.name}: {change}\n{sandbox}")
    try:
        torch.manual_seed(number)
        kind, detail = attempt(place, sandbox, rng, out, show)
    finally:
        os.chdir(sandbox.parent)
        if not show:
            shutil.rmtree(sandbox, ignore_errors=True)
    out.flush()
    change = change or repr(out.buffer.getvalue().partition(b"\n")[0].decode()[-150:])
    if not kind and not detail and change.endswith((": not a number", ": infinite")):
        kind = "weights that are no numbers are accepted"
    return place.name, Fault(number, place.name, change, kind, detail) if kind else None


def run(inputs: int, seed: int = 0, only: int | None = None, root: Path | None = None) -> tuple[Counter, list[Fault]]:
    """(inputs by place, faults) of `inputs` inputs, or of input number `only` alone."""
    tried, faults = Counter(), []
    with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(root or made)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            valid = Places(folder)
            places = [*valid.all(), *edges(valid)]
        with without_pictures(), limited():
            for number in range(inputs) if only is None else [only]:
                name, fault = one_input(places, number, seed, folder / f"input{number}", only is not None)
                tried[name] += 1
                faults += [fault] if fault else []
    return tried, faults


def table(tried: Counter, faults: list[Fault]) -> str:
    """Inputs and faults by place, then the faults by kind, each with the number of its first input."""
    bad = Counter(fault.place for fault in faults)
    lines = [f"{'place':26s} inputs  faults"]
    lines += [f"{name:26s} {tried[name]:6d}  {bad[name] or '':>6}" for name in sorted(tried)]
    lines.append(f"{'all':26s} {tried.total():6d}  {len(faults):6d}")
    kinds = Counter(fault.kind for fault in faults)
    for kind, count in kinds.most_common():
        first = next(fault for fault in faults if fault.kind == kind)
        lines.append(
            f"\n{count} x {kind}\n    --only {first.number}: {first.place}, {first.change}\n    {first.detail}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--only", type=int, help="number of the one input to run, with its traceback")
    given = parser.parse_args()
    tried, faults = run(given.inputs, given.seed, given.only)
    print(table(tried, faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
