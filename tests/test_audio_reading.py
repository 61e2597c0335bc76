"""Sound files against soundfile and scipy, every width by hand, and what is no sound file, in one line each."""

import struct
import sys

import numpy as np
import pytest
import torch

from vqa_scratch.audio import reading
from vqa_scratch.audio.reading import read_audio, resample, write_wav
from vqa_scratch.errors import UserError

close = torch.testing.assert_close


def chunk(name: bytes, body: bytes, length: int | None = None) -> bytes:
    return name + struct.pack("<I", len(body) if length is None else length) + body + b"\0" * (len(body) % 2)


def wav(data: bytes, bits=16, channels=1, rate=16_000, code=1, length=None, align=None, extensible=False) -> bytes:
    width = bits // 8
    shape = (0xFFFE if extensible else code, channels, rate, rate * channels * width)
    fmt = struct.pack("<HHIIHH", *shape, channels * width if align is None else align, bits)
    if extensible:
        fmt += struct.pack("<HHIH14s", 22, bits, 0, code, bytes.fromhex("000000001000800000aa00389b71"))
    return (
        b"RIFF"
        + struct.pack("<I", 99)
        + b"WAVE"
        + chunk(b"fmt ", fmt)
        + chunk(b"LIST", b"odd")
        + chunk(b"data", data, length)
    )


WIDTHS = {  # three samples: the lowest, a quarter, and zero
    "8": (wav(bytes([0, 160, 128]), 8), [-1, 0.25, 0]),
    "16": (wav(struct.pack("<3h", -(2**15), 2**13, 0)), [-1, 0.25, 0]),
    "24": (wav(b"\x00\x00\x80\x00\x00\x20\x00\x00\x00", 24), [-1, 0.25, 0]),
    "32": (wav(struct.pack("<3i", -(2**31), 2**29, 0), 32), [-1, 0.25, 0]),
    "float": (wav(struct.pack("<3f", -1, 0.25, 0), 32, code=3), [-1, 0.25, 0]),
    "double": (wav(struct.pack("<3d", -1, 0.25, 0), 64, code=3), [-1, 0.25, 0]),
    "loud float": (wav(struct.pack("<2f", -1.5, 3), 32, code=3), [-1.5, 3]),
    "extensible": (wav(struct.pack("<3h", -(2**15), 2**13, 0), extensible=True), [-1, 0.25, 0]),
    "six channels": (wav(struct.pack("<6h", *[2**13, 0, 0, 2**13, 0, 2**14]), channels=6), [1 / 6]),
    "one sample": (wav(struct.pack("<h", 2**14)), [0.5]),
    "streamed": (wav(struct.pack("<2h", 2**14, 0), length=2**32 - 1), [0.5, 0]),
}


@pytest.mark.parametrize("kind", WIDTHS)
def test_every_width_is_read_exactly(tmp_path, kind):
    content, expected = WIDTHS[kind]
    (tmp_path / "a.wav").write_bytes(content)
    wave = read_audio(tmp_path / "a.wav")
    close(wave, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=6e-8)  # a sixth is rounded


def test_blocks_are_joined(tmp_path, monkeypatch):
    write_wav(tmp_path / "a.wav", torch.rand(1_000) - 0.5)
    whole = read_audio(tmp_path / "a.wav")
    monkeypatch.setattr(reading, "BLOCK", 7)
    close(read_audio(tmp_path / "a.wav"), whole, rtol=0, atol=0)
    monkeypatch.setattr(reading, "BLOCK", 3_000)
    (tmp_path / "b.wav").write_bytes(wav(struct.pack("<8001f", *[0] * 8_000, float("nan")), 32, code=3))
    with pytest.raises(UserError, match=r"the first at 0\.50 s"):
        read_audio(tmp_path / "b.wav")


def test_what_is_written_is_read(tmp_path):
    wave = torch.linspace(-1.2, 1.2, 101)
    write_wav(tmp_path / "a.wav", wave)
    close(read_audio(tmp_path / "a.wav"), wave.clamp(-1, 1 - 2**-15), rtol=0, atol=2**-16)


@pytest.mark.parametrize(
    ("format_", "subtype"),
    [("WAV", "PCM_U8"), ("WAV", "PCM_24"), ("WAVEX", "PCM_16"), ("WAVEX", "FLOAT"), ("FLAC", "PCM_24"),
     ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16")],
)  # fmt: skip
def test_files_agree_with_soundfile(tmp_path, format_, subtype):
    soundfile = pytest.importorskip("soundfile")
    path = tmp_path / "a.sound"  # the content says what it is, not the name
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, (5_000, 2)), 16_000, subtype, format=format_)
    expected, rate = soundfile.read(path, dtype="float32")
    assert rate == 16_000
    close(read_audio(path), torch.from_numpy(expected.mean(1)), rtol=0, atol=1e-7)  # one rounding of the mean


