"""Time to accuracy: seconds and questions until a share of the validation questions is answered right.

Three sides learn from the same questions in the same order, in one number format: the default run, its architecture
under AdamW instead of Muon, and towers assembled from classes of `transformers` under their AdamW
(`bench/peer_training.py` says what the peer has). The two AdamW sides have the best of three learning rates, chosen by
the last accuracy on the first seed. Evaluations are not counted as time.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from bench import results, timing
from bench.connector_runs import KINDS, Job, Plan, read_seeds, train
from bench.connectors import IMAGES, about_text, listed, provisional, spread
from vqa_scratch.command_line import NearChoice
from vqa_scratch.errors import UserError
from vqa_scratch.report.curves import draw_panels
from vqa_scratch.storage import read_json, write_json
from vqa_scratch.systems.options import VQAOptions, read_command_line
from vqa_scratch.training.progress import read_metrics

NAME = "time-to-accuracy"
GOALS = (0.80, 0.90, 0.95, 0.97)
OURS, ADAMW, PEER = "ours", "adamw", "peer"
TITLES = {OURS: "ours, Muon", ADAMW: "ours, AdamW", PEER: "`transformers`, AdamW"}
RATES = {ADAMW: (5e-4, 1e-3, 2e-3), PEER: (3e-4, 1e-3, 3e-3)}
SOONER = {PEER: "10x", ADAMW: "4x"}  # how many times sooner ours should be at 0.90
POINTS = 24  # evaluations of a run of so many steps
HEAD = ["side", "learning rate", *(f"{goal:.2f}, s" for goal in GOALS), *(f"{goal:.2f}, k questions" for goal in GOALS)]
Point = tuple[float, int, float]  # seconds of steps, questions seen, accuracy on validation
Curve = Sequence[Point]


@dataclass(frozen=True)
class Race(Plan):
    """What is trained: all sides for as many steps, or as many minutes."""

    minutes: float | None = None
    sides: tuple[str, ...] = tuple(TITLES)

    @property
    def name(self) -> str:
        return f"{self.minutes}-minutes-{self.kind}" if self.minutes else super().name

    @property
    def flags(self) -> list[str]:
        often = 50 if self.minutes else max(1, self.steps // POINTS)
        length = f"--minutes={self.minutes}" if self.minutes else f"--steps={self.steps}"
        every = [f"--{what}-every={often}" for what in ("eval", "save", "log")]
        return [
            length,
            *every,
            "--test-images=100",
            "--samples=0",
            f"--precision={self.kind}",
            f"--cache={self.cache}",
            *self.more,
        ]


class Entry(NamedTuple):
    """One run: a side at a learning rate (None: that of the default run), with a seed."""

    side: str
    rate: float | None
    seed: int

    def job(self, race: Race) -> Job:
        name = self.side if self.rate is None else f"{self.side}-{self.rate:g}"
        rate = [] if self.rate is None else ["--optimizer=adamw", f"--learning-rate={self.rate:g}"]
        shared = ["--preset=shapes", f"--seed={self.seed}", f"--data={race.data(self.seed)}", *race.flags]
        text = ["--text-encoder", "--no-question-loss"] if self.side == PEER else []
        return Job(race.out / race.name / name / f"seed{self.seed}", [*shared, *rate, *text])


def curve_of(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The curve in the rows of a metrics.jsonl: a row of training has the rate since the row or evaluation before."""
    seconds, seen, rate, points = 0.0, 0, 1.0, list[Point]()
    for row in rows:
        rate = row.get("samples_per_second", rate)
        seconds, seen = seconds + (row["samples"] - seen) / rate, row["samples"]
        if "val" in row:
            points.append((seconds, seen, row["val"]["accuracy"]))
    return points


def run_one(entry: Entry, race: Race) -> list[Point]:
    """The curve of a run, which is trained unless its file is there."""
    job = entry.job(race)
    file = job.folder.with_name(f"{job.folder.name}.json")
    if not file.is_file():
        if entry.side == PEER:
            from bench.peer_training import PeerRun

            print(f"training {job.folder}", file=sys.stderr, flush=True)
            options = read_command_line(job.flags)
            assert isinstance(options, VQAOptions) and entry.rate is not None
            write_json(file, PeerRun(job.folder, options, entry.rate, race.kind).train())
        else:
            train(job, torch.get_num_threads())
            write_json(file, curve_of(read_metrics(job.folder / "metrics.jsonl")))
    return [tuple(point) for point in read_json(file)]


def reached(curve: Curve, goal: float) -> tuple[float, float] | None:
    """(seconds, questions) at which the curve first comes to the goal, on the line between two evaluations."""
    before = (0.0, 0, 0.0)
    for point in curve:
        if point[2] >= goal:
            share = (goal - before[2]) / (point[2] - before[2])
            return tuple(a + share * (b - a) for a, b in zip(before[:2], point[:2], strict=True))
        before = point
    return None


Curves = dict[str, tuple[float | None, dict[int, Curve]]]  # by side: learning rate, and curves by seed


def run_all(race: Race) -> Curves:
    """Train what is missing: first of each side the rates on the first seed, then the other seeds at the best one."""
    found: Curves = {}
    first, *others = race.seeds
    for side in race.sides:
        tried = {rate: run_one(Entry(side, rate, first), race) for rate in RATES.get(side, (None,))}
        best = max(tried, key=lambda rate: tried[rate][-1][2])
        found[side] = best, {first: tried[best]} | {seed: run_one(Entry(side, best, seed), race) for seed in others}
    return found


