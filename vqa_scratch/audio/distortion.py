"""How far one way to say a sentence is from another: mel-cepstral distortion along a path of dynamic time warping.

Shapes: T frames, M mels, K cepstra, R rows of a matrix, C columns.
"""

import math

import numpy as np
import torch
from torch import Tensor

CEPSTRA = 13  # the first, after the one that is the loudness


def dtw(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The path of least cost through a matrix (R, C), corner to corner by steps right, down or both: (rows, columns).

    Of ways that are equally good it is that from the left, then the diagonal (Sakoe and Chiba 1978, without a band).
    The matrix is filled one diagonal after the other.
    """
    height, width = cost.shape
    moves = np.empty(cost.shape, np.int8)  # 0: from up and left, 1: from up, 2: from left
    older, newer = np.full(height + 1, np.inf), np.full(height + 1, np.inf)  # of row i at place i + 1
    older[0] = 0.0
    for number in range(height + width - 1):
        row = np.arange(max(0, number - width + 1), min(height, number + 1))
        both, up, left = older[row], newer[row], newer[row + 1]
        moves[row, number - row] = np.where((left <= up) & (left <= both), 2, np.where(both <= up, 0, 1))
        now = np.full(height + 1, np.inf)
        now[row + 1] = cost[row, number - row] + np.minimum(np.minimum(both, up), left)
        older, newer = newer, now
    row, column = height - 1, width - 1
    path = [(row, column)]
    while row or column:
        move = 2 if row == 0 else 1 if column == 0 else moves[row, column]
        row, column = row - (move != 2), column - (move != 1)
        path.append((row, column))
    rows, columns = np.array(path[::-1]).T
    return rows, columns


def mel_cepstra(mel: Tensor, number: int = CEPSTRA) -> Tensor:
    """(T, M) as `speecht5_mel` gives them -> (T, K) fp64: c_k = 2/M sum_m L_m cos(pi k (m + 1/2) / M), k = 1 to K.

    The row is c_0 + sum_k c_k cos(pi k (m + 1/2) / M) again, with all M - 1 of them exactly.
    """
    mels = mel.shape[1]
    k, m = torch.arange(1.0, number + 1, dtype=torch.float64)[:, None], torch.arange(mels)
    return mel.detach().cpu().double() @ (math.pi * k * (m + 0.5) / mels).cos().T * (2 / mels)


def mel_cepstral_distortion(mel: Tensor, other: Tensor, number: int = CEPSTRA) -> float:
    """MCD in dB between log-mel frames (T, M) and (T', M), the mean over the frames of their best path.

    (10 / ln 10) sqrt(2 sum_k (c_k - c'_k)^2) of natural logarithms (Kubichek 1993, "Mel-cepstral distance measure for
    objective speech quality assessment"), which is 10 sqrt(2 sum_k ...) of those to the base 10 in `speecht5_mel`; c_0,
    the loudness, is left out. It is the root mean square over the mels of the difference in dB, after a smoothing that
    keeps `number` cepstra. The path is that of dynamic time warping over the distance itself. Figures of different
    front ends (mels, window, number) are not comparable. Raises ValueError unless both have the same mels.
    """
    if mel.ndim != 2 or other.ndim != 2 or mel.shape[1] != other.shape[1]:
        raise ValueError(f"frames (T, M) of the same mels, not {tuple(mel.shape)} and {tuple(other.shape)}")
    one, two = mel_cepstra(mel, number), mel_cepstra(other, number)
    distance = (10 * math.sqrt(2) * torch.cdist(one, two, compute_mode="donot_use_mm_for_euclid_dist")).numpy()
    return float(distance[dtw(distance)].mean())
