"""Scores retrieval: the rank of what belongs to a query among everything it was compared with.

R@k is the share of queries of which something that belongs to them is among the first k (Karpathy and Fei-Fei 2015,
1412.2306, section 4.2). With several captions an image, the best of them counts.

Shapes: Q queries, C candidates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

FIRST = (1, 5, 10)  # the k of R@k


def ranks_of(similarity: Tensor, belongs: Tensor) -> Tensor:
    """(Q,): the rank, from 1, of the most similar candidate that belongs to each query, of (Q, C) and (Q, C) bool.

    Of equals that do not belong, all come first: a model that finds everything alike has the last rank, not the first.
    Raises ValueError for a query to which nothing belongs.
    """
    if not belongs.any(1).all():
        raise ValueError(f"nothing belongs to query {int(belongs.any(1).int().argmin())}")
    best = similarity.masked_fill(~belongs, -torch.inf).amax(1, keepdim=True)
    return 1 + ((similarity >= best) & ~belongs).sum(1)


def retrieval(similarity: Tensor, image_of: Sequence[int], first: Sequence[int] = FIRST) -> dict[str, float]:
    """R@k and the median rank, both ways, from the similarity of images and texts (I, B).

    `image_of` (B,) says which image each text is about. "text" is the search for a text, by an image.
    """
    belongs = torch.arange(len(similarity))[:, None] == torch.as_tensor(image_of)
    figures: dict[str, float] = {}
    for name, (rows, own) in {"text": (similarity, belongs), "image": (similarity.T, belongs.T)}.items():
        ranks = ranks_of(rows.cpu(), own)
        figures |= {f"{name}_r@{k}": float((ranks <= k).double().mean()) for k in first}
        figures[f"{name}_median_rank"] = float(ranks.double().quantile(0.5))
    return figures