def when(curves: Sequence[Curve], goal: float, which: int) -> list[float] | None:
    """Seconds (0) or questions (1) until the goal, by seed; None if one did not come to it."""
    times = [reached(curve, goal) for curve in curves]
    return None if None in times else [time[which] for time in times if time is not None]


def told(values: list[float] | None, unit: float, digits: int) -> str:
    return "not reached" if values is None else spread([value / unit for value in values], digits)


def tables(found: Curves) -> str:
    """When each side comes to each accuracy, and how much sooner ours does."""
    lines, ratios = [], []
    for side, (rate, by_seed) in found.items():
        curves = list(by_seed.values())
        seconds = [told(when(curves, goal, 0), 1, 0) for goal in GOALS]
        questions = [told(when(curves, goal, 1), 1000, 0) for goal in GOALS]
        last = spread([curve[-1][2] for curve in curves])
        pace = spread([curve[-1][1] / curve[-1][0] for curve in curves], 0)
        lines.append([TITLES[side], "default" if rate is None else f"{rate:g}", *seconds, *questions, last, pace])
    text = results.table([*HEAD, "last accuracy", "questions/s"], lines)
    for side, goal in SOONER.items() if OURS in found else ():
        if side not in found:
            continue
        cells = []
        for share in GOALS:
            mine, theirs = (when(list(found[name][1].values()), share, 0) for name in (OURS, side))
            ratio = None if mine is None or theirs is None else statistics.median(theirs) / statistics.median(mine)
            cells.append("not reached" if ratio is None else f"{ratio:.2f}x")
        ratios.append([f"ours against {TITLES[side]}", cells[0], cells[1], goal, *cells[2:]])
    head = ["how many times sooner", "0.80", "0.90", "goal", "0.95", "0.97"]
    return f"{text}\n\n{results.table(head, ratios)}" if ratios else text


def panels(found: Curves) -> list[dict[str, Any]]:
    """Accuracy by seconds and by questions: medians of the seeds, and their range."""
    made = []
    for which, unit, label in ((0, 1.0, "seconds of training"), (1, 1000.0, "thousand questions seen")):
        lines, bands = {}, {}
        for side, (_, by_seed) in found.items():
            points = list(zip(*by_seed.values(), strict=False))  # evaluations, then seeds; --minutes may end them apart
            x = [statistics.median(point[which] for point in of_seeds) / unit for of_seeds in points]
            values = [[point[2] for point in of_seeds] for of_seeds in points]
            lines[TITLES[side]] = (x, list(map(statistics.median, values)))
            bands[TITLES[side]] = (x, list(map(min, values)), list(map(max, values)))
        axes = {"xlabel": label, "ylabel": "accuracy on validation scenes", "ylim": (0, 1.02)}
        made.append({"title": "", "lines": lines, "bands": bands, **axes})
    return made


def read_sides(text: str) -> tuple[str, ...]:
    """ "ours,peer". Raises UserError for anything else."""
    sides = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for side in sides:
        if side not in TITLES:
            raise UserError(f"--sides {side}: there is no such side; there are {', '.join(TITLES)}")
    return sides


def run(race: Race, given: str, write: bool) -> str:
    """Train what is missing, draw the picture, and return the section of the results file."""
    found = run_all(race)
    picture = (IMAGES if write else race.out) / f"{NAME}.png"
    draw_panels(picture, panels(found))
    shown = [f"![Accuracy by seconds and by questions](../docs/images/{NAME}.png)", ""] if write else []
    length = f"{race.minutes:g} minutes" if race.minutes else f"{race.steps:,} steps"
    return "\n".join(
        [
            "## Time to accuracy",
            "",
            *shown,
            provisional(race, set(race.sides) == set(TITLES)) + about_text(__doc__),
            "Figures are medians of the seeds with their range; a goal counts as reached if all seeds came to it, at "
            "the time on the line between two evaluations.",
            "",
            tables(found),
            "",
            f"- {length} a run, {race.kind}, seed {listed(race.seeds)}.",
            f"- {timing.machine()}. Python {sys.version.split()[0]}, torch {torch.__version__}. Commit "
            f"{timing.commit(results.ROOT)}. `{given}`",
        ]
    )


@click.command(NAME)
@click.option("--steps", type=click.IntRange(1), help="Steps of 512 questions a run. [1200]")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Minutes a run, instead of steps.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Fewer than three make the table provisional.")
@click.option("--sides", default=",".join(TITLES), show_default=True, help="Those to run and to show.")
@click.option("--precision", type=NearChoice(KINDS), default="auto", show_default=True, help="Of all runs.")
@click.option("--out", type=click.Path(path_type=Path), default=f"runs/{NAME}", show_default=True, help="The runs.")
@click.option("--cache", type=click.Path(path_type=Path), default="cache", show_default=True, help="As in train.py.")
@click.option("--write", is_flag=True, help="Put the tables into bench/RESULTS.md, and the picture into docs/images.")
def command(steps: int | None, minutes: float | None, seeds: str, sides: str, write: bool, **values: Any) -> None:
    """Seconds and questions until an accuracy, against towers of transformers. Finished runs are kept."""
    if steps is not None and minutes is not None:
        raise UserError("give --steps or --minutes, not both")
    race = Race(steps or 1200, read_seeds(seeds), minutes=minutes, sides=read_sides(sides), **values)
    results.present(NAME, run(race, results.command_given(), write), write)
