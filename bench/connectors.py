"""The connectors side by side: what each learns from the same questions, and what it costs.

Every run is one of `train.py` on the built-in data set, with the same image encoder, decoder, width and number of
steps, so the same questions in the same order. The question is the decoder's prompt in every row, and its words are
labels for the first 400 steps; one row has a text encoder instead of these labels.
"""

import statistics
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from bench import connector_speed, results, timing
from bench.connector_runs import (
    SEEDS,
    WITH_TEXT,
    Plan,
    Runs,
    all_rows,
    check_alike,
    chosen_rows,
    jobs_of,
    read_run,
    train_all,
)
from vqa_scratch.report.curves import draw_panels

PAGE, IMAGES = results.ROOT / "docs" / "connectors.md", results.ROOT / "docs" / "images"
FAMILIES = "color shape where exist compare count relation closest".split()


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    """The median of the seeds and their range; "none" where there is no figure."""
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    median = f"{statistics.median(known):.{digits}f}"
    return median if len(known) == 1 else f"{median} ({min(known):.{digits}f} to {max(known):.{digits}f})"


def learned(runs: Runs) -> str:
    """The table of what each row learned."""
    of_all = [run for of in runs.values() for run in of.values()]
    present = {name for run in of_all for name in run.summary["accuracy_by_family"]}
    families = [name for name in FAMILIES if name in present] + sorted(present - set(FAMILIES))
    head = ["connector", "accuracy", "hold-out", "images shuffled", "pointing", *families, "parameters", "joining"]
    lines = []
    for row, of in runs.items():
        every = list(of.values())
        lines.append(
            [
                f"`{row.connector}`{WITH_TEXT if row.text_encoder else ''}",
                spread([run.accuracy for run in every]),
                spread([run.summary["holdout_accuracy"] for run in every]),
                spread([run.summary["baselines"]["shuffled_images"] for run in every]),
                spread([run.pointing.get("ratio") for run in every], 2),
                *(f"{statistics.median(run.summary['accuracy_by_family'][f] for run in every):.3f}" for f in families),
                f"{statistics.median(run.parameters for run in every) / 1e6:.2f} M",
                f"{statistics.median(run.joining for run in every) / 1e6:.2f} M",
            ]
        )
    return results.table(head, lines)


def disagreements(runs: Runs) -> list[str]:
    """A line for each pair of rows of which one is ahead on some seeds and behind on others."""
    lines = []
    for (one, first), (other, second) in combinations(runs.items(), 2):
        by = {seed: first[seed].accuracy - second[seed].accuracy for seed in first}
        ahead, behind = ([seed for seed in by if sign * by[seed] > 0] for sign in (1, -1))
        if ahead and behind:
            lines.append(
                f"{one.name} is ahead of {other.name} on seed {listed(ahead)} (by up to {max(by.values()):.3f}), "
                f"behind on seed {listed(behind)} (by up to {-min(by.values()):.3f})"
            )
    return lines


def listed(seeds: Sequence[int]) -> str:
    return " and ".join(map(str, seeds))


def curves(runs: Runs, title: str) -> dict[str, Any]:
    """The panel of accuracy by questions seen: the median of the seeds, and their range."""
    lines, bands = {}, {}
    for row, of in runs.items():
        points = list(zip(*(run.curve for run in of.values()), strict=True))  # evaluations, then seeds
        seen = [statistics.median(questions for questions, _ in of_seeds) / 1000 for of_seeds in points]
        values = [[accuracy for _, accuracy in of_seeds] for of_seeds in points]
        lines[row.name] = (seen, list(map(statistics.median, values)))
        bands[row.name] = (seen, list(map(min, values)), list(map(max, values)))
    axes = {"xlabel": "thousand questions seen", "ylabel": "accuracy on validation scenes", "ylim": (0, 1.02)}
    return {"title": title, "lines": lines, "bands": bands, **axes}


def provisional(plan: Plan, all_there: bool) -> str:
    """What to say in front of a table that is not the whole one; "" for the whole."""
    missing = [] if len(plan.seeds) >= len(SEEDS) else [f"{len(plan.seeds)} of {len(SEEDS)} seeds"]
    missing += [] if all_there else ["not all rows"]
    return f"**Provisional**: {' and '.join(missing)}. " if missing else ""


def about(plan: Plan, runs: Runs, command: str) -> list[str]:
    """The last lines of a section: what was seen, where and with which command."""
    run = next(iter(next(iter(runs.values())).values()))
    seen = f"{plan.steps:,} steps, {run.summary['questions_seen']:,} questions (seed {plan.seeds[0]})"
    device = run.summary["device"]
    return [
        f"- {seen}, {run.summary['precision']}, seed {listed(plan.seeds)}.",
        f"- {timing.machine(device)}. Python {sys.version.split()[0]}, torch {torch.__version__}. Commit "
        f"{timing.commit(results.ROOT)}. `{command}`",
    ]


def run(plan: Plan, command: str) -> tuple[str, list[dict[str, Any]]]:
    """Train what is missing, measure, and return the section of the results file and the panels of its picture."""
    rows = chosen_rows(plan.only, all_rows())
    jobs = jobs_of(plan, rows)
    train_all(list(jobs.values()), plan.jobs)
    runs = {
        row: {seed: read_run(jobs[row, seed], plan.data(seed), plan.pointed) for seed in plan.seeds} for row in rows
    }
    check_alike(runs)
    first = plan.seeds[0]
    costs = connector_speed.measure({row.name: jobs[row, first].folder for row in rows}, plan.data(first), plan.rounds)
    blind = runs[rows[0]][first].summary["baselines"]
    text = [
        "## Connectors side by side",
        "",
        provisional(plan, len(rows) == len(all_rows())) + about_text(__doc__),
        "Figures are medians of the seeds with their range. Hold-out: color-and-shape pairs never trained on. "
        "Pointing: the share of the shown map (weights on the image, mean of heads and layers) that lies on the object "
        "asked about, over that object's share of the pixels; an even map has 1. It is measured on "
        f"{plan.pointed} questions. Parameters: all, and those that join: the connector, and the layers of the decoder "
        "that read what it gives.",
        "",
        learned(runs),
        "",
        about_text(connector_speed.__doc__),
        "",
        connector_speed.table(costs),
        "",
        f"- Without the image: question type {blind['prior']:.3f}, question only {blind['question_only']:.3f}.",
        *(f"- Seeds disagree: {line}." for line in disagreements(runs)),
        *about(plan, runs, command),
    ]
    return "\n".join(text), [curves(runs, "")]


def about_text(docstring: str) -> str:
    """The paragraph after the first line of a module's docstring, on one line."""
    return " ".join(docstring.split("\n\n")[1].split())


def present(name: str, made: tuple[str, list[dict[str, Any]]], out: Path, write: bool) -> None:
    """Show a section and draw its picture below `out`; with `write` also in the documents."""
    text, panels = made
    draw_panels((IMAGES if write else out) / f"{name}.png", panels)
    if write:
        results.write_section(name, f"![Accuracy by questions seen](images/{name}.png)\n\n{text}", PAGE)
    results.present(name, text, write)