RATES = [8_000, 11_025, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("samples", [1, 5_003])
def test_resampling_is_that_of_scipy(rate, samples):
    signal = pytest.importorskip("scipy.signal")
    step = np.gcd(rate, 16_000)
    up, down = 16_000 // step, rate // step
    wave = np.random.default_rng(rate).standard_normal(samples)
    taps = 2 * reading.CROSSINGS * max(up, down) + 1
    filter_ = signal.firwin(taps, reading.CUTOFF / max(up, down), window=("kaiser", reading.BETA))
    expected = signal.resample_poly(wave, up, down, window=filter_)
    close(resample(torch.from_numpy(wave), rate, 16_000), torch.from_numpy(expected), rtol=0, atol=1e-12)


def test_what_resampling_passes_and_what_it_stops():
    time = torch.arange(48_000, dtype=torch.float64) / 48_000
    for hertz, passes in ((440, True), (7_200, True), (8_100, False), (15_500, False)):
        wave = resample(torch.sin(2 * torch.pi * hertz * time), 48_000, 16_000)[400:-400]  # away from the ends
        expected = torch.sin(2 * torch.pi * hertz * time[::3])[400:-400] * passes
        assert (wave - expected).abs().max() < 10 ** (-88 / 20), hertz
    with pytest.raises(UserError, match="44,099 samples a second, which no small ratio brings to 16,000"):
        resample(torch.zeros(9), 44_099, 16_000)


def test_a_file_of_another_rate_is_resampled(tmp_path):
    time = torch.arange(9_600, dtype=torch.float64) / 96_000
    write_wav(tmp_path / "a.wav", torch.sin(2 * torch.pi * 500 * time), 96_000)
    wave = read_audio(tmp_path / "a.wav")
    assert wave.shape == (1_600,) and wave.dtype == torch.float32
    close(
        wave[200:-200], torch.sin(2 * torch.pi * 500 * time[::6]).float()[200:-200], rtol=0, atol=1e-4
    )  # 16 bits, 90 dB


NOTHING = struct.pack("<4f", 0, 0.5, float("nan"), 0)
BAD = {
    "empty": (b"", r"empty \(0 bytes\), not a sound file"),
    "text": (b"hello, this is a text", r"no WAV, FLAC, OGG, MP3 or AIFF \(it begins with b'hello, t'\)"),
    "utf-16": ("hello".encode("utf-16"), "no WAV, FLAC"),
    "no data": (wav(b"")[:-8], "a WAV without sound: it has no data chunk"),
    "only a name": (b"RIFF\0\0\0\0WAVE", "no data chunk"),
    "no samples": (wav(b""), r"no sound in it \(0 samples\)"),
    "cut off": (wav(bytes(10), length=4_000), "cut off: its header promises 4,000 bytes of sound, and 10 follow"),
    "no format": (wav(bytes(4)).replace(b"fmt ", b"xxxx"), "its samples come before their format"),
    "short format": (b"RIFF\0\0\0\0WAVE" + chunk(b"fmt ", b"abcd") + chunk(b"data", b""), "chunk is too short"),
    "mu-law": (wav(bytes(4), 8, code=7), "a WAV of 8-bit mu-law; save it as PCM of 8 to 32 bits, or as float"),
    "odd bits": (wav(bytes(8), 64), "a WAV of 64-bit PCM"),
    "unknown code": (wav(bytes(4), code=999), "code 999"),
    "no channels": (wav(bytes(4), channels=0), "0 channels of 16 bits do not take 0 bytes"),
    "wrong frame": (wav(bytes(4), align=3), "1 channels of 16 bits do not take 3 bytes"),
    "no rate": (wav(bytes(4), rate=0), "0 samples a second; from 1,000 to 768,000 can be right"),
    "an odd rate": (wav(bytes(4), rate=44_099), "44,099 samples a second, which no small ratio"),
    "nan": (wav(NOTHING, 32, code=3), "NaN or infinite samples, the first at 0.00 s"),
    "infinite": (wav(bytes(64_000) + struct.pack("<f", float("inf")), 32, code=3), "the first at 1.00 s"),
    "a damaged flac": (b"fLaC" + bytes(20), "damaged, or no FLAC"),
    "a film": (b"\0\0\0\x20ftypisom" + bytes(9), "no WAV, FLAC"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_sound_is_one_line(tmp_path, kind):
    if "flac" in kind:
        pytest.importorskip("soundfile")
    path = tmp_path / "talk.wav"
    path.write_bytes(BAD[kind][0])
    with pytest.raises(UserError, match=BAD[kind][1]) as error:
        read_audio(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_what_is_no_file(tmp_path):
    with pytest.raises(UserError, match="there is no such sound file"):
        read_audio(tmp_path / "none.wav")
    with pytest.raises(UserError, match="is not a file"):
        read_audio(tmp_path)


def test_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    for head, name in ((b"fLaC", "FLAC"), (b"OggS", "OGG"), (b"ID3", "MP3"), (b"\xff\xfb\x90\x00", "MP3")):
        (tmp_path / "a").write_bytes(head + bytes(20))
        with pytest.raises(UserError, match=f"a: {name} needs soundfile: pip install 'vqa-scratch"):
            read_audio(tmp_path / "a")


@pytest.mark.slow
def test_two_hours(tmp_path):
    """Of six channels one is kept, a block at a time: memory is that of the samples before and after resampling."""
    frames = 7_200 * 8_000
    with open(tmp_path / "a.wav", "wb") as file:
        file.write(wav(b"", 8, channels=6, rate=8_000, length=6 * frames))
        file.truncate(file.tell() + 6 * frames)
    wave = read_audio(tmp_path / "a.wav")
    assert wave.shape == (7_200 * 16_000,)
    for part in (wave[10_000:20_000], wave[-20_000:-10_000]):
        assert (part + 1).abs().max() < 1e-4  # bytes of zero are the lowest sample
