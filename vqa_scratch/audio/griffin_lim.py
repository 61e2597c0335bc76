"""A wave from a mel spectrogram without a trained vocoder: phases guessed until they agree with each other.

Griffin and Lim 1984, with the momentum of Perraudin et al. 2013 ("A fast Griffin-Lim algorithm"). It sounds hollow:
what the mels do not tell is lost, and neighbouring phases agree but are not those of a voice.

Shapes: T frames, N = 256 T samples, F = 513 frequencies.
"""

import math

import torch
from torch import Tensor

from vqa_scratch.audio.features import slaney_filters, spectrogram

SIZE, HOP = 1024, 256  # samples of a window of `speecht5_mel`, and from one to the next
ROUNDS, MOMENTUM = 60, 0.99


def griffin_lim(mel: Tensor, generator: torch.Generator | None = None, rounds: int = ROUNDS) -> Tensor:
    """(T, 80) as `speecht5_mel` gives it -> (N,) samples. The generator, one of the CPU, draws the first phases."""
    filters = slaney_filters(mel.shape[1], SIZE // 2 + 1, 80.0, 7600.0)  # (F, 80)
    amplitude = (torch.linalg.pinv(filters.T) @ (10 ** mel.detach().cpu().double().T)).clamp(min=0).float()  # (F, T)
    window, length = torch.hann_window(SIZE), HOP * len(mel)
    angles = torch.rand(amplitude.shape, generator=generator) * 2 * math.pi
    phase, before = torch.polar(torch.ones_like(angles), angles), torch.zeros(())
    wave = torch.zeros(length)
    for _ in range(rounds):
        wave = torch.istft(amplitude * phase, SIZE, HOP, window=window, length=length)
        heard = spectrogram(wave, SIZE, HOP)[:, : len(mel)]
        pushed = heard + MOMENTUM * (heard - before)
        phase, before = pushed / pushed.abs().clamp(min=1e-16), heard
    return wave
