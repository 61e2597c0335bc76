"""The network of `python -m bench voice` has a frame for each that CTC is told of."""

import pytest
import torch

from bench import voice


def test_a_batch_goes_through_the_network():
    utterances = voice.drawn(3, 0, voice.KINDS, speakers=True, texts=True)
    mel, words, sounds, frames = voice.batch_of(utterances, 2)
    logits, of_sounds = voice.Hearer(width=8, layers=1)(mel)
    assert logits.shape == (3, int(frames.max()), len(voice.VOCABULARY) + 1)
    assert of_sounds.shape == (3, int(frames.max()), len(voice.SOUNDS) + 1) and sounds.max() <= len(voice.SOUNDS)
    said = [" ".join(voice.VOCABULARY[i - 1] for i in row if i > 0) for row in words.tolist()]
    assert said == [voice.plain(u.text) for u in utterances]
    assert torch.isfinite(voice.ctc_loss(logits, words, frames))


def test_the_middle_of_a_word_is_that_of_its_sounds():
    """Labels 0 and 1 are a word, 2 is another; a frame is 40 ms."""
    path = torch.tensor([-1, 0, -1, -1, 1, -1, 2, 2, -1])
    assert voice.middles(path, [2, 1]) == pytest.approx([2.5 * 0.04, 6.5 * 0.04])
    assert voice.middles(path, [1, 1, 1]) == pytest.approx([0.04, 0.16, 0.26])
