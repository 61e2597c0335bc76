"""The runs behind the table of connectors: a row for each connector, a run of `train.py` for each row and seed.

A finished run is kept, one that was stopped goes on, so the table may be made in several sittings.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from bench.results import ROOT
from vqa_scratch import systems
from vqa_scratch.command_line import NearChoice
from vqa_scratch.connectors import CONNECTORS, connector_class
from vqa_scratch.data.shapes import ShapesSpec, ensure_shapes
from vqa_scratch.errors import UserError
from vqa_scratch.storage import read_object, write_json
from vqa_scratch.study.splits import pointing_figures
from vqa_scratch.systems.run_folder import CONFIG
from vqa_scratch.training.precision import formats, pick_device
from vqa_scratch.training.progress import read_metrics

WITH_TEXT = ", text encoder"  # ends the name of a row that has one
SEEDS = (0, 1, 2)  # of a table that is not provisional
KINDS = ("auto", "fp32", "bf16")  # of the precision of all runs
WORDS_STEPS = 400  # in which questions' words are labels: twice the default, since most rows look later than `tokens`
MAP = "cross"  # the map that `study` shows: the weights on the image, mean of heads and layers


class Row(NamedTuple):
    """One way to join the image to the decoder."""

    connector: str
    text_encoder: bool = False

    @property
    def name(self) -> str:
        return self.connector + (WITH_TEXT if self.text_encoder else "")

    @property
    def folder(self) -> str:
        return self.connector + ("-text" if self.text_encoder else "")

    @property
    def flags(self) -> list[str]:
        shared = [f"--connector={self.connector}", "--question-prompt"]
        if self.text_encoder:
            return [*shared, "--text-encoder", "--no-question-loss"]  # it would tell the words
        without = ["--no-text-encoder"] if connector_class(self.connector).reads_text else []
        return [*shared, *without, "--question-loss", f"--question-loss-steps={WORDS_STEPS}"]


def all_rows() -> list[Row]:
    """A row for each connector there is, and a second one for `tokens`."""
    return [row for name in CONNECTORS for row in (Row(name), *([Row(name, True)] if name == "tokens" else []))]


def chosen_rows(names: str | None, rows: Sequence[Row]) -> list[Row]:
    """Those of the comma-separated connectors; all without names. Raises UserError for one that is no row."""
    known = list(dict.fromkeys(row.connector for row in rows))
    wanted = known if names is None else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise UserError(f"--only {name}: there is no such row; there are {', '.join(known)}")
    return [row for row in rows if row.connector in wanted]


def read_seeds(text: str) -> tuple[int, ...]:
    """ "0,1,2". Raises UserError for anything else."""
    seeds = [part.strip() for part in text.split(",")]
    if not all(seed.isdecimal() for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds are different numbers with commas between them, such as 0,1,2, not {text!r}")
    return tuple(map(int, seeds))


@dataclass(frozen=True)
class Plan:
    """What is trained and measured. `more` are further flags of `train.py`, the same for every run that answers."""

    steps: int
    seeds: tuple[int, ...] = SEEDS
    only: str | None = None
    test_images: int | None = None  # of the final figures; None: all
    jobs: int = 1
    out: Path = Path("runs/connectors")
    cache: Path = Path("cache")
    precision: str = "auto"
    rounds: int = 5
    pointed: int = 200  # questions whose map is laid over their object
    spec: ShapesSpec = field(default_factory=ShapesSpec)
    more: tuple[str, ...] = ()
    tower: tuple[str, ...] = ()  # the same of a CLIP's run

    @cached_property
    def kind(self) -> str:
        """The number format of every run; "auto" is bf16 where there are products for it, not what each run times."""
        return formats(self.precision, pick_device("auto"))[-1]

    @property
    def name(self) -> str:
        """Of the folder of its runs; those of other lengths lie elsewhere, so none is taken for another."""
        images = "" if self.test_images is None else f"-{self.test_images}-images"
        return f"{self.steps}-steps-{self.kind}{images}"

    @property
    def flags(self) -> list[str]:
        """The flags of `train.py` that say how long a run is, how it is scored, and what else all runs share."""
        images = [] if self.test_images is None else [f"--test-images={self.test_images}"]
        return [*length_of(self.steps), f"--precision={self.kind}", f"--cache={self.cache}", *images, *self.more]

    def data(self, seed: int) -> Path:
        """The built-in data set of a seed, drawn if it is missing."""
        return ensure_shapes(self.cache, ShapesSpec(**vars(self.spec) | {"seed": seed}))


def run_options(out: str) -> Callable[[Any], Any]:
    """Gives a command the options that are fields of `Plan`; `out` is where its runs usually go."""
    number, folder = click.IntRange(1), click.Path(path_type=Path)
    shown: dict[str, Any] = {"show_default": True}
    options = [
        click.option("--steps", type=number, default=1200, help="Steps of 512 questions a run.", **shown),
        click.option("--seeds", default="0,1,2", help="Fewer than three make the table provisional.", **shown),
        click.option("--jobs", type=number, default=1, help="Runs at once, sharing the threads.", **shown),
        click.option("--precision", type=NearChoice(KINDS), default="auto", help="Of all runs.", **shown),
        click.option("--rounds", type=number, default=5, help="Turns of each side, when timed.", **shown),
        click.option("--test-images", type=number, help="Score on so many images of the test split. [all]"),
        click.option("--out", type=folder, default=out, help="The runs.", **shown),
        click.option("--cache", type=folder, default="cache", help="As in train.py.", **shown),
    ]

    def given(command: Any) -> Any:
        for each in reversed(options):
            command = each(command)
        return command

    return given


# ---------------------------------------------------------------------------------------------- training


class Job(NamedTuple):
    """A run of `train.py`, or of `rlhf.py`: where it is, and its flags."""

    folder: Path
    flags: list[str]
    program: str = "train.py"


def train(job: Job, threads: int) -> None:
    """Train a run, or go on with it, unless it is finished; what it says goes to a file beside its folder. Raises
    UserError if it fails."""
    if (job.folder / "summary.json").is_file():
        return
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    resume = ["--resume"] if (job.folder / CONFIG).is_file() else []
    command = [sys.executable, str(ROOT / job.program), *job.flags, f"--out={job.folder}", *resume]
    log = job.folder.with_name(f"{job.folder.name}.log")
    print(f"training {job.folder}", file=sys.stderr, flush=True)
    with open(log, "a", encoding="utf-8") as file:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code or not (job.folder / "summary.json").is_file():
        said = log.read_text(encoding="utf-8").strip().splitlines() or ["it said nothing"]
        raise UserError(f"{job.folder} is not finished; {log} ends with: {said[-1].removeprefix('error: ')}")


def train_all(jobs: Sequence[Job], at_once: int) -> None:
    """Train what is not trained yet, `at_once` runs beside each other, which share the threads of this process."""
    threads = max(1, torch.get_num_threads() // at_once)
    with ThreadPoolExecutor(at_once) as pool:
        try:
            for done in [pool.submit(train, job, threads) for job in jobs]:
                done.result()
        except BaseException:  # one that failed, or Ctrl-C, which reaches the runs too: they stop with a checkpoint
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def jobs_of(plan: Plan, rows: Sequence[Any]) -> dict[tuple[Any, int], Job]:
    """The runs by row and seed; a row has a `folder`, and the `flags` that make it what it is."""
    jobs = {}
    for seed in plan.seeds:
        shared = [f"--seed={seed}", f"--data={plan.data(seed)}", *plan.flags]
        for row in rows:
            folder = plan.out / plan.name / row.folder / f"seed{seed}"
            jobs[row, seed] = Job(folder, ["--preset=shapes", *shared, *row.flags])
    return jobs


def length_of(steps: int) -> list[str]:
    """The flags that say how long a run is, and when it is evaluated: twelve points make a curve, but an evaluation
    takes as long as four steps, so short runs have fewer."""
    often = max(min(steps, 20), steps // 12)
    return [f"--steps={steps}", f"--eval-every={often}", f"--save-every={often}"]


# ---------------------------------------------------------------------------------------------- what a run gives


@dataclass
class Run:
    """The figures of one finished run."""

    summary: dict[str, Any]
    curve: list[tuple[int, float]]  # questions seen, accuracy on the validation split
    pointing: dict[str, float]  # mass, area and ratio of the shown map; empty if it has none
    parameters: int = 0
    joining: int = 0  # those of the connector, and of the decoder's layers that read what it gives

    @property
    def accuracy(self) -> float:
        return self.summary["accuracy"]


def read_run(job: Job, data: Path, pointed: int) -> Run:
    """A finished run; its pointing is measured once and kept in its folder."""
    system = systems.load(job.folder)
    kept = job.folder / f"pointing-{pointed}.json"
    if not kept.is_file():
        print(f"pointing of {job.folder}", file=sys.stderr, flush=True)
        found = pointing_figures(
            lambda image, question: system.subject(image, question).subject, system.processor, data, "test", pointed
        )[MAP]
        write_json(kept, {"mass": found.mass, "area": found.area, "ratio": found.ratio, "questions": found.questions})
    rows = [row for row in read_metrics(job.folder / "metrics.jsonl") if "val" in row]
    curve = [(row["samples"], row["val"]["accuracy"]) for row in rows]
    total = sum(parameter.numel() for parameter in system.model.parameters())
    system.model.freeze("all")  # what is left is what joins encoder and decoder
    joining = sum(parameter.numel() for parameter in system.model.parameters() if parameter.requires_grad)
    return Run(read_object(job.folder / "summary.json"), curve, read_object(kept), total, joining)


Runs = Mapping[Row, Mapping[int, Run]]


def check_alike(runs: Runs) -> None:
    """Raise UserError unless all runs of a seed saw as many questions, in one number format."""
    for seed in next(iter(runs.values())):
        seen = {(of[seed].summary["questions_seen"], of[seed].summary["precision"]) for of in runs.values()}
        if len(seen) > 1:
            told = " and ".join(f"{questions:,} in {kind}" for questions, kind in sorted(seen))
            raise UserError(f"the runs of seed {seed} saw different questions: {told}; they cannot be compared")
