"""The connectors between towers that were trained before: frozen, and trained on from the same start.

The image encoder is the tower of a CLIP (`train.py --preset clip`), the decoder a language model (`language_model.py`),
both trained on the same drawn scenes, neither on questions about images. Frozen: only the connector trains, and the
decoder's cross-attention if it has one, since both are new. Trained: everything does, from the same weights. Idefics2
(Laurencon et al. 2024, 2405.02246) reports that cross-attention is ahead while the backbones are frozen and behind once
they train (finding 2), and that learned pooling of the image is cheaper and better (finding 4).
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from bench import connector_speed, results
from bench.connector_runs import (
    Job,
    Plan,
    Row,
    Run,
    Runs,
    all_rows,
    check_alike,
    chosen_rows,
    length_of,
    read_run,
    train_all,
)
from bench.connectors import about, about_text, curves, disagreements, provisional, spread
from bench.language_model import train_language_model
from vqa_scratch import systems
from vqa_scratch.connectors import connector_class
from vqa_scratch.options import defaults_of, flag
from vqa_scratch.storage import read_object
from vqa_scratch.systems.options import PRESETS, VQAOptions

STATES = {"frozen": "all", "trained": "nothing"}  # what --freeze says
# Of the preset `book`, which opens checkpoints, these are set back to what the small models are trained with.
SMALL = "test_split val_split image_cache optimizer weight_decay decay_from questions_per_step questions_per_image"
SMALL += " learning_rate warmup_steps max_question_tokens"
CLIP = ["--stem=linear", "--patch-size=8", "--width=128", "--image-layers=3", "--text-layers=3"]
FINDINGS = {  # of Idefics2: (ahead, behind) while frozen; what should be
    "2": (("tokens", "prefix"), ("resampler", "prefix")),
    "4": (("qformer", "prefix"), ("resampler", "tokens")),
}


class Towers(NamedTuple):
    """Checkpoints to start from, and what they can do."""

    image: Path
    decoder: Path
    text: str


def towers(plan: Plan, steps: int, seed: int, sizes: Mapping[str, int]) -> Towers:
    """The two towers of a seed, trained and exported if they are not yet. `sizes` are those of the language model."""
    folder = plan.out / f"towers-{steps}-steps-{plan.kind}" / f"seed{seed}"
    clip, image, decoder = folder / "clip", folder / "image", folder / "decoder"
    flags = ["--preset=clip", f"--data={plan.data(seed)}", f"--cache={plan.cache}", f"--seed={seed}"]
    length = length_of(steps)
    train_all([Job(clip, [*flags, *length, *CLIP, f"--precision={plan.kind}", *plan.tower])], 1)
    if not (image / "config.json").is_file():
        image.mkdir(parents=True, exist_ok=True)
        systems.load(clip).export(image)
    if not (decoder / "answers.json").is_file():
        decoder.mkdir(parents=True, exist_ok=True)
        train_language_model(decoder, plan.data(seed), steps, seed, plan.kind, **sizes)
    found, answers = read_object(clip / "summary.json"), read_object(decoder / "answers.json")
    text = (
        f"the CLIP finds {found['accuracy']:.3f} of {found['images']:,} unseen images and captions at the first place, "
        f"the language model answers {answers['described']:.3f} of questions after a description of their scene, "
        f"{answers['blind']:.3f} without one"
    )
    return Towers(image, decoder, text)


def small_flags() -> list[str]:
    """The flags that set the preset `book` back to what the small models are trained with."""
    plain = defaults_of(VQAOptions)
    values = {name: plain[name] for name in SMALL.split() if PRESETS["book"].get(name) != plain[name]}
    return [flag(name) if value is True else f"{flag(name)}={value}" for name, value in values.items()]


def jobs_of(
    plan: Plan, rows: list[Row], started: Mapping[int, Towers], tower_steps: int
) -> dict[tuple[str, Row, int], Job]:
    """The runs by state, row and seed."""
    jobs = {}
    for state, frozen in STATES.items():
        for row in rows:
            for seed in plan.seeds:
                start = started[seed]
                name = f"{plan.name}-from-{tower_steps}-{state}"
                flags = ["--preset=book", "--init=pretrained", f"--image-model={start.image}"]
                flags += [f"--decoder-model={start.decoder}", f"--freeze={frozen}", *row.flags]
                flags += [f"--data={plan.data(seed)}", f"--seed={seed}", *small_flags(), *plan.flags]
                flags += ["--feature-cache"] if state == "frozen" else []
                jobs[state, row, seed] = Job(plan.out / name / row.folder / f"seed{seed}", flags)
    return jobs


def table(runs: Mapping[str, Runs], rows: list[Row]) -> str:
    """Both states side by side."""
    head = ["connector", "reached by", "parameters that train, frozen"]
    for what in ("accuracy", "hold-out", "pointing"):
        head += [f"{what}, {state}" for state in STATES]
    lines = []
    for row in rows:
        of = {state: list(runs[state][row].values()) for state in STATES}
        way = "cross-attention" if connector_class(row.connector).uses_memory else "prefix"
        cells = [f"`{row.connector}`", way, f"{median(run.joining for run in of['frozen']) / 1e6:.2f} M"]
        for figure in (lambda run: run.accuracy, lambda run: run.summary["holdout_accuracy"]):
            cells += [spread([figure(run) for run in of[state]]) for state in STATES]
        cells += [spread([run.pointing["ratio"] for run in of[state]], 2) for state in STATES]
        lines.append(cells)
    return results.table(head, lines)


def findings(runs: Mapping[str, Runs]) -> list[str]:
    """What each finding says of two connectors, and by how much the first is ahead of the second here, seed by seed."""
    lines = []
    for number, pairs in FINDINGS.items():
        for one, other in pairs:
            if not all(Row(name) in runs["frozen"] for name in (one, other)):
                continue
            ahead = {state: gaps(of[Row(one)], of[Row(other)]) for state, of in runs.items()}
            by_seed = list(zip(*ahead.values(), strict=True))
            holds = [frozen > 0 > trained if number == "2" else min(frozen, trained) > 0 for frozen, trained in by_seed]
            said = ", ".join(f"{state} {signed(values)}" for state, values in ahead.items())
            share = f"It holds on {sum(holds)} of {len(holds)} seeds"
            lines.append(f"Finding {number}, `{one}` minus `{other}`: {said}. {share}")
    return lines


def gaps(one: Mapping[int, Run], other: Mapping[int, Run]) -> list[float]:
    return [one[seed].accuracy - other[seed].accuracy for seed in one]


def signed(values: list[float]) -> str:
    text = f"{median(values):+.3f}"
    return text if len(values) == 1 else f"{text} ({min(values):+.3f} to {max(values):+.3f})"


def run(
    plan: Plan, tower_steps: int, command: str, sizes: Mapping[str, int] | None = None
) -> tuple[str, list[dict[str, Any]]]:
    """Train what is missing, and return the section of the results file and the panels of its picture."""
    able = [row for row in all_rows() if not row.text_encoder and not reads_pixels(row)]
    rows = chosen_rows(plan.only, able)
    started = {seed: towers(plan, tower_steps, seed, sizes or {}) for seed in plan.seeds}
    jobs = jobs_of(plan, rows, started, tower_steps)
    train_all(list(jobs.values()), plan.jobs)
    runs: dict[str, Runs] = {}
    for state in STATES:
        of = partial(read_of, plan, jobs, state)
        runs[state] = {row: {seed: of(row, seed) for seed in plan.seeds} for row in rows}
        check_alike(runs[state])
    first, names = plan.seeds[0], [(state, row) for state in STATES for row in rows]
    folders = {f"{row.connector}, {state}": jobs[state, row, first].folder for state, row in names}
    costs = connector_speed.measure(folders, plan.data(first), plan.rounds)
    text = [
        "## Connectors between towers trained before: frozen, and trained on",
        "",
        provisional(plan, len(rows) == len(able)) + about_text(__doc__),
        "",
        table(runs, rows),
        "",
        "What they cost, measured as in the table above. Here a frozen encoder runs at each step; the runs read its "
        "states from a file.",
        "",
        connector_speed.table(costs),
        "",
        *(f"- {line}." for line in findings(runs)),
        *(f"- Seeds disagree, {state}: {line}." for state in STATES for line in disagreements(runs[state])),
        *(f"- Towers of seed {seed}, {tower_steps:,} steps each: {both.text}." for seed, both in started.items()),
        *about(plan, runs["frozen"], command),
    ]
    return "\n".join(text), [curves(of, state) for state, of in runs.items()]


def reads_pixels(row: Row) -> bool:
    """Whether it has no image encoder, so that there is none to freeze."""
    return connector_class(row.connector).reads_pixels


def read_of(plan: Plan, jobs: Mapping[tuple[str, Row, int], Job], state: str, row: Row, seed: int) -> Run:
    return read_run(jobs[state, row, seed], plan.data(seed), plan.pointed)
