"""Shows what was learned of binding words: a table over seeds, curves, and one episode with its answers."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import timing
from bench.binding import SHOTS, FewShot, Plan, Seed
from bench.binding_episodes import FIRST_WORD, WORDS
from bench.results import table
from vqa_scratch.report.curves import draw_panels
from vqa_scratch.storage import write_whole
from vqa_scratch.study import trace

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

- {looks}
- {machine}. torch {torch}. Commit {commit}. `{command}`"""
LOOKS = """Where the last token before the answer looks ({model}), in the head that tells the shots apart best, summed
  over the shots that show the pair of the question / over the others: {heads}."""


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


class Looks(NamedTuple):
    """Where the question's last token looks, in the head that tells shots with the question's pair from others best."""

    layer: int
    head: int
    same: float  # mean attention to the shots with that pair, together
    other: float  # to the other shots
    shots: Tensor  # (E, shots) to each shot


@torch.no_grad()
def looks(seed: Seed, model: FewShot) -> Looks:
    """Of the test with most shots."""
    episodes, places = seed.tests[f"true {SHOTS[-1]}"]
    ids, segments = torch.from_numpy(episodes.prompts()), episodes.order.shape[1]
    with trace(model.language, "decoder.*.self") as traced:
        model(ids, seed.unseen.states[torch.from_numpy(places)])
    rows = [traced.pattern(f"decoder.{layer}.self")[:, :, -1] for layer in range(len(model.language.blocks))]
    attention = F.pad(torch.stack(rows, 1), (0, 1)).unflatten(-1, (segments, -1)).sum(-1)[..., :-1]
    same = torch.from_numpy(episodes.shown[:, :-1] == episodes.shown[:, -1:])[:, None, None]
    gained = (attention * same).sum(-1).mean(0), (attention * ~same).sum(-1).mean(0)  # (layers, heads) each
    layer, head = divmod(int((gained[0] - gained[1]).abs().argmax()), attention.shape[2])
    return Looks(layer, head, *(share[layer, head].item() for share in gained), attention[:, layer, head])


def draw_episode(path: Path, seed: Seed, model: FewShot, shots: Tensor, number: int = 1) -> None:
    """An episode of the test with most shots: its pictures, what is said of them and how much each shot is looked at
    (`shots` as in `Looks`), and the chances of each word."""
    from matplotlib.figure import Figure

    episodes, places = (part[number : number + 1] for part in seed.tests[f"true {SHOTS[-1]}"])
    with torch.no_grad():
        logits = model(torch.from_numpy(episodes.prompts()), seed.unseen.states[torch.from_numpy(places)])[0, -1]
    names = [WORDS[word] for word in episodes.words[0, episodes.order[0, :-1]]]
    said = [f"{name}\nlooked at: {share:.2f}" for name, share in zip(names, shots[number], strict=True)] + ["?"]
    figure = Figure(figsize=(2 * len(said) + 2.2, 2.7), layout="constrained")
    *axes, bars = figure.subplots(1, len(said) + 1, width_ratios=[1] * len(said) + [1.2])
    for axis, place, text in zip(axes, places[0], said, strict=True):
        axis.imshow(seed.unseen.pictures.pixels[place])
        axis.set_xlabel(text, fontsize=11)
        axis.set_xticks([])
        axis.set_yticks([])
    bars.barh(WORDS[::-1], logits.softmax(0)[FIRST_WORD:].numpy()[::-1], color="C0")
    bars.set_xlim(0, 1)
    bars.tick_params(labelsize=7)
    bars.set_xlabel("chance of each word", fontsize=9)
    bars.spines[["top", "right"]].set_visible(False)
    write_whole(path, lambda unfinished: figure.savefig(unfinished, dpi=120, format="png"))


def run(plan: Plan, seeds: Sequence[int], variants: Sequence[str], out: Path, pictures: Path, command: str) -> str:
    """Do what is left to do of each stage of each seed. Returns the section; curves and an episode go to `pictures`."""
    work = [Seed(plan, seed, out) for seed in seeds]
    found = {name: [seed.few_shot(name)[1] for seed in work] for name in variants}
    written = [seed.language()[1] for seed in work]
    rows, losses = rows_of("language", "the Llama alone, pictures in words", written), []
    for name, figures in found.items():
        rows += rows_of(name, name, figures)
        before, after, later = (
            spread([one[when][text] for one in figures])
            for when, text in (("before", "text"), ("after", "text"), ("after", "text before an image"))
        )
        minutes = spread([one["seconds"] / 60 for one in figures])
        losses.append([name, before, after, later, f"{figures[0]['history'][-1]['step']}", minutes])
    draw_curves(pictures / CURVES, found)
    models = [seed.few_shot(variants[0])[0] for seed in work]
    seen = [looks(seed, model) for seed, model in zip(work, models, strict=True)]
    clearest = max(range(len(work)), key=lambda number: seen[number].same - seen[number].other)
    draw_episode(pictures / EPISODE, work[clearest], models[clearest], seen[clearest].shots)
    heads = [
        f"seed {seed}, head {one.head} of layer {one.layer}, {one.same:.2f} / {one.other:.2f}"
        for seed, one in zip(seeds, seen, strict=True)
    ]
    shots = [f"{number} shot{'s' * (number != 1)}" for number in SHOTS]
    head = ["model", "the shots show", *shots, f"{shots[-1]}, of all tokens", f"{shots[-1]}, pairs never seen"]
    return TEXT.format(
        episodes=plan.blocks * plan.words**2,
        seeds=len(seeds),
        chance=1 / plan.words,
        accuracies=table(head, rows),
        looks=LOOKS.format(model=variants[0], heads="; ".join(heads)),
        losses=table(["model", "before", "after", "after, an image behind the text", "steps", "minutes"], losses),
        machine=timing.machine(),
        torch=torch.__version__,
        commit=timing.commit(Path(__file__).parent),
        command=command,
    )
