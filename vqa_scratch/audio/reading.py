"""Reads a sound file as one channel at one rate, or says in one line why it cannot; writes WAV.

WAV (PCM of 8 to 32 bits, float) is read here, by its chunks; FLAC, OGG, MP3 and AIFF by soundfile, which is an extra.
Resampling is a windowed sinc in polyphase form, what scipy.signal.resample_poly computes with the same filter.
"""

import functools
import io
import math
import struct
import wave as wav
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqa_scratch.errors import UserError, naming
from vqa_scratch.storage import write_whole

BLOCK = 2**20  # frames decoded at a time: two hours of six channels never exist as numbers
PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE  # codes of a WAV's format
ENCODINGS = {2: "ADPCM", 6: "A-law", 7: "mu-law", 0x11: "ADPCM", 0x31: "GSM", 0x55: "MP3"}
STREAMED = 0x7FFFF000  # from here on the size of the data says that it was not known when the header was written
MAGIC = {b"fLaC": "FLAC", b"OggS": "OGG", b"ID3": "MP3", b"FORM": "AIFF", b"RF64": "a WAV of over 4 GB"}
RATES = (1_000, 768_000)  # Hz that a file may have
CROSSINGS, CUTOFF, BETA = 64, 0.955, 8.96  # of the sinc on each side; of the lower Nyquist rate; Kaiser's, for 90 dB
LARGEST = 2**25  # numbers in the matrix of a resampling


