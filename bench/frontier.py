"""The algorithms of rlhf.py at equal rollouts, against the best possible reward at each KL.

Every run is `python rlhf.py` with a seed and the flags of its row; a seed makes its own summariser and reward models. A
share is the gain on prompts never trained on over the best possible gain at the run's KL, which reweighted samples of
the reference estimate. The best of n is chosen among those samples, without training.
"""

import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from bench import results, timing
from bench.connector_runs import Job, read_seeds, train_all
from bench.connectors import about_text, listed, spread
from vqa_scratch.errors import UserError
from vqa_scratch.report.curves import draw_panels, moving_average
from vqa_scratch.rl.evaluate import Frontier
from vqa_scratch.rl.options import PRESETS
from vqa_scratch.storage import read_object
from vqa_scratch.training.progress import read_metrics

IMAGES, SEEDS = results.ROOT / "docs" / "images", (0, 1, 2, 3, 4)
TARGET = PRESETS["mini-news"]["kl_target"]
ALGORITHMS = {name: {"algorithm": name} for name in ("ppo", "rloo", "grpo", "best-of-n")}
SIZES = {"samples": 4, "epochs": 4, "iterations": 60, "learning-rate": 3e-4}
CLASSIC = SIZES | {"critic": "shared", "lam": 0.95, "critic-warmup": 2}
CRITICS = {  # of PPO in the smaller batches that it had: as it was, and with one thing changed at a time
    "as it was": CLASSIC,
    "the policy stands still": CLASSIC | {"critic-warmup": 60},
    "lambda 1": CLASSIC | {"lam": 1},
    "detached": CLASSIC | {"critic": "detached"},
    "a tenth of the rate": CLASSIC | {"value-lr-scale": 0.3},
    "weight 1": CLASSIC | {"value-coef": 1},
    "no clip": CLASSIC | {"value-clip": 1000},
    "warm-up of 10": CLASSIC | {"critic-warmup": 10},
    "fitted": SIZES,
}
Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Plan:
    """What is run. `more` are further flags, the same for every run."""

    rows: Rows
    seeds: tuple[int, ...] = SEEDS
    jobs: int = 1
    out: Path = Path("runs/frontier")
    cache: Path = Path("cache")
    more: tuple[str, ...] = ()

    def runs(self) -> dict[tuple[str, int], Job]:
        """By row and seed. Neighbours differ in their seed: runs beside each other need not train the same models."""
        shared, made = [f"--cache={self.cache}", "--precision=fp32", *self.more], {}
        for name, flags in self.rows.items():
            own = [f"--{flag}={value}" for flag, value in flags.items()]
            for seed in self.seeds:
                folder = self.out / name.replace(" ", "-") / f"seed{seed}"
                made[name, seed] = Job(folder, [f"--seed={seed}", *own, *shared], "rlhf.py")
        return made


def chosen(names: str | None, rows: Rows) -> Rows:
    """The comma-separated rows; all without names. Raises UserError for one that is no row."""
    wanted = list(rows) if names is None else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in rows:
            raise UserError(f"--algorithms {name}: there is no such row; there are {', '.join(rows)}")
    return {name: rows[name] for name in wanted}


class Run:
    """The figures of a finished run."""

    def __init__(self, folder: Path) -> None:
        self.summary, self.log = read_object(folder / "summary.json"), read_metrics(folder / "metrics.jsonl")
        config = read_object(folder / "config.json")
        self.rollouts = config["iterations"] * config["prompts"] * config["samples"]
        found = self.summary["frontier"]
        self.kl, self.reward = found["reached"]
        self.curve = Frontier(found["kl"], found["reward"], [], self.summary["frontier_kl_limit"])

    def gain(self, reward: float) -> float:
        """A reward on the scale of the picture: that of the reference is 0, the best possible at the target KL 1."""
        return self.curve.share(TARGET, self.curve.reward[0], reward)

    def of(self, name: str) -> list[float]:
        """A column of the log."""
        return [row[name] for row in self.log]


Runs = Mapping[str, Mapping[int, Run]]


def best_of_n(runs: Runs) -> dict[int, tuple[float, float, float]]:
    """By n: KL (its bound), gain on the scale of the picture and share of the possible gain, medians of the seeds."""
    found: dict[int, list[tuple[float, float, float]]] = {}
    for run in next(iter(runs.values())).values():
        for best in run.summary["best_of_n"]:
            n, kl, reward = best["n"], best["kl_bound"], best["reward"]
            share = run.curve.share(kl, run.curve.reward[0], reward)
            found.setdefault(n, []).append((kl, run.gain(reward), share))
    return {n: tuple(map(statistics.median, zip(*of_seeds, strict=True))) for n, of_seeds in found.items()}


def table(runs: Runs, rows: Rows) -> str:
    """A line for each row, and one for the best of n without training."""
    head = ["", "share of the best gain", "lowest", "KL", "highest KL on the way", "critic", "baseline", "s"]
    lines = []
    for name, of in runs.items():
        every, goal = list(of.values()), name == "ppo"
        shares = [run.summary["frontier_share"] for run in every]
        highest = max(max(run.of("objective/kl_exact")) for run in every)
        critic, baseline = (
            statistics.median(statistics.fmean(run.of(f"ppo/val/{what}_explained")) for run in every)
            for what in ("critic", "var")
        )
        lines.append(
            [
                name,
                f"{statistics.median(shares):.3f}{' (goal 0.97)' * goal}",
                f"{min(shares):.3f}{' (goal 0.95)' * goal}",
                spread([run.kl for run in every], 2),
                f"{highest:.2f}{f' (goal at most {1.5 * TARGET:g})' * goal}",
                f"{critic:.2f}" if rows[name].get("algorithm", "ppo") == "ppo" else "",
                f"{baseline:.2f}",
                f"{statistics.median(sum(run.of('time/ppo/total')) for run in every):.0f}",
            ]
        )
    n, (kl, _, share) = max(best_of_n(runs).items())
    return results.table(head, [*lines, [f"best of {n} samples", f"{share:.3f}", "", f"{kl:.2f}", *[""] * 4]])


