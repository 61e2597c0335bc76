"""Mel-cepstral distortion: its closed form, what it does not see, and the warping of time."""

import math

import numpy as np
import pytest
import torch

from vqa_scratch.audio import speecht5_mel
from vqa_scratch.audio.distortion import mel_cepstra, mel_cepstral_distortion
from vqa_scratch.data.voices import Speaker, speak


def frames(number: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, 80, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_with_all_cepstra_it_is_the_difference_in_decibels():
    """The root mean square over the mels of 20 log10, without the loudness: Parseval's equation for cosines."""
    one, two = frames(1), frames(1, 1)
    assert mel_cepstral_distortion(one, two, 79) == pytest.approx(20 * float((one - two).std(correction=0)), rel=1e-9)
    smooth = torch.outer(torch.ones(3), torch.arange(80).double().add(0.5).mul(3 * math.pi / 80).cos())
    assert torch.allclose(mel_cepstra(5 + 2 * smooth), 2.0 * (torch.arange(1, 14) == 3).double().expand(3, -1))


def test_loudness_and_pace_do_not_count():
    said = frames(20)
    slower = said[torch.arange(40) // 2]
    assert mel_cepstral_distortion(said, said + 3.0) == pytest.approx(0, abs=1e-9)
    assert mel_cepstral_distortion(said, slower) == pytest.approx(0, abs=1e-9)
    assert mel_cepstral_distortion(said, said.flip(0)) > 5
    with pytest.raises(ValueError, match="of the same mels"):
        mel_cepstral_distortion(said, said[:, :40])


def test_a_sentence_is_nearer_to_itself_than_to_another():
    rng = np.random.default_rng(0)
    speaker = Speaker.draw(rng)
    texts = ["where is the red circle?", "where is the red circle?", "how many objects are above the large square?"]
    first, again, other = (speecht5_mel(torch.from_numpy(speak(text, speaker, rng).wave)) for text in texts)
    assert 2 * mel_cepstral_distortion(first, again) < mel_cepstral_distortion(first, other)
