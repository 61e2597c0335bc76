"""Studies a whole split: where maps point, how faithful they are, which heads matter; figures, plots and tables.

Pointing needs the places of objects, which only the built-in data set has, in scenes_<split>.json.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from vqa_scratch.data.descriptions import About, read_drawn, scenes_file
from vqa_scratch.data.images import ImageProcessor, load_image
from vqa_scratch.data.scenes import Object, Scene
from vqa_scratch.data.vqa_v2 import VQASample, read_vqa, spread
from vqa_scratch.errors import UserError
from vqa_scratch.report.curves import draw_panels
from vqa_scratch.storage import write_text, write_whole
from vqa_scratch.study.base import ImageSubject
from vqa_scratch.study.faithfulness import Curves, HeadEffect, Pointing, faithfulness, head_ablation, pointing
from vqa_scratch.study.pair import PairSubject

SubjectOf = Callable[[Image.Image, str], ImageSubject]  # (image, question) -> subject


# ---------------------------------------------------------------------------------------------- pointing


Box = tuple[float, float, float, float]


def _drawn(data: Path, split: str) -> dict[int | str, tuple[Scene, About]]:
    """The scenes of a split. Raises UserError if the data has none."""
    path = scenes_file(data, split)
    if not path.is_file():
        raise UserError(f"{path} not found: only the built-in data set says where its objects are")
    return read_drawn(path)


def asked_about(data: Path, split: str) -> list[tuple[VQASample, str, Object]]:
    """Questions that name exactly one object, with it. Raises UserError if the scenes are those of another data set."""
    drawn, found = _drawn(data, split), []
    for sample in read_vqa(data, split).samples:
        scene, about = drawn.get(sample.image_id, ((), {}))
        if sample.question_id not in about:
            path = scenes_file(data, split)
            raise UserError(f"{path} says nothing of question {sample.question_id}: it is of another data set")
        if len(about[sample.question_id]) == 1:
            found.append((sample, sample.question, scene[about[sample.question_id][0]]))
    return found


def told_apart(data: Path, split: str, part: str) -> list[tuple[VQASample, str, Object]]:
    """Images and the "color" or "shape" of an object that no other in the image has, or both: "color shape"."""
    drawn, found = _drawn(data, split), []
    for sample in {sample.image_id: sample for sample in read_vqa(data, split).samples}.values():
        scene = drawn[sample.image_id][0] if sample.image_id in drawn else ()
        words = [" ".join(getattr(thing, name) for name in part.split()) for thing in scene]
        found += [(sample, word, thing) for word, thing in zip(words, scene, strict=True) if words.count(word) == 1]
    return found


def pointing_examples(
    subject_of: SubjectOf, processor: ImageProcessor, examples: Sequence[tuple[VQASample, str, Object]]
) -> Iterator[tuple[ImageSubject, Box]]:
    """Subjects of examples (image, question or text, object), with the object's box in pixels of the processed image.
    A text of several words is looked at as a whole."""
    for sample, question, thing in examples:
        image = load_image(sample.image_path, upright=sample.upright)
        box = processor.box(thing.box, image.height, image.width)
        if box[0] < box[2] and box[1] < box[3]:  # else the object was cropped away
            subject = subject_of(image, question)
            if isinstance(subject, PairSubject):
                subject.words = subject.words[:0]
            yield subject, box


def pointing_figures(
    subject_of: SubjectOf, processor: ImageProcessor, data: Path, split: str, number: int, asked: str = "question"
) -> dict[str, Pointing]:
    """`faithfulness.pointing` over a split of the built-in data set, best method first; of a system that is asked a
    "text" for colors, for shapes, and for both."""
    if asked == "question":
        kinds = {"": asked_about(data, split)}
    else:
        kinds = {f"{part}: ": told_apart(data, split, part) for part in ("color", "shape", "color shape")}
    result: dict[str, Pointing] = {}
    for kind, examples in kinds.items():
        found = pointing(pointing_examples(subject_of, processor, spread(examples, number)))
        found = dict(sorted(found.items(), key=lambda item: -item[1].ratio))
        result |= {f"{kind}{name}": figure for name, figure in found.items()}
    return result


def pointing_table(found: dict[str, Pointing], asked: str = "question") -> str:
    """The figures as text."""
    lines = [f"{'method':32s} mass on object   area   ratio   hits"]
    lines += [f"{name:32s} {p.mass:14.1%} {p.area:6.1%} {p.ratio:6.2f}x {p.hit:6.1%}" for name, p in found.items()]
    numbers = " or ".join(str(number) for number in sorted({p.questions for p in found.values()}))
    return "\n".join(lines) + f"\nover {numbers} {asked}s that name one object"


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
