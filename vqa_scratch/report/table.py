"""Draws a table as a picture: texts of any script, and small images, in rows as high as their content needs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vqa_scratch.report.lettering import choose, wrapped
from vqa_scratch.storage import write_whole

Cell = str | np.ndarray  # a text, or an image (H, W, 3) uint8
LINE, PADDING, PICTURE = 0.19, 0.16, 0.8  # inches
COLUMNS_AN_INCH = 12.5  # of text at the size used


def draw_table(path: Path, title: str, header: Sequence[str], rows: Sequence[Sequence[Cell]], inches: Sequence[float]):
    """Write the table as a PNG; `inches` are the widths of the columns.

    Returns the characters that no installed font has, as one text; the picture shows their codes.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    table: list[Sequence[Cell]] = [header, *rows]
    lettering = choose([title, *(cell for row in table for cell in row if isinstance(cell, str))])

    def fitted(cell: Cell, width: float) -> Cell:
        if not isinstance(cell, str):
            return cell
        return wrapped(lettering.legible(cell), max(4, int((width - PADDING) * COLUMNS_AN_INCH)))

    def height(cell: Cell) -> float:
        return LINE * (1 + cell.count("\n")) if isinstance(cell, str) else PICTURE

    fits = [[fitted(cell, width) for cell, width in zip(row, inches, strict=True)] for row in table]
    heights = [PADDING + max(map(height, row)) for row in fits]
    heading = 0.45
    bold = "bold" if len(lettering.families) == 1 else "normal"  # fonts for other scripts often have no bold
    total = heading + sum(heights)
    with matplotlib.rc_context({"font.family": lettering.families}):
        figure = Figure(figsize=(sum(inches), total))
        axis = figure.add_axes((0, 0, 1, 1), xlim=(0, sum(inches)), ylim=(total, 0))
        axis.axis("off")
        # Texts are data, so a dollar sign is a dollar sign and not the start of a formula.
        axis.text(PADDING / 2, heading / 2, lettering.legible(title), fontsize=12, va="center", parse_math=False)
        top = heading
        for number, (row, tall) in enumerate(zip(fits, heights, strict=True)):
            left = 0.0
            for cell, width in zip(row, inches, strict=True):
                if isinstance(cell, str):
                    written = axis.text(left + PADDING / 2, top + PADDING / 2, cell, parse_math=False, va="top")
                    written.set(fontsize=9, linespacing=1.35, weight="normal" if number else bold)
                else:
                    side, edge = left + PADDING / 2, top + PADDING / 2
                    deep, broad = (PICTURE * pixels / max(cell.shape[:2]) for pixels in cell.shape[:2])
                    place = (side, side + broad, edge + deep, edge)
                    axis.imshow(cell, extent=place, interpolation="nearest", aspect="auto")
                    frame = Rectangle((side, edge), broad, deep, fill=False, edgecolor="0.85", linewidth=0.6)
                    axis.add_patch(frame)  # a white image has an edge too
                left += width
            top += tall
            axis.axhline(top, color="0.8" if number else "0.3", linewidth=0.8)
        axis.set(xlim=(0, sum(inches)), ylim=(total, 0))  # imshow has changed them
        write_whole(path, lambda unfinished: figure.savefig(unfinished, dpi=130, format="png"))
    return lettering.missing
