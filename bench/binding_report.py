"""Shows what was learned of binding words: a table over seeds, curves, and one episode with its answers."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import timing
from bench.binding import SHOTS, Plan, Seed
from bench.results import table
from vqa_scratch.data.binding import AFTER, FIRST_WORD, VOCABULARY, WORDS
from vqa_scratch.report.curves import draw_panels
from vqa_scratch.storage import write_whole

Figures = dict[str, Any]  # what a stage has left, as in its JSON file
GOALS = {("frozen", "true", 4): "goal 0.9", ("frozen", "shuffled", 4): "goal at most 0.55"}
IMAGES = Path(__file__).parent.parent / "docs" / "images"
CURVES, EPISODE = "binding.png", "episode.png"
TEXT = """## Binding invented words to pictures in context

Accuracy over {episodes} episodes for each number of shots: which of the episode's words belongs to the last picture.
Nothing was bound in training as it is here. The shots show what their words stand for (`true`), the pictures of all
shots of the test dealt anew (`shuffled`), or what the episode's other word stands for (`exchanged`: who reads the shots
gives the other answer). Medians of {seeds} seeds, with the lowest and the highest; chance is {chance:.2f}.

{accuracies}

Loss on written episodes, in nats a token, of the Llama before and after the last stage.

{losses}

- {machine}. torch {torch}. Commit {commit}. `{command}`"""


def spread(values: Sequence[float]) -> str:
    """The median, and how far the values reach if they differ."""
    low, median, high = min(values), statistics.median(values), max(values)
    return f"{median:.3f}" + (f" ({low:.3f} to {high:.3f})" if low < high else "")


def middle(figures: Sequence[Figures], key: str) -> tuple[list[int], list[float]]:
    """(steps, medians over the seeds) of a figure that was looked at while training."""
    rows = zip(*(one["history"] for one in figures), strict=True)
    return [row["step"] for row in figures[0]["history"]], [statistics.median(r[key] for r in row) for row in rows]


def rows_of(name: str, label: str, figures: Sequence[Figures]) -> list[list[str]]:
    """The rows of a model: by what its shots show."""
    rows = []
    for kind in ("true", "shuffled", "exchanged"):
        cells = [label, kind]
        for shots in SHOTS:
            cell = spread([one["scores"][f"{kind} {shots}"]["chosen"] for one in figures])
            goal = GOALS.get((name, kind, shots))
            cells.append("" if kind != "true" and not shots else f"{cell} ({goal})" if goal else cell)
        most = SHOTS[-1]
        cells.append(spread([one["scores"][f"{kind} {most}"]["said"] for one in figures]))
        cells.append(spread([one["scores"][f"held out {most}"]["chosen"] for one in figures]) if kind == "true" else "")
        rows.append(cells)
    return rows


def draw_curves(path: Path, by_variant: dict[str, list[Figures]]) -> None:
    """Accuracy by step and number of shots, by variant, and the gates of the first variant by layer."""
    name, figures = next(iter(by_variant.items()))
    accuracy = {"ylabel": "accuracy", "ylim": (0, 1.03), "hlines": {"chance": 1 / figures[0]["plan"]["words"]}}
    lines = {f"{shots} shots": middle(figures, f"true {shots}") for shots in SHOTS}
    most = SHOTS[-1]
    lines[f"{most} shots, pictures shuffled"] = middle(figures, f"shuffled {most}")
    panels: list[dict[str, Any]] = [{"title": f"{name}: by shots", "lines": lines, **accuracy}]
    if len(by_variant) > 1:
        several = {variant: middle(ones, f"true {most}") for variant, ones in by_variant.items()}
        panels.append({"title": f"{most} shots", "lines": several, **accuracy})
    gates = {}
    steps = [look["step"] for look in figures[0]["history"]]
    for number, half in enumerate(("attention", "MLP")):
        for layer in range(figures[0]["plan"]["layers"]):
            sizes = [abs(look["gates"][layer][number]) for look in figures[0]["history"]]
            gates[f"{half}, layer {layer}"] = (steps, sizes)
    panels.append({"title": f"{name}: gates, one seed", "ylabel": "|tanh(gate)|", "lines": gates})
    draw_panels(path, panels)


def draw_episode(path: Path, seed: Seed, name: str, number: int = 0) -> None:
    """An episode of the test with four shots: its pictures, what is said of them, and the chances of each word."""
    from matplotlib.figure import Figure

    episodes, places = (part[number : number + 1] for part in seed.tests[f"true {SHOTS[-1]}"])
    model, _ = seed.few_shot(name)
    with torch.no_grad():
        ids, shown = torch.from_numpy(episodes.tokens()[:, :-AFTER]), torch.from_numpy(places)
        logits = model(ids, seed.unseen.states(model.eyes, shown))[0, -1]
    chances = logits.softmax(0)[FIRST_WORD:]
    segments = " ".join(VOCABULARY[token] for token in ids[0]).split("<image> ")[1:]
    figure = Figure(figsize=(2 * len(segments) + 2.2, 2.5), layout="constrained")
    axes = figure.subplots(1, len(segments) + 1, width_ratios=[1] * len(segments) + [1.2])
    for axis, place, text in zip(axes, places[0], segments, strict=False):
        axis.imshow(seed.unseen.pictures.pixels[place])
        axis.set_xlabel(text, fontsize=11)
        axis.set_xticks([])
        axis.set_yticks([])
    axes[-1].barh(WORDS[::-1], chances.numpy()[::-1], color="C0")
    axes[-1].set_xlim(0, 1)
    axes[-1].tick_params(labelsize=7)
    axes[-1].set_xlabel("chance of each word", fontsize=9)
    axes[-1].spines[["top", "right"]].set_visible(False)
    write_whole(path, lambda unfinished: figure.savefig(unfinished, dpi=120, format="png"))


def run(plan: Plan, seeds: Sequence[int], variants: Sequence[str], out: Path, pictures: Path, command: str) -> str:
    """Do what is left to do of each stage of each seed. Returns the section; curves and an episode go to `pictures`."""
    work = [Seed(plan, seed, out) for seed in seeds]
    found = {name: [seed.few_shot(name)[1] for seed in work] for name in variants}
    rows, losses = [], []
    if set(variants) - {"scratch"}:
        written = [seed.language()[1] for seed in work]
        rows += rows_of("language", "the Llama alone, pictures in words", written)
    for name, figures in found.items():
        rows += rows_of(name, name, figures)
        before, after, later = (
            spread([one[when][text] for one in figures])
            for when, text in (("before", "text"), ("after", "text"), ("after", "text before an image"))
        )
        minutes = spread([one["seconds"] / 60 for one in figures])
        losses.append([name, before, after, later, f"{figures[0]['history'][-1]['step']}", minutes])
    draw_curves(pictures / CURVES, found)
    draw_episode(pictures / EPISODE, work[0], variants[0])
    shots = [f"{number} shot{'s' * (number != 1)}" for number in SHOTS]
    head = ["model", "the shots show", *shots, f"{shots[-1]}, of all tokens", f"{shots[-1]}, pairs never seen"]
    return TEXT.format(
        episodes=plan.blocks * plan.words**2,
        seeds=len(seeds),
        chance=1 / plan.words,
        accuracies=table(head, rows),
        losses=table(["model", "before", "after", "after, an image behind the text", "steps", "minutes"], losses),
        machine=timing.machine(),
        torch=torch.__version__,
        commit=timing.commit(Path(__file__).parent),
        command=command,
    )
