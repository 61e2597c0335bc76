"""How well images and texts find each other: recall at k and median rank, their ceiling, and choices between two.

R@k is the share of searches that find their own among the first k (Karpathy and Fei-Fei 2015, 1412.2306, section 4.2).

Shapes: N pairs, P width of the embeddings, which have length 1.
"""

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

ROWS = 1024  # of a matrix of similarities that are in memory at once
RECALLS = (1, 5, 10)


def ranks_of(asked: Tensor, found: Tensor) -> Tensor:
    """(N,): the rank of its own among all `found` for each of `asked`, both (N, P); 1 is the best.

    Others that are as similar as its own come before it, and so do those of a similarity that is no number.
    """
    ranks = []
    for start in range(0, len(asked), ROWS):
        similar = asked[start : start + ROWS] @ found.T
        own = similar.diagonal(start)[:, None]
        ranks.append(len(found) - (similar < own).sum(1))
    return torch.cat(ranks)


def recalls(ranks: Tensor) -> dict[str, float]:
    """{"R@1": the share of ranks up to 1, ...} and the median rank."""
    shares = {f"R@{k}": (ranks <= k).float().mean().item() for k in RECALLS}
    return shares | {"median_rank": float(median(ranks.tolist()))}


def ceilings(captions: Sequence[str]) -> dict[str, float]:
    """The best R@1 that is possible if some images have the same caption: of equal captions one at most finds its own
    image first, and no image finds its own first among equal ones."""
    times = Counter(captions)
    alone = sum(count == 1 for count in times.values())
    return {"image_to_text": alone / len(captions), "text_to_image": len(times) / len(captions)}


def retrieval(images: Tensor, texts: Tensor, captions: Sequence[str]) -> dict[str, Any]:
    """Figures of N pairs both ways, with the best R@1 that is possible as "ceiling"; "accuracy" is the mean of R@1."""
    best = ceilings(captions)
    figures: dict[str, Any] = {
        name: recalls(ranks_of(*sides)) | {"ceiling": best[name]}
        for name, sides in {"image_to_text": (images, texts), "text_to_image": (texts, images)}.items()
    }
    first = [figures[name]["R@1"] for name in best]
    return {"accuracy": sum(first) / 2, "images": len(images)} | figures


def share_preferred(images: Tensor, right: Tensor, wrong: Tensor) -> float:
    """The share of N images that are more similar to the right one of two texts; ties count half."""
    lead = (images * (right - wrong)).sum(1)
    return ((lead > 0).float() + (lead == 0).float() / 2).mean().item()
