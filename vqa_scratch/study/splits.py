"""Studies a whole split: where maps point, how faithful they are, which heads matter; figures, plots and tables.

Pointing needs the places of objects, which only the built-in data set has, in scenes_<split>.json.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from vqa_scratch.data.descriptions import read_drawn, scenes_file
from vqa_scratch.data.images import ImageProcessor, load_image
from vqa_scratch.data.vqa_v2 import VQASample, read_vqa, spread
from vqa_scratch.errors import UserError
from vqa_scratch.report.curves import draw_panels
from vqa_scratch.storage import write_text, write_whole
from vqa_scratch.study.base import ImageSubject
from vqa_scratch.study.faithfulness import Curves, HeadEffect, Pointing, faithfulness, head_ablation, pointing

SubjectOf = Callable[[Image.Image, str], ImageSubject]  # (image, question) -> subject


# ---------------------------------------------------------------------------------------------- pointing


def pointing_examples(
    subject_of: SubjectOf, processor: ImageProcessor, data: Path, split: str, number: int
) -> Iterator[tuple[ImageSubject, tuple[float, float, float, float]]]:
    """Subjects for questions that name exactly one object, with its box in pixels of the processed image.

    Raises UserError if the data has no scenes.
    """
    path = scenes_file(data, split)
    if not path.is_file():
        raise UserError(f"{path} not found: only the built-in data set says where its objects are")
    drawn = read_drawn(path)

    def named(sample: VQASample) -> list[int]:
        _, about = drawn.get(sample.image_id, ((), {}))
        if sample.question_id not in about:
            raise UserError(f"{path} says nothing of question {sample.question_id}: it is of another data set")
        return about[sample.question_id]

    one = [sample for sample in read_vqa(data, split).samples if len(named(sample)) == 1]
    for sample in spread(one, number):
        image = load_image(sample.image_path, upright=sample.upright)
        (index,) = named(sample)
        box = processor.box(drawn[sample.image_id][0][index].box, image.height, image.width)
        if box[0] < box[2] and box[1] < box[3]:  # else the object was cropped away
            yield subject_of(image, sample.question), box


def pointing_figures(
    subject_of: SubjectOf, processor: ImageProcessor, data: Path, split: str, number: int
) -> dict[str, Pointing]:
    """`faithfulness.pointing` over a split of the built-in data set, best method first."""
    found = pointing(pointing_examples(subject_of, processor, data, split, number))
    return dict(sorted(found.items(), key=lambda item: -item[1].ratio))


def pointing_table(found: dict[str, Pointing]) -> str:
    """The figures as text."""
    lines = [f"{'method':25s} mass on object   area   ratio   hits"]
    lines += [f"{name:25s} {p.mass:14.1%} {p.area:6.1%} {p.ratio:6.2f}x {p.hit:6.1%}" for name, p in found.items()]
    return "\n".join(lines) + f"\nover {next(iter(found.values())).questions} questions that name one object"


# ---------------------------------------------------------------------------------------------- faithfulness


def faithfulness_figures(subject_of: SubjectOf, data: Path, split: str, number: int, out: Path) -> dict[str, Any]:
    """Mean deletion and insertion curves over questions; faithfulness.png, and the areas under the curves."""
    samples = spread(read_vqa(data, split).samples, number)
    curves = faithfulness(
        subject_of(load_image(sample.image_path, upright=sample.upright), sample.question) for sample in samples
    )
    draw_panels(out / "faithfulness.png", _curves_panels(curves, len(samples)))
    return {
        name: {"deletion_area": Curves.area(c.deletion), "insertion_area": Curves.area(c.insertion), **asdict(c)}
        for name, c in curves.items()
    }


def _curves_panels(curves: dict[str, Curves], questions: int) -> list[dict[str, Any]]:
    top = max(max(*c.deletion, *c.insertion) for c in curves.values())
    axes = {"xlabel": "share of image tokens", "ylabel": "probability of the answer", "ylim": (0, 1.05 * top)}
    panels = []
    for kind, better in (("deletion", "lower"), ("insertion", "higher")):
        values = {name: getattr(c, kind) for name, c in curves.items()}
        lines = {f"{name} ({Curves.area(v):.3f})": (curves[name].fractions, v) for name, v in values.items()}
        panels.append({"title": f"{kind} ({better} is better), {questions} questions", "lines": lines, **axes})
    return panels


# ---------------------------------------------------------------------------------------------- head ablation


def ablation_figures(model: nn.Module, score: Callable[[], float], pattern: str, out: Path) -> dict[str, Any]:
    """Official accuracy, from `score`, without each head or expert that `pattern` matches; ablation.png and .md."""
    base, effects = head_ablation(model, score, pattern)
    write_whole(out / "ablation.png", lambda path: _ablation_plot(base, effects, path))
    write_text(out / "ablation.md", ablation_table(base, effects))
    return {"accuracy": base, "heads": [asdict(effect) | {"part": effect.part} for effect in effects]}


def ablation_table(base: float, effects: list[HeadEffect]) -> str:
    """Markdown, the heads that matter most first."""
    lines = ["| head silenced | accuracy | drop |", "|---|---|---|", f"| none | {base:.4f} | |"]
    return "\n".join([*lines, *(f"| {e.name} {e.head} | {e.score:.4f} | {e.drop:+.4f} |" for e in effects)]) + "\n"


def _ablation_plot(base: float, effects: list[HeadEffect], path: Path) -> None:
    names = sorted({e.name for e in effects}, key=lambda name: (name.split(".")[0], int(name.split(".")[1]), name))
    heads = 1 + max(e.head for e in effects)
    figure = Figure(figsize=(1.8 + 0.85 * heads, 1.5 + 0.45 * len(names)), layout="constrained")
    axes = figure.subplots()
    drops = [[float("nan")] * heads for _ in names]
    for e in effects:
        drops[names.index(e.name)][e.head] = 100 * e.drop
    largest = max(0.1, max(abs(100 * e.drop) for e in effects))
    axes.imshow(drops, cmap="PuOr_r", vmin=-largest, vmax=largest, aspect="auto")
    for e in effects:
        value = 100 * e.drop
        ink = "white" if abs(value) > 0.65 * largest else "black"
        axes.text(e.head, names.index(e.name), f"{value:+.1f}", ha="center", va="center", fontsize=9, color=ink)
    axes.set_yticks(range(len(names)), names)
    part = " or ".join(sorted({e.part for e in effects}))
    axes.set_xticks(range(heads), [f"{part} {h}" for h in range(heads)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"Points of accuracy lost without a {part} (of {100 * base:.1f})", fontsize=11, loc="left")
    figure.savefig(path, dpi=130, format="png")
