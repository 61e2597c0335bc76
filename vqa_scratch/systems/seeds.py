"""Runs of train.py that differ in their seed alone (`--seeds`), one after another, and how far their figures spread.

seeds.json    {"program", "train": the options, "runs": [the figures of each], "figures": {name: mean, std, median}}
seed0/, ...   the runs, named by their seeds;  curves.png  all of them
"""

import math
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from vqa_scratch.errors import UserError
from vqa_scratch.options import flag, rules_of, to_json
from vqa_scratch.report.curves import draw_panels
from vqa_scratch.storage import hold, read_object, typed, write_json
from vqa_scratch.systems.presets import PRESETS
from vqa_scratch.systems.run_folder import CONFIG, PROGRAM
from vqa_scratch.systems.run_options import RunOptions
from vqa_scratch.training.progress import plain_numbers, read_metrics
from vqa_scratch.training.resume import go_on
from vqa_scratch.training.watch import STOPS

RECORD = "seeds.json"
OF_THIS_CALL = ("preset", "seed", "seeds", "out", "resume")  # a run's own, or given to it in any case


def run_seeds(options: RunOptions, program: str) -> int | None:
    """Run `program`, train.py, once for each seed, then print and write the spread of the figures.

    Each run is a process of its own, in a folder below --out: exactly the run of that seed alone. With --resume those
    that are finished are kept, and the others go on. Returns the signal that stopped it early, if any; exits with the
    code of a run that failed, which has said why. Raises UserError for a folder with other runs.
    """
    if options.more:
        first = options.out / f"seed{options.seed}"
        raise UserError(f"--seeds takes no +N: make each run longer by itself, with --out {first} --resume")
    with hold(options.out) as lock:
        try:
            options = begin_or_go_on(options)
            write_json(options.out / RECORD, {"program": PROGRAM, "train": to_json(options)})
            folders = {seed: options.out / f"seed{seed}" for seed in seeds_of(options)}
            for number, (seed, folder) in enumerate(folders.items(), 1):
                print(f"seed {seed}, {number} of {options.seeds}: {folder}", flush=True)
                if not (folder / "summary.json").is_file():
                    stopped = run_one([sys.executable, program, *flags_of(options, seed, folder)])
                    if stopped is not None:
                        print(f"{number - 1} of {options.seeds} seeds are done; go on with all by --seeds and --resume")
                        return stopped
            conclude(options, folders)
        finally:
            lock.unlink(missing_ok=True)
    return None


def begin_or_go_on(options: RunOptions) -> RunOptions:
    """The options of the runs; with --resume, those that they were begun with."""
    record = options.out / RECORD
    if (options.out / CONFIG).exists():
        raise UserError(f"{options.out} is a run itself; give another --out for the runs of --seeds")
    if options.resume:
        if not record.is_file():
            raise UserError(f"{options.out} holds no runs of --seeds to go on with; begin without --resume")
        options = go_on(options, typed(record, read_object(record), {"train": dict})[0], PRESETS, record)
    elif any(options.out.glob(f"seed*/{CONFIG}")):
        raise UserError(f"{options.out} already holds runs; add --resume to go on with them, or give another --out")
    if seeds_of(options).stop > (rules_of(type(options))["seed"].below or math.inf):
        raise UserError(f"--seed {options.seed} leaves no room for --seeds {options.seeds}: give a smaller one")
    return options


def seeds_of(options: RunOptions) -> range:
    """The seeds of the runs."""
    return range(options.seed, options.seed + (options.seeds or 1))


def flags_of(options: RunOptions, seed: int, folder: Path) -> list[str]:
    """The command line of one of the runs: what differs from the preset."""
    plain = vars(type(options)(preset=options.preset, resume=True, **PRESETS[options.preset]))
    flags = [f"--preset={options.preset}", f"--seed={seed}", f"--out={folder}"]
    for name, value in vars(options).items():
        if name in OF_THIS_CALL or name not in plain or value is None or value == plain[name]:
            continue
        flags.append(
            (flag(name) if value else flag(f"no_{name}")) if isinstance(value, bool) else f"{flag(name)}={value}"
        )
    return [*flags, "--resume"] if (folder / CONFIG).exists() else flags


def run_one(command: list[str]) -> int | None:
    """Run a command to its end; returns the signal that it stopped after. It gets those that this process receives."""
    processes: list[subprocess.Popen] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in STOPS}
    try:  # in a group of its own, so that Ctrl-C does not reach it twice
        processes.append(subprocess.Popen(command, process_group=0))
        code = processes[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code - 128 in STOPS:
        return code - 128
    if code < 0:
        raise UserError(f"the run was killed by signal {-code}; go on with --resume")
    if code > 0:  # it has said why
        sys.exit(code)
    return None


def conclude(options: RunOptions, folders: dict[int, Path]) -> None:
    """Print and write mean, standard deviation and median of every figure that all runs have, and draw their curves."""
    runs = [{"seed": seed} | read_object(folder / "summary.json") for seed, folder in folders.items()]
    numbers = [plain_numbers(run) for run in runs]
    figures: dict[str, dict[str, float]] = {}
    for name in numbers[0]:
        values = [of_run[name] for of_run in numbers if name in of_run]
        if len(values) == len(runs) and name != "seed":
            mean, median = statistics.fmean(values), statistics.median(values)
            figures[name] = {"mean": mean, "std": statistics.stdev(values), "median": median}
    record = {"program": PROGRAM, "train": to_json(options), "runs": runs, "figures": figures}
    write_json(options.out / RECORD, record)
    draw_panels(options.out / "curves.png", [curves(folders)])
    print(f"{f'of {len(runs)} seeds':24s} {'mean':>10s} {'std':>10s} {'median':>10s}")
    for name, row in figures.items():
        if "/" not in name:
            print(f"{name:24s} {row['mean']:10.4f} {row['std']:10.4f} {row['median']:10.4f}")
    print(f"look at {options.out / RECORD} and {options.out / 'curves.png'}")


def curves(folders: dict[int, Path]) -> dict[str, Any]:
    """The panel with the validation accuracy of every run over its steps."""
    lines = {}
    for seed, folder in folders.items():
        points = [
            (row["step"], row["val"]["accuracy"]) for row in read_metrics(folder / "metrics.jsonl") if "val" in row
        ]
        lines[f"seed {seed}"] = ([step for step, _ in points], [accuracy for _, accuracy in points])
    return {"title": "validation accuracy", "ylabel": "", "lines": lines}
