"""Features against their references: python_speech_features, and the extractors of transformers."""

import numpy as np
import pytest
import torch
import transformers
from transformers.audio_utils import mel_filter_bank

from vqa_scratch.audio import features, log_mel, mfcc, speecht5_mel
from vqa_scratch.data.voices import Speaker, speak

close = torch.testing.assert_close


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(samples).standard_normal(samples) * 0.1


def chirp(samples: int) -> np.ndarray:
    return 0.5 * np.sin(np.pi * 7_000 * np.arange(samples) ** 2 / 16_000 / samples)


def voice(samples: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.resize(speak("how many large red circles are there?", Speaker.draw(rng), rng).wave, samples)


# ------------------------------------------------------------------------------------------------ MFCC


@pytest.mark.parametrize("make", [noise, chirp, voice, np.zeros])
@pytest.mark.parametrize("samples", [1, 399, 400, 401, 560, 561, 16_001])
def test_mfcc_are_those_of_python_speech_features(make, samples):
    psf = pytest.importorskip("python_speech_features")
    wave = make(samples).astype(np.float64)
    static = psf.mfcc(wave, 16_000, nfft=512, winfunc=np.hamming)
    change = psf.delta(static, 2)
    expected = np.hstack((static, change, psf.delta(change, 2)))
    ours = mfcc(torch.from_numpy(wave))
    assert ours.shape == (1 + max(0, -(-(samples - 400) // 160)), 39)
    close(ours, torch.from_numpy(expected), rtol=0, atol=1e-6)
    close(mfcc(torch.from_numpy(wave).float()).double(), ours, rtol=0, atol=2e-2 if make is chirp else 2e-3)


def test_the_steps_are_what_mfcc_does_and_batches_are_rows():
    waves = torch.from_numpy(np.stack([noise(3_000), chirp(3_000)]))
    power = features.power_spectrum(features.frames(features.pre_emphasis(waves)))
    assert power.shape == (2, 18, 257)
    c = features.cepstra(features.log_energies(power))
    both = mfcc(waves)
    close(both[..., 1:13], c[..., 1:])
    close(both[..., 0], power.sum(-1).log())
    for row, wave in zip(both, waves, strict=True):
        close(row, mfcc(wave))


def test_a_cosine_transform_of_all_filters_loses_nothing():
    """Orthonormal: without the lifter the rows of the matrix have length 1 and meet at right angles."""
    matrix = features.cepstra(torch.eye(26, dtype=torch.float64)).T
    matrix = matrix / matrix.norm(dim=1, keepdim=True)
    close(matrix @ matrix.T, torch.eye(13, dtype=torch.float64))


def test_padding_takes_no_part_in_the_normalisation():
    rows = [torch.randn(t, 5, dtype=torch.float64) * 3 + 1 for t in (7, 4)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=99.0)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    out = features.normalised(padded, mask)
    for row, kept in zip(out, rows, strict=True):
        alone = features.normalised(kept)
        close(row[: len(kept)], alone)
        close(alone.mean(0), torch.zeros(5, dtype=torch.float64))
        close(alone.var(0, unbiased=False), torch.ones(5, dtype=torch.float64))
    assert not out[1, 4:].any()
    assert not features.normalised(torch.full((3, 2), 7.0)).any()  # what does not change


# ------------------------------------------------------------------------------------------------ spectrograms


@pytest.mark.parametrize(
    ("mels", "bins", "low", "high"), [(80, 201, 0, 8_000), (128, 201, 0, 8_000), (80, 513, 80, 7_600)]
)
def test_filters_are_those_of_transformers(mels, bins, low, high):
    expected = mel_filter_bank(bins, mels, low, high, 16_000, norm="slaney", mel_scale="slaney")
    close(features.slaney_filters(mels, bins, low, high), torch.from_numpy(expected), rtol=0, atol=1e-14)
    assert (expected.max(0) > 0).all()  # no filter without a frequency


@pytest.mark.parametrize("mels", [80, 128])
def test_log_mel_is_that_of_whisper(mels):
    extractor = transformers.WhisperFeatureExtractor(mels)
    waves = [voice(40_000), noise(480_000), chirp(90_001), voice(490_000), np.zeros(5), noise(1)]
    for wave in waves:
        wave = wave.astype(np.float32)
        expected = extractor(wave, sampling_rate=16_000, return_tensors="pt")["input_features"][0]
        ours = log_mel(torch.from_numpy(wave), mels)
        assert ours.shape == (mels, 3_000) and ours.dtype == torch.float32
        close(ours, expected, rtol=0, atol=1e-5)
    # A lone tone has places that are 80 dB down, where fp32 has no digits left: the numpy path computes in fp64.
    tone = np.sin(np.arange(480_000) * 0.4)
    exact = extractor._np_extract_fbank_features(tone[None], "cpu")[0]
    close(log_mel(torch.from_numpy(tone), mels).float(), torch.from_numpy(exact), rtol=0, atol=1e-5)


def test_log_mel_of_a_batch_and_of_other_lengths():
    waves = torch.from_numpy(np.stack([noise(20_000) * 3, voice(20_000) / 300])).float()  # each has its own maximum
    both = log_mel(waves, seconds=None)
    assert both.shape == (2, 80, 125)
    extractor = transformers.WhisperFeatureExtractor()
    for row, wave in zip(both, waves, strict=True):
        close(row, log_mel(wave, seconds=None), rtol=0, atol=1e-5)
        expected = extractor(
            wave.numpy(), sampling_rate=16_000, return_tensors="pt", padding="longest", truncation=False
        )
        close(row, expected["input_features"][0], rtol=0, atol=1e-5)
    assert log_mel(waves, seconds=4).shape == (2, 80, 400)
    close(log_mel(waves, seconds=1), log_mel(waves[:, :16_000], seconds=None))


@pytest.mark.parametrize("samples", [1, 2, 100, 512, 513, 16_000])
def test_the_mel_of_speecht5(samples):
    extractor = transformers.SpeechT5FeatureExtractor()
    wave = voice(samples).astype(np.float32)
    expected = extractor(audio_target=wave, sampling_rate=16_000, return_tensors="pt")["input_values"][0]
    ours = speecht5_mel(torch.from_numpy(wave).double())
    assert ours.shape == (1 + samples // 256, 80)
    close(ours.float(), expected, rtol=0, atol=1e-5)
    close(speecht5_mel(torch.from_numpy(wave))[None].double(), ours[None], rtol=0, atol=1e-3)


def test_features_carry_gradients():
    wave = torch.randn(900, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        features.slaney_filters.cache_clear()
        log_mel(wave, seconds=None)  # what is kept from here must serve the next line
    for made in (log_mel(wave, seconds=None), mfcc(wave), speecht5_mel(wave)):
        (gradient,) = torch.autograd.grad(made.sum(), wave)
        assert torch.isfinite(gradient).all() and gradient.any()


@pytest.mark.parametrize(
    "wave", [torch.zeros(9, dtype=torch.int16), torch.zeros(0), torch.tensor(1.0), torch.zeros(2, 0)]
)
def test_what_is_no_wave(wave):
    for make in (mfcc, log_mel, speecht5_mel):
        with pytest.raises(ValueError, match="a wave holds samples as fractions"):
            make(wave)


def test_less_than_a_frame():
    with pytest.raises(ValueError, match="159 samples are no frame; it takes 160"):
        log_mel(torch.zeros(159), seconds=None)