def over_time(runs: Runs, name: str, title: str, ylabel: str, **panel: Any) -> dict[str, Any]:
    """The panel of a column of the log: median of the seeds and their range, averaged over four iterations."""
    lines, bands = {}, {}
    for row, of in runs.items():
        values = list(zip(*(moving_average(run.of(name), 4) for run in of.values()), strict=True))
        steps = list(range(1, len(values) + 1))
        lines[row] = (steps, list(map(statistics.median, values)))
        bands[row] = (steps, list(map(min, values)), list(map(max, values)))
    return {"title": title, "xlabel": "iteration", "ylabel": ylabel, "lines": lines, "bands": bands} | panel


def frontier(runs: Runs) -> dict[str, Any]:
    """The panel of gain against KL: the best possible, where each run ended, and the best of n samples."""
    of_seeds = list(next(iter(runs.values())).values())
    kl = torch.linspace(0, of_seeds[0].curve.limit, 60).tolist()
    best = [[run.gain(run.curve.at(x)) for run in of_seeds] for x in kl]
    points = {
        name: ([run.kl for run in of.values()], [run.gain(run.reward) for run in of.values()])
        for name, of in runs.items()
    }
    x, y, _ = zip(*best_of_n(runs).values(), strict=True)
    return {
        "title": "gain by KL, new prompts",
        "xlabel": "KL from the reference, nats",
        "ylabel": f"gain; 1 is the best at {TARGET:g} nats",
        "lines": {"best possible": (kl, list(map(statistics.median, best)))},
        "bands": {"best possible": (kl, list(map(min, best)), list(map(max, best)))},
        "points": points | {"best of n samples": (x, y)},
    }


def run(plan: Plan, command: str) -> tuple[str, list[dict[str, Any]]]:
    """Run what is missing; the section of the results file and the panels of its picture."""
    jobs = plan.runs()
    train_all(list(jobs.values()), plan.jobs)
    runs = {name: {seed: Run(jobs[name, seed].folder) for seed in plan.seeds} for name in plan.rows}
    rollouts = {run.rollouts for of in runs.values() for run in of.values()}
    if len(rollouts) > 1:
        raise UserError(f"the runs in {plan.out} differ in their rollouts: {sorted(rollouts)}; they cannot be compared")
    text = [
        "### The algorithms and the frontier",
        "",
        about_text(__doc__),
        "Shares, KL and seconds (of the iterations alone) are medians of the seeds. Critic and baseline: the share of "
        "the variance of returns that the value head alone, and all that is subtracted, explain on average.",
        "",
        table(runs, plan.rows),
        "",
        f"- {rollouts.pop():,} rollouts a run, seeds {listed(plan.seeds)}. {timing.machine()}. Python "
        f"{sys.version.split()[0]}, torch {torch.__version__}. Commit {timing.commit(results.ROOT)}. `{command}`",
    ]
    limits = {"target": TARGET, "1.5 times the target": 1.5 * TARGET}
    panels = [
        frontier(runs),
        over_time(runs, "objective/kl_exact", "KL on the way", "nats a response", hlines=limits),
        over_time(runs, "env/reward_mean", "reward on the way", "reward"),
        over_time(runs, "ppo/val/var_explained", "variance that the baseline explains", "share", ylim=(-0.5, 0.5)),
    ]
    return "\n".join(text), panels


def present(name: str, made: tuple[str, list[dict[str, Any]]], out: Path, write: bool) -> None:
    """Show a section and draw its picture below `out`; with `write` also in the documents."""
    text, panels = made
    draw_panels((IMAGES if write else out) / f"{name}.png", panels, columns=2)
    results.present(name, text, write)


# ------------------------------------------------------------------------------------------------ command


@click.command("frontier")
@click.option("--seeds", default="0,1,2,3,4", show_default=True, help="Runs that differ in their seed.")
@click.option("--algorithms", help="These alone, with commas between them; with --critics, these rows.")
@click.option("--critics", is_flag=True, help="PPO with one thing changed at a time in how it learns its critic.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Runs at once, sharing the threads.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/frontier"), show_default=True, help="Runs.")
@click.option(
    "--cache", type=click.Path(path_type=Path), default=Path("cache"), show_default=True, help="As in rlhf.py."
)
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md, and the picture into docs/images.")
def command(seeds: str, algorithms: str | None, critics: bool, write: bool, **where: Any) -> None:
    """PPO, RLOO, GRPO and best-of-n at equal rollouts against the best possible reward. Finished runs are kept."""
    rows = chosen(algorithms, CRITICS if critics else ALGORITHMS)
    plan = Plan(rows, read_seeds(seeds), **where)
    made = run(plan, results.command_given())
    present("critics" if critics else "frontier", made, plan.out, write)
