"""What a row of CTC logits says: the best path (greedy), or the likeliest texts, each summed over its paths (beam).

Shapes: B rows, T frames, V symbols with the blank.
"""

import numpy as np
import torch
from torch import Tensor

Hypothesis = tuple[list[int], float]  # labels, and the log of their probability in nats


def _rows(logits: Tensor, lengths: Tensor | None) -> list[Tensor]:
    if logits.ndim != 3:
        raise ValueError(f"logits must be (B, T, V), not {tuple(logits.shape)}")
    kept = [logits.shape[1]] * len(logits) if lengths is None else lengths.tolist()
    return [row[:frames] for row, frames in zip(logits, kept, strict=True)]


def ctc_greedy(logits: Tensor, lengths: Tensor | None = None, *, blank: int = 0) -> list[list[int]]:
    """The labels of each row: the best symbol of each frame, equal neighbours made one, then blanks left out.

    logits (B, T, V), of which the first `lengths` (B,) frames count. It is the likeliest path, not the likeliest text.
    """
    best = [row.argmax(-1).unique_consecutive() for row in _rows(logits, lengths)]
    return [row[row != blank].tolist() for row in best]


@torch.no_grad()
def ctc_beam(
    logits: Tensor, lengths: Tensor | None = None, *, width: int = 16, blank: int = 0
) -> list[list[Hypothesis]]:
    """The `width` likeliest prefixes of each row, best first (prefix search: Hannun et al. 2014, 1408.2873).

    Exact if no prefix was dropped on the way: their probabilities then are those of `ctc_loss`. Raises ValueError on a
    width below 1.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, not {width}")
    return [_search(row.double().log_softmax(-1).cpu().numpy(), width, blank) for row in _rows(logits, lengths)]


def _search(log_probs: np.ndarray, width: int, blank: int) -> list[Hypothesis]:
    prefixes: list[tuple[int, ...]] = [()]
    ends_blank, ends_label = np.zeros(1), np.full(1, -np.inf)  # the log of each prefix' paths, by their last symbol
    vocabulary = log_probs.shape[1]
    for frame in log_probs:
        total = np.logaddexp(ends_blank, ends_label)
        last = np.array([prefix[-1] if prefix else blank for prefix in prefixes])
        row = np.arange(len(prefixes))
        longer = total[:, None] + frame
        longer[row, last] = ends_blank + frame[last]  # a label twice needs a blank between
        longer[:, blank] = -np.inf
        same_blank = total + frame[blank]
        same_label = np.where(last == blank, -np.inf, ends_label + frame[last])
        known = {prefix: i for i, prefix in enumerate(prefixes)}
        for i, prefix in enumerate(prefixes):  # one prefix made longer may be another
            if prefix and (parent := known.get(prefix[:-1])) is not None:
                same_label[i] = np.logaddexp(same_label[i], longer[parent, prefix[-1]])
                longer[parent, prefix[-1]] = -np.inf
        scores = np.concatenate((np.logaddexp(same_blank, same_label), longer.ravel()))
        best = np.argsort(-scores, kind="stable")[:width]
        best = best[scores[best] > -np.inf]
        old, new = best[best < len(prefixes)], best[best >= len(prefixes)] - len(prefixes)
        prefixes = [prefixes[i] for i in old] + [(*prefixes[i // vocabulary], int(i % vocabulary)) for i in new]
        ends_blank = np.concatenate((same_blank[old], np.full(len(new), -np.inf)))
        ends_label = np.concatenate((same_label[old], longer.ravel()[new]))
    total = np.logaddexp(ends_blank, ends_label)
    return [(list(prefixes[i]), float(total[i])) for i in np.argsort(-total, kind="stable")]
