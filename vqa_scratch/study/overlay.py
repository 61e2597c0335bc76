"""Draws a map over its image.

Shapes: N places in raster order.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqa_scratch.nn.states import Places
from vqa_scratch.study.places import index_at

# Weight as a share of the largest -> red, green, blue, opacity; straight lines between. The report draws the same.
RAMP = (
    (0.0, (255, 236, 160, 0.00)),
    (0.25, (255, 205, 90, 0.45)),
    (0.55, (245, 130, 50, 0.68)),
    (1.0, (190, 20, 80, 0.86)),
)


def ramp(shares: np.ndarray) -> np.ndarray:
    """(...) in [0, 1] -> (..., 4): colour in 0 to 255 and opacity in 0 to 1."""
    stops = [stop for stop, _ in RAMP]
    return np.stack([np.interp(shares, stops, [color[i] for _, color in RAMP]) for i in range(4)], -1)


def overlay(image: Image.Image, values: Tensor, places: Places, size: int = 448) -> Image.Image:
    """The image with a map (N,) over it, each token in the square around its centre; the longer side is `size` pixels.

    Full colour is the largest value, or three times the mean if that is more, so that an even map looks even. Small
    images are enlarged without smoothing, and squares have hard edges: the picture shows nothing the model lacks.
    """
    scale = size / max(image.size)
    sides = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    method = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
    picture = np.asarray(image.convert("RGB").resize(sides, method), dtype=np.float64)
    shares = values.detach().float().cpu().numpy().reshape(places.grid)
    shares = shares / max(float(shares.max()), 3 * float(shares.mean()), 1e-12)
    colors = np.pad(ramp(shares), ((1, 1), (1, 1), (0, 0)))  # no colour where no square reaches
    rows, columns = (
        index_at(places, axis, (torch.arange(side) + 0.5) * (image.size[1 - axis] / side)).clamp(-1, places.grid[axis])
        for axis, side in enumerate(reversed(sides))
    )
    colors = colors[rows + 1][:, columns + 1]  # (height, width, 4)
    opacity = colors[..., 3:]
    return Image.fromarray((picture * (1 - opacity) + colors[..., :3] * opacity).round().astype(np.uint8))


def side_by_side(images: list[Image.Image]) -> Image.Image:
    """Images of one height in a row, with white between them."""
    white = np.full((images[0].height, 8, 3), 255, np.uint8)
    first, *others = map(np.asarray, images)
    return Image.fromarray(np.hstack([first, *(part for image in others for part in (white, image))]))
