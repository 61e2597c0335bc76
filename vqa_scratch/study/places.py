"""Where a token is drawn: the square of one stride around the pixel it is centred on, clipped at the image.

An image of H x W pixels extends from 0 to H and from 0 to W; a box is (left, top, right, bottom) in pixels. Squares are
products of intervals, so everything here is computed for rows and columns separately.

Shapes: N tokens in raster order, r rows of c columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vqa_scratch.nn.states import Places


def intervals(places: Places, axis: int, length: float) -> Tensor:
    """(r or c, 2): start and end of the squares along one axis (0 rows, 1 columns), clipped to the image."""
    centres = places.first + places.stride * torch.arange(places.grid[axis], dtype=torch.float64)
    half = places.stride / 2
    return torch.stack([centres - half, centres + half], 1).clamp(0, length)


def index_at(places: Places, axis: int, at: Tensor) -> Tensor:
    """The row or column whose squares contain the pixel coordinates `at`; below 0 or too large if none does."""
    return ((at - places.first) / places.stride + 0.5).floor().long()


def share_in_box(places: Places, size: tuple[int, int], box: Sequence[float]) -> Tensor:
    """(N,): the part of each token's square that lies in the box, for an image of `size` = (height, width)."""
    left, top, right, bottom = box
    parts = []
    for axis, (start, end) in enumerate(((top, bottom), (left, right))):
        reach = intervals(places, axis, size[axis])
        overlap = reach[:, 1].clamp(max=end) - reach[:, 0].clamp(min=start)
        parts.append(overlap.clamp(min=0) / (reach[:, 1] - reach[:, 0]))
    return torch.outer(*parts).flatten().float()


def centred_in_box(places: Places, box: Sequence[float]) -> Tensor:
    """(N,) bool: whether a token is centred in the box."""
    left, top, right, bottom = box
    y, x = (places.first + places.stride * torch.arange(count) for count in places.grid)
    return torch.outer((top <= y) & (y < bottom), (left <= x) & (x < right)).flatten()


def token_of_pixel(places: Places, size: tuple[int, int]) -> Tensor:
    """(H, W) long: the token whose square contains each pixel; the nearest token for pixels outside all squares."""
    row, column = (
        index_at(places, axis, torch.arange(size[axis]) + 0.5).clamp(0, places.grid[axis] - 1) for axis in (0, 1)
    )
    return row[:, None] * places.grid[1] + column
