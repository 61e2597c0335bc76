"""Loading images for a batch from the second epoch on: the memory-mapped cache against torchvision's decode and resize.

JPEGs of 640 x 480 pixels become (224, 224, 3) bytes in batches, in a new random order each round. The peer opens them
with Pillow and resizes with `torchvision.transforms.v2`, as ImageFolder does, in as many threads as torch has. The
images of the cache must equal our own first decode bit for bit, and torchvision's up to rounding.
"""

import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import tests.torchvision_shim  # noqa: F401  (lets torchvision import beside a CPU-only torch)
from bench import results, timing
from vqa_scratch.data.images import ImageProcessor, Images
from vqa_scratch.errors import UserError

GOAL = 8.0
NEAR = 2  # of 255: the two resize alike, but may round at other places
SIZE, BATCH = 224, 32


def draw(folder: Path, count: int) -> list[Path]:
    """JPEGs of smooth noise, about as large as photographs."""
    paths = []
    for number in range(count):
        random = np.random.default_rng(number)
        coarse = Image.fromarray(random.integers(0, 255, (60, 80, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
        grain = random.integers(-12, 12, (480, 640, 3))
        path = folder / f"{number:05d}.jpg"
        Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(path, quality=90)
        paths.append(path)
    return paths


def torchvision_batches(paths: list[Path], threads: int) -> Callable[[np.ndarray], Tensor]:
    """Positions -> (B, H, W, 3) uint8, decoded and resized anew."""
    from torchvision.transforms import v2

    change = v2.Compose([v2.Resize((SIZE, SIZE)), v2.PILToTensor()])

    def read(position: int) -> Tensor:
        with Image.open(paths[position]) as image:
            return change(image.convert("RGB")).permute(1, 2, 0)

    pool = ThreadPoolExecutor(threads)
    return lambda positions: torch.stack(list(pool.map(read, positions)))


def run(count: int, rounds: int, command: str) -> str:
    """Time both ways over `count` images; returns the report. Raises UserError where the pixels differ."""
    threads = torch.get_num_threads()
    there = importlib.util.find_spec("torchvision") is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = draw(folder, count)
        images = Images(paths, ImageProcessor(size=(SIZE, SIZE)), workers=threads)
        first = images.batch(range(count))
        images.cache_in(folder / "cache", progress=False)
        if not torch.equal(images.batch(np.arange(count)), first):
            raise UserError("the cached images differ from those decoded first")
        sides = {"ours": images.batch}
        worst = "not compared"
        if there:
            peer = torchvision_batches(paths, threads)
            off = int((peer(np.arange(count)).int() - first.int()).abs().max())
            if off > NEAR:
                raise UserError(f"the images differ from torchvision's by up to {off} of 255")
            worst, sides["torchvision"] = f"{off} of 255", peer

        def epoch(batch: Callable[[np.ndarray], Tensor], order: np.ndarray) -> float:
            start = time.perf_counter()
            for at in range(0, count, BATCH):
                batch(order[at : at + BATCH])
            return time.perf_counter() - start

        random = np.random.default_rng(0)
        taken: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(rounds):
            order = random.permutation(count)
            for side, batch in sides.items():
                taken[side].append(epoch(batch, order))
        weight = sum(path.stat().st_size for path in paths) / count / 1e3
    ours = timing.Spread.of([count / seconds for seconds in taken["ours"]])
    copied = ours.median * SIZE * SIZE * 3 * 2 / 1e9  # bytes read and written
    cells = [ours.text(0), "torchvision is not installed", "not measured"]
    if "torchvision" in taken:
        ratio = timing.speedup(taken["ours"], taken["torchvision"])
        theirs = timing.Spread.of([count / seconds for seconds in taken["torchvision"]])
        cells[1:] = [theirs.text(0), f"**{ratio.median:.1f}x** ({ratio.low:.1f} to {ratio.high:.1f})"]
    share = f"{copied / timing.copy_gb_per_second():.0%}"
    head = "ours, images/s|torchvision, images/s|ratio|goal|of the copy ceiling|largest difference".split("|")
    return "\n".join(
        [
            "## Loading images, second epoch on",
            "",
            __doc__.split("\n\n")[1].replace("\n", " "),
            f"{count} images of {weight:.0f} kB, batches of {BATCH}, {threads} threads.",
            "",
            results.table(head, [[*cells, f"{GOAL:.0f}x", share, worst]]),
            "",
            f"- {timing.machine()}. Python {sys.version.split()[0]}, torch {torch.__version__}, "
            f"torchvision {version('torchvision') if there else 'absent'}. "
            f"Commit {timing.commit(Path(__file__).parent)}. `{command}`",
        ]
    )
