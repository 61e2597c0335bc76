"""Chooses the rows of each batch: in random order for an epoch of training, or in order for scoring."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

LENGTHS_OVER = 8  # batches among which rows are sorted by length


def batches_by_image(
    groups: Iterable[Sequence[int]],
    rng: np.random.Generator,
    rows_per_step: int,
    rows_per_image: int,
    lengths: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Batches of row numbers from the rows of each image; each row occurs once.

    The rows of an image are shuffled and split into pieces of at most `rows_per_image`; a batch takes pieces of one
    size, about `rows_per_step` rows in all. With the `lengths` of all rows, each batch takes pieces of about one length
    (they are sorted within `LENGTHS_OVER` batches), which saves padding where texts are long.
    """
    pieces: dict[int, list[np.ndarray]] = defaultdict(list)
    for rows in groups:
        mixed = rng.permutation(rows)
        for at in range(0, len(mixed), rows_per_image):
            piece = mixed[at : at + rows_per_image]
            pieces[len(piece)].append(piece)
    batches = []
    for size in sorted(pieces):
        order = [pieces[size][i] for i in rng.permutation(len(pieces[size]))]
        take = max(1, rows_per_step // size)
        for window in range(0, len(order), LENGTHS_OVER * take):
            some = order[window : window + LENGTHS_OVER * take]
            if lengths is not None:
                some.sort(key=lambda piece: lengths[piece].max())
            batches += [np.concatenate(some[at : at + take]) for at in range(0, len(some), take)]
    return [batches[i] for i in rng.permutation(len(batches))]


def batches_in_order(groups: Iterable[Sequence[int]], limit: int, rows_per_step: int) -> list[np.ndarray]:
    """Batches for scoring: whole images in order, up to about `limit` rows; those of a batch have equally many."""
    same_size: dict[int, list[Sequence[int]]] = defaultdict(list)
    taken = 0
    for rows in groups:
        if taken >= limit:
            break
        same_size[len(rows)].append(rows)
        taken += len(rows)
    batches = []
    for size, same in sorted(same_size.items()):
        take = max(1, rows_per_step // size)
        batches += [np.concatenate(same[at : at + take]) for at in range(0, len(same), take)]
    return batches
