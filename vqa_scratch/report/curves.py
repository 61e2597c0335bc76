"""Draws curves.png: the panels of a run in one picture."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vqa_scratch.report.lettering import choose
from vqa_scratch.storage import write_whole


def moving_average(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and up to `width` - 1 before it."""
    result, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        result.append(total / min(i + 1, width))
    return result


def over_samples(
    rows: list[dict[str, Any]],
    scored: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    unit: str,
    loss_unit: str,
) -> list[dict[str, Any]]:
    """The panels of a run over the samples seen: the loss, and those that `scored` makes of what evaluations gave."""
    steps, evaluations = [row for row in rows if "loss" in row], [row for row in rows if "val" in row]
    figures, seen = [row["val"] for row in evaluations], [row["samples"] / 1000 for row in evaluations]
    trained = moving_average([row["loss"] for row in steps], 5)
    losses = {"training": ([row["samples"] / 1000 for row in steps], trained)}
    if any("loss" in row for row in figures):
        losses["validation"] = (seen, [row["loss"] for row in figures])
    panels = [{"title": "loss", "ylabel": loss_unit, "lines": losses, "log": True}]
    for panel in scored(figures):
        lines = {label: (seen, values) for label, values in panel["lines"].items()}
        panels.append({**panel, "lines": lines, "ylim": (0, 1.02)})
    return [{**panel, "xlabel": f"thousand {unit} seen"} for panel in panels]


def draw_panels(path: Path, panels: Sequence[dict[str, Any]], columns: int | None = None) -> None:
    """One picture with all panels, in rows of `columns` or side by side.

    A panel: `title`, `ylabel`, `lines` = {label: (xs, ys)}, and optionally `xlabel`, `ylim`, `hlines` = {label: y},
    `log`, `faint` = (xs, ys) of each line before smoothing, `bands` = {label: (xs, lows, highs)} around lines, and
    `points`, given like `lines`. A label has one colour in all panels.
    Texts may be of any script; a character that no installed font has is drawn as its code.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    lettering = choose(
        [panel.get(key, "") for panel in panels for key in ("title", "xlabel", "ylabel")]
        + [label for panel in panels for key in ("lines", "points", "hlines") for label in panel.get(key, ())]
    )

    def legible(text: str) -> str:
        """The text in available characters; a dollar sign starts no formula."""
        return lettering.legible(text).replace("$", r"\$")

    colours: dict[str, str] = {}
    for panel in panels:
        labels = [label for key in ("lines", "points") for label in panel.get(key, ())]
        free = (f"C{i}" for i in range(10) if f"C{i}" not in {colours.get(label) for label in labels})
        colours |= {label: next(free, "0.5") for label in labels if label not in colours}

    alike = len({panel.get("xlabel") for panel in panels}) == 1  # then the axes show the same steps
    with matplotlib.rc_context({"font.family": lettering.families}):
        columns = columns or len(panels)
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(4.6 * columns, 3.8 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, sharex=alike)
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        for axis, panel in zip(axes.flat[: len(panels)], panels, strict=True):
            for label, (xs, ys) in zip(panel["lines"], panel.get("faint", ()), strict=False):
                axis.plot(xs, ys, color=colours[label], alpha=0.25, linewidth=1)
            for label, (xs, ys) in panel["lines"].items():
                marker = "o" if len(xs) == 1 else None
                axis.plot(xs, ys, label=legible(label), color=colours[label], marker=marker, linewidth=1.6)
                if label in panel.get("bands", {}):
                    axis.fill_between(*panel["bands"][label], color=colours[label], alpha=0.15, linewidth=0)
            for i, (label, y) in enumerate(panel.get("hlines", {}).items()):
                axis.axhline(y, label=legible(label), color="0.45", linestyle=("--", ":", "-.")[i % 3], linewidth=1)
            for i, (label, (xs, ys)) in enumerate(panel.get("points", {}).items()):
                axis.plot(xs, ys, "os^Dv"[i % 5], label=legible(label), color=colours[label], markersize=5, alpha=0.7)
            axis.set_title(legible(panel["title"]), loc="left", fontsize=11)
            axis.set_xlabel(legible(panel.get("xlabel", "step")))
            axis.set_ylabel(legible(panel["ylabel"]))
            if "ylim" in panel:
                axis.set_ylim(*panel["ylim"])
            if all(float(x).is_integer() for xs, _ in panel["lines"].values() for x in xs):  # steps: no half ones
                axis.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
            if panel.get("log"):
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            if sum(len(panel.get(key, ())) for key in ("lines", "points", "hlines")) > 1:
                axis.legend(fontsize=8, frameon=False)
        write_whole(path, lambda unfinished: figure.savefig(unfinished, dpi=120, format="png"))
