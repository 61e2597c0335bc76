"""Begins a run in a folder or goes on with the one that is there: the same for train.py and rlhf.py."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from vqa_scratch.errors import UserError
from vqa_scratch.options import Options, changeable, check_dependencies, flag, from_json, rivals, rules_of
from vqa_scratch.storage import LOCK, check_writable, hold, read_object, remove_unfinished
from vqa_scratch.training.ranks import World

T = TypeVar("T", bound=Options)
SEEDS = "seeds.json"  # in a folder that holds the runs of --seeds, and is none itself
BEGUN = "a run was begun here\n"  # in the file of the lock; one that --resume makes is empty


@contextmanager
def held(out: Path, resume: bool, program: str, world: World) -> Iterator[None]:
    """Keep other processes out of the folder of a run during the block, and remove what a killed one left half written.

    The main rank does so. A new folder in which nothing was written is removed again, and none is made to --resume in.
    Raises UserError if another process holds the folder, if it cannot be written to, and as `is_new`.
    """
    check_writable(out)
    is_new(out, resume, program)  # if it is refused, nothing is touched; asked again behind the lock
    if not world.main or (resume and not out.is_dir()):
        yield
        return
    new = not out.exists()
    with hold(out) as lock:
        if not resume:
            lock.write_text(BEGUN)
        remove_unfinished(out)
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()
                if new:
                    out.rmdir()


def is_new(out: Path, resume: bool, program: str) -> bool:
    """Whether a run begins in this folder: without --resume, or because it was killed before it wrote anything.

    A kill leaves the file of the lock, though not the lock. Raises UserError if the folder holds a run of another
    program, one that is not to be resumed, the runs of --seeds, or a config.json that is no run's and would be lost.
    """
    if (out / SEEDS).exists():
        raise UserError(f"{out} holds the runs of --seeds; add --seeds to go on with them, or give another --out")
    config, lock = out / "config.json", out / LOCK
    values = read_object(config) if config.is_file() else {}
    if values.get("program", program) != program:
        raise UserError(f"{out} is a run of {values['program']}; give another --out")
    if not resume and checkpoint_path(out).exists():
        raise UserError(f"{out} already holds a run; add --resume to continue it, or give another --out")
    if not resume and config.exists() and "program" not in values:
        raise UserError(f"{config} is not of a run, as the folder of a released model has one; give another --out")
    return not resume or (not config.exists() and lock.is_file() and lock.read_text() != "")


def checkpoint_path(out: Path) -> Path:
    """Where a run in this folder has its last checkpoint, once it has one."""
    return out / "checkpoints" / "last.pt"


def go_on(options: T, values: Mapping[str, Any], presets: Mapping[str, Mapping[str, Any]], where: Path) -> T:
    """The options of a run that is resumed: `values`, read from `where`, with what `options` ask for and may change.

    Raises UserError for an option that is asked for with another value than the run's, if it must keep its own.
    """
    kind: Callable[..., T] = type(options)
    saved, given, own = from_json(type(options), values, str(where)), options.given, vars(options)
    if given is None:  # not from a command line
        plain = vars(kind(preset=own["preset"], resume=True, **presets[own["preset"]]))
        given = {name: value for name, value in own.items() if value != plain[name]}
    may_change = changeable(type(options))
    changed = [name for name in given if name not in may_change and given[name] != getattr(saved, name)]
    if changed:
        what = ", ".join(f"{flag(name)} {getattr(saved, name)}, not {given[name]}" for name in changed)
        rules = rules_of(type(options))
        more = [f"; {flag(name)} +N makes a finished one longer" for name in changed if rules[name].more]
        raise UserError(
            f"{own['out']} was started with {what}; a resumed run keeps the options it was started with{''.join(more)}"
        )
    changes = {name: value for name, value in given.items() if name in may_change}
    merged = replace(saved, **changes | {"out": own["out"], "resume": False})
    check_dependencies(type(options), vars(merged), changes)  # the command line could not know the run's other options
    return merged


def lengthened(run: T, more: Mapping[str, float], done: Mapping[str, float], counted: str) -> T:
    """The options of a finished run with `more` (--steps +N) beyond what it has `done` by its last checkpoint.

    `counted` is what summary.json says too: it tells whether the run is finished. So +N given again after a kill adds
    nothing twice: before the next checkpoint it means the same total, and after it the run is not finished. Raises
    UserError if it is not; `done` is empty without a checkpoint.
    """
    out = vars(run)["out"]
    summary = out / "summary.json"
    for name, amount in more.items():
        ended = read_object(summary).get(counted) if summary.is_file() else None
        if not done or ended != done[counted]:
            raise UserError(
                f"{out} is not finished: go on with --resume alone, before {flag(name)} +{amount} makes it longer"
            )
        total = done[name] + amount
        run = replace(run, **{name: total} | dict.fromkeys(rivals(type(run), name)))
        print(f"{round(total, 2)} {name} in all; the learning rate follows its schedule over this new total")
    return run
