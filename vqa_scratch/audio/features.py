"""What models read of a sound, each step a function of its own: MFCC, Whisper's log-mel and SpeechT5's mel spectrogram.

MFCC (Davis and Mermelstein 1980) are those of python_speech_features 0.6 with a Hamming window; `log_mel` is that of
Whisper (Radford et al. 2022, 2212.04356; whisper/audio.py), `speecht5_mel` the target of SpeechT5 (Ao et al. 2022,
2110.07205; feature_extraction_speecht5.py of transformers). All take samples at 16 kHz, usually in [-1, 1], and compute
in their dtype, in fp32 at least.

Shapes: N samples, T frames, F frequencies of a spectrum, M mels; any number of dimensions before them unless said.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

RATE = 16_000  # samples a second
FRAME, HOP = 400, 160  # samples: 25 ms, every 10 ms
EMPHASIS = 0.97
FFT = 512  # samples of a frame, with the zeros after it
FILTERS, CEPSTRA, LIFTER = 26, 13, 22
NOTHING = 2.0**-52  # stands for an energy of zero, which has no logarithm
FLOOR = 1e-10  # below it a mel spectrogram is not told from silence


def _checked(wave: Tensor) -> Tensor:
    if not wave.is_floating_point() or wave.ndim == 0 or not wave.shape[-1]:
        raise ValueError(f"a wave holds samples as fractions (..., N), not {wave.dtype} {tuple(wave.shape)}")
    return wave.to(torch.promote_types(wave.dtype, torch.float32))


# ------------------------------------------------------------------------------------------------ mel filters


def triangles(points: Tensor, edges: Tensor) -> Tensor:
    """(F, M): of each of M triangles, its height at F points. Triangle m rises from edge m of M + 2 to 1 at m + 1."""
    widths = edges.diff()
    rising = (points[:, None] - edges[:-2]) / widths[:-1]
    falling = (edges[2:] - points[:, None]) / widths[1:]
    return torch.minimum(rising, falling).clamp(min=0)


@functools.cache
@torch.inference_mode(False)  # what is kept may take part in gradients later
def htk_filters() -> Tensor:
    """(FFT // 2 + 1, FILTERS) fp64: triangles equally far apart in mel, 2595 log10(1 + f / 700), from bin to bin."""
    mels = torch.linspace(0, 2595 * math.log10(1 + RATE / 2 / 700), FILTERS + 2, dtype=torch.float64)
    hertz = 700 * (10 ** (mels / 2595) - 1)
    bins = torch.arange(FFT // 2 + 1, dtype=torch.float64)
    return triangles(bins, ((FFT + 1) * hertz / RATE).floor())


@functools.cache
@torch.inference_mode(False)
def slaney_filters(mels: int, bins: int, low: float = 0.0, high: float = RATE / 2) -> Tensor:
    """(bins, mels) fp64: triangles of equal area from `low` to `high` Hz, on Slaney's scale, straight below 1 kHz."""

    def mel(hertz: float) -> float:
        return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)

    at = torch.linspace(mel(low), mel(high), mels + 2, dtype=torch.float64)
    hertz = torch.where(at < 15, at * 200 / 3, 1000 * ((at - 15) * (math.log(6.4) / 27)).exp())
    points = torch.linspace(0, RATE / 2, bins, dtype=torch.float64)
    return triangles(points, hertz) * 2 / (hertz[2:] - hertz[:-2])


# ------------------------------------------------------------------------------------------------ MFCC


def pre_emphasis(wave: Tensor) -> Tensor:
    """Step 1, (..., N): from each sample 0.97 of the one before it, which lifts high frequencies."""
    return torch.cat((wave[..., :1], wave[..., 1:] - EMPHASIS * wave[..., :-1]), -1)


def frames(wave: Tensor) -> Tensor:
    """Step 2, (..., T, FRAME): pieces of 25 ms every 10 ms under a Hamming window; the last is filled with zeros."""
    steps = max(0, -(-(wave.shape[-1] - FRAME) // HOP))
    cut = F.pad(wave, (0, FRAME + HOP * steps - wave.shape[-1])).unfold(-1, FRAME, HOP)
    return cut * torch.hamming_window(FRAME, periodic=False, dtype=wave.dtype, device=wave.device)


def power_spectrum(pieces: Tensor) -> Tensor:
    """Step 3, (..., T, F): the energy of each frame by frequency."""
    spectrum = torch.fft.rfft(pieces, FFT)
    return (spectrum.real.square() + spectrum.imag.square()) / FFT


def log_energies(power: Tensor) -> Tensor:
    """Step 4, (..., T, FILTERS): the logarithm of the energy in each mel filter."""
    energies = power @ htk_filters().to(power)
    return torch.where(energies == 0, NOTHING, energies).log()


def cepstra(logs: Tensor) -> Tensor:
    """Step 5, (..., T, CEPSTRA): the first cosine transforms (DCT-II, orthonormal) of a row, high ones lifted."""
    m = torch.arange(FILTERS, dtype=torch.float64)
    k = torch.arange(CEPSTRA, dtype=torch.float64)[:, None]
    cosines = (math.pi * k * (m + 0.5) / FILTERS).cos() * math.sqrt(2 / FILTERS)
    cosines[0] /= math.sqrt(2)
    lifter = 1 + LIFTER / 2 * (math.pi * k / LIFTER).sin()
    return logs @ (cosines * lifter).T.to(logs)


def deltas(features: Tensor) -> Tensor:
    """(..., T, C): how fast each number changes, by a line through five frames; the frames at the ends are repeated."""
    last = features.shape[-2] - 1
    at = torch.arange(last + 1, device=features.device)

    def change(n: int) -> Tensor:
        return features[..., (at + n).clamp(max=last), :] - features[..., (at - n).clamp(min=0), :]

    return (change(1) + 2 * change(2)) / 10


def mfcc(wave: Tensor) -> Tensor:
    """(..., T, 39): 12 cepstra after the log energy of the frame, their changes, and the changes of these.

    T = 1 + ceil((N - 400) / 160), at least 1. Raises ValueError on a wave without samples.
    """
    power = power_spectrum(frames(pre_emphasis(_checked(wave))))
    energy = power.sum(-1, keepdim=True)
    energy = torch.where(energy == 0, NOTHING, energy).log()
    static = torch.cat((energy, cepstra(log_energies(power))[..., 1:]), -1)
    change = deltas(static)
    return torch.cat((static, change, deltas(change)), -1)


def normalised(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """(..., T, C) with mean 0 and variance 1 over the frames of each row whose mask (..., T) is True; the others are 0.

    A number that does not change becomes 0.
    """
    real = torch.ones_like(features[..., :1]) if mask is None else mask[..., None].to(features.dtype)
    count = real.sum(-2, keepdim=True).clamp(min=1)
    mean = (features * real).sum(-2, keepdim=True) / count
    centred = (features - mean) * real
    deviation = (centred.square().sum(-2, keepdim=True) / count).sqrt()
    return centred / deviation.clamp(min=1e-5)


# ------------------------------------------------------------------------------------------------ spectrograms


def spectrogram(wave: Tensor, size: int, hop: int) -> Tensor:
    """(..., F, T) complex: spectra under a Hann window of `size` samples around every `hop`-th; the ends are mirrored.

    wave (N,) or (B, N); T = 1 + N // hop. A wave shorter than half a window is mirrored as often as needed.
    """
    last, half = wave.shape[-1] - 1, size // 2
    outside = torch.arange(half, device=wave.device)
    place = torch.cat((outside - half, outside + last + 1)) % max(2 * last, 1)
    ends = wave[..., torch.minimum(place, 2 * last - place)]
    mirrored = torch.cat((ends[..., :half], wave, ends[..., half:]), -1)
    window = torch.hann_window(size, dtype=wave.dtype, device=wave.device)
    return torch.stft(mirrored, size, hop, window=window, center=False, return_complex=True)


def log_mel(wave: Tensor, mels: int = 80, *, seconds: float | None = 30.0) -> Tensor:
    """(..., mels, 100 x seconds): what Whisper reads of a wave (N,) or (B, N), filled with silence or cut to `seconds`.

    With seconds=None it is as long as the wave, (..., mels, N // 160). What is 80 dB below the loudest place of a row
    is raised to that. large-v3 and turbo have 128 mels, others 80. Raises ValueError on a wave below 10 ms, a frame.
    """
    wave = _checked(wave)
    if seconds is not None:
        wave = F.pad(wave, (0, round(seconds * RATE) - wave.shape[-1]))  # a negative number cuts
    if wave.shape[-1] < HOP:
        raise ValueError(f"{wave.shape[-1]} samples are no frame; it takes {HOP}, 10 ms")
    spectrum = spectrogram(wave, FRAME, HOP)[..., :-1]
    power = spectrum.real.square() + spectrum.imag.square()
    logs = (slaney_filters(mels, FRAME // 2 + 1).T.to(power) @ power).clamp(min=FLOOR).log10()
    return (torch.maximum(logs, logs.amax((-2, -1), keepdim=True) - 8) + 4) / 4


def speecht5_mel(wave: Tensor) -> Tensor:
    """(..., T, 80): the logarithm (base 10) of 80 mels from 80 to 7600 Hz, every 16 ms; what SpeechT5 says.

    wave (N,) or (B, N), T = 1 + N // 256.
    """
    amplitude = spectrogram(_checked(wave), 1024, 256).abs()
    return (slaney_filters(80, 513, 80.0, 7600.0).T.to(amplitude) @ amplitude).clamp(min=FLOOR).log10().mT
