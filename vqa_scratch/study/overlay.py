"""Maps laid over images, as pictures.

Shapes: N patches, of `grid` = (rows, columns).
"""

import numpy as np
from PIL import Image
from torch import Tensor

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


def overlay(image: Image.Image, patches: Tensor, grid: tuple[int, int], size: int = 448) -> Image.Image:
    """The image with a map (N,) over it; the longer side is `size` pixels.

    The largest patch has full colour, or three times the mean if that is more, so that an even map looks even. Small
    images grow pixel by pixel, and patches keep hard edges: nothing is shown that the model does not have.
    """
    scale = size / max(image.size)
    sides = tuple(max(1, round(side * scale)) for side in image.size)
    method = Image.NEAREST if scale > 2 else Image.LANCZOS
    picture = np.asarray(image.convert("RGB").resize(sides, method), dtype=np.float64)
    shares = patches.detach().float().cpu().numpy().reshape(grid)
    shares = shares / max(float(shares.max()), 3 * float(shares.mean()), 1e-12)
    colors = ramp(shares)
    rows = np.arange(sides[1]) * grid[0] // sides[1]
    columns = np.arange(sides[0]) * grid[1] // sides[0]
    colors = colors[rows][:, columns]  # (height, width, 4)
    opacity = colors[..., 3:]
    return Image.fromarray((picture * (1 - opacity) + colors[..., :3] * opacity).round().astype(np.uint8))


def side_by_side(images: list[Image.Image], gap: int = 8) -> Image.Image:
    """All images in one row on white."""
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    sheet = Image.new("RGB", (width, max(image.height for image in images)), (255, 255, 255))
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + gap
    return sheet