def read_audio(path: str | Path, rate: int = 16_000) -> Tensor:
    """(N,) fp32: the samples of a file at `rate` Hz, whole numbers as fractions of their range, channels averaged.

    Raises UserError, naming the file, if it is missing, no sound, damaged, cut off, without samples, holds NaN, or
    needs a package that is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file" if path.exists() else f"{path} not found: there is no such sound file")
    try:
        with open(path, "rb") as file, naming(path):
            head = file.read(12)
            if head[:4] == b"RIFF" and head[8:] == b"WAVE":
                own, wave = _read_wav(file, path.stat().st_size)
            else:
                own, wave = _decode(path, _kind(head))
            return resample(torch.from_numpy(wave), own, rate)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def read_wav(data: bytes, name: object, rate: int = 16_000) -> Tensor:
    """`read_audio` of the bytes of a WAV; errors call it `name`."""
    with naming(name):
        if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
            raise UserError(f"no WAV (it begins with {data[:8]!r})")
        file = io.BytesIO(data)
        file.seek(12)
        own, wave = _read_wav(file, len(data))
        return resample(torch.from_numpy(wave), own, rate)


def _kind(head: bytes) -> str:
    if not head:
        raise UserError("empty (0 bytes), not a sound file")
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2:  # the start of a frame of MPEG layer III
        return "MP3"
    for magic, name in MAGIC.items():
        if head.startswith(magic):
            return name
    raise UserError(f"no WAV, FLAC, OGG, MP3 or AIFF (it begins with {head[:8]!r}): convert it to one of them")


def _mono(blocks: Iterable[np.ndarray], rate: int) -> np.ndarray:
    """(N,) fp32, the mean of the channels of blocks (n, channels)."""
    if not RATES[0] <= rate <= RATES[1]:
        raise UserError(f"{rate:,} samples a second; from {RATES[0]:,} to {RATES[1]:,} can be right")
    parts, before = [np.empty(0, np.float32)], 0
    for block in blocks:
        part = block.mean(1, dtype=np.float32)
        if not (good := np.isfinite(part)).all():
            raise UserError(f"NaN or infinite samples, the first at {(before + good.argmin()) / rate:.2f} s")
        parts.append(part)
        before += len(part)
    if not before:
        raise UserError("no sound in it (0 samples)")
    return np.concatenate(parts)


# ------------------------------------------------------------------------------------------------ files


def _read_wav(file: BinaryIO, size: int) -> tuple[int, np.ndarray]:
    """(rate, samples) of a RIFF file, read to the end of its first 12 bytes; `size` is that of the file in bytes."""
    shape = None
    while len(header := file.read(8)) == 8:
        name, length = struct.unpack("<4sI", header)
        if name == b"data":
            if shape is None:
                raise UserError("a damaged WAV: its samples come before their format")
            rate, blocks = _pcm(file, shape, length, size - file.tell())
            return rate, _mono(blocks, rate)
        body = file.tell()
        if name == b"fmt ":
            shape = file.read(min(length, 40))
        file.seek(body + length + length % 2)
    raise UserError("a WAV without sound: it has no data chunk")


def _pcm(file: BinaryIO, shape: bytes, length: int, there: int) -> tuple[int, Iterator[np.ndarray]]:
    """(rate, blocks (n, channels) in [-1, 1]) of the `length` bytes that follow, as the format chunk `shape` says."""
    if len(shape) < 16:
        raise UserError("a damaged WAV: its format chunk is too short")
    code, channels, rate, _, align, bits = struct.unpack("<HHIIHH", shape[:16])
    if code == EXTENSIBLE and len(shape) >= 26:
        code = struct.unpack("<H", shape[24:26])[0]
    width = -(-bits // 8)
    if (code, width) not in ((PCM, 1), (PCM, 2), (PCM, 3), (PCM, 4), (FLOAT, 4), (FLOAT, 8)):
        kind = {PCM: "PCM", FLOAT: "float", **ENCODINGS}.get(code, f"code {code}")
        raise UserError(f"a WAV of {bits}-bit {kind}; save it as PCM of 8 to 32 bits, or as float")
    if not channels or align != channels * width:
        raise UserError(f"a damaged WAV: {channels} channels of {bits} bits do not take {align} bytes")
    if length > there and length < STREAMED:
        raise UserError(f"cut off: its header promises {length:,} bytes of sound, and {there:,} follow")

    def blocks() -> Iterator[np.ndarray]:
        left = min(length, there) // align
        while left:
            raw = file.read(min(left, BLOCK) * align)
            left -= min(left, BLOCK)
            yield _numbers(raw, code, width).reshape(-1, channels)

    return rate, blocks()


def _numbers(raw: bytes, code: int, width: int) -> np.ndarray:
    if code == FLOAT:
        return np.frombuffer(raw, f"<f{width}")
    if width == 1:  # the one width without a sign
        return (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / 128
    if width == 3:
        whole = np.zeros((len(raw) // 3, 4), np.uint8)  # little-endian: the lowest byte stays zero
        whole[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        raw, width = whole.tobytes(), 4
    return np.frombuffer(raw, f"<i{width}").astype(np.float32) / 2.0 ** (8 * width - 1)


def _decode(path: Path, kind: str) -> tuple[int, np.ndarray]:
    """(rate, samples) of a file that libsndfile reads."""
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: the package without its library
        raise UserError(f"{kind} needs soundfile: pip install 'vqa-scratch[audio]'") from None
    try:
        with soundfile.SoundFile(str(path)) as file:
            return file.samplerate, _mono(file.blocks(BLOCK, dtype="float32", always_2d=True), file.samplerate)
    except soundfile.SoundFileError as error:
        raise UserError(f"damaged, or no {kind}: {getattr(error, 'error_string', error)}") from error


def write_wav(path: str | Path, wave: Tensor, rate: int = 16_000) -> None:
    """Write samples (N,) as `wav_bytes`. The file appears whole or not at all."""
    data = wav_bytes(wave, rate)
    write_whole(Path(path), lambda own: own.write_bytes(data))


def wav_bytes(wave: Tensor, rate: int = 16_000) -> bytes:
    """Samples (N,) as a WAV of 16-bit PCM; what lies outside [-1, 1] is clipped."""
    samples = (wave.detach().cpu().double() * 2**15).round().clamp(-(2**15), 2**15 - 1).to(torch.int16)
    with io.BytesIO() as made:
        with wav.open(made, "wb") as file:
            file.setparams((1, 2, rate, len(samples), "NONE", ""))
            file.writeframes(samples.numpy().astype("<i2").tobytes())
        return made.getvalue()


# ------------------------------------------------------------------------------------------------ resampling


def resample(wave: Tensor, of: int, to: int) -> Tensor:
    """(N,) samples at `of` Hz as (ceil(N to / of),) at `to` Hz.

    Frequencies up to 0.91 of the lower Nyquist rate pass, those above it are 90 dB down; there is silence before and
    after the wave. Raises UserError if the ratio of the rates is of numbers too large.
    """
    if of == to:
        return wave
    up, down = to // math.gcd(of, to), of // math.gcd(of, to)
    periods = max(1, 256 // up)  # in a row of the product, which long rows make quick
    reach = -(-CROSSINGS * max(up, down) // up)
    if (2 * reach + periods * down) * periods * up > LARGEST:
        raise UserError(f"{of:,} samples a second, which no small ratio brings to {to:,}: convert it")
    wanted = -(-len(wave) * up // down)
    rows = -(-wanted // (periods * up))
    padded = F.pad(wave, (reach, rows * periods * down + reach - len(wave)))
    pieces = padded.unfold(0, 2 * reach + periods * down, periods * down)
    matrix = _sinc(up, down, periods, reach).to(wave)
    return torch.cat([part @ matrix for part in pieces.split(2**12)]).flatten()[:wanted]


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)  # what is kept may take part in gradients later
def _sinc(up: int, down: int, periods: int, reach: int) -> Tensor:
    """(reach + periods x down + reach, periods x up) fp64: from a stretch of input samples to the output among them.

    Both lie on a grid `up` times finer than the input: input i at i x up, output p at p x down.
    """
    half = CROSSINGS * max(up, down)
    at = torch.arange(-half, half + 1, dtype=torch.float64)
    window = torch.kaiser_window(2 * half + 1, periodic=False, beta=BETA, dtype=torch.float64)
    filter_ = torch.sinc(CUTOFF * at / max(up, down)) * window
    filter_ *= up / filter_.sum()
    place = torch.arange(periods * up) * down - torch.arange(-reach, periods * down + reach)[:, None] * up + half
    inside = (place >= 0) & (place <= 2 * half)
    return torch.where(inside, filter_[place.clamp(0, 2 * half)], 0.0)
