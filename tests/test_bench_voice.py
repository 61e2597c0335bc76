"""What `python -m bench voice` counts, and that its network has a frame for each that CTC is told of."""

import numpy as np
import pytest
import torch

from bench import voice


@pytest.mark.parametrize(
    ("heard", "errors"),
    [
        ("where is the circle", 0),
        ("where the circle", 1),
        ("where is is the circle", 1),
        ("what is a circle", 2),
        ("", 4),
    ],
)
def test_word_errors(heard, errors):
    said = "where is the circle".split()
    assert voice.edits(said, heard.split()) == errors
    assert voice.word_errors([said, ["a"]], [heard.split(), ["a"]]) == errors / 5


def test_a_batch_goes_through_the_network():
    utterances = voice.draw(3, 0, voice.hard, speakers=True, texts=True)
    mel, words, sounds, frames = voice.batch_of(utterances)
    logits, of_sounds = voice.Hearer(width=8, layers=1)(voice.masked(mel, np.random.default_rng(0)))
    assert logits.shape == (3, int(frames.max()), len(voice.VOCABULARY) + 1)
    assert of_sounds.shape == (3, int(frames.max()), len(voice.SOUNDS) + 1)
    assert [[voice.VOCABULARY[i - 1] for i in row if i > 0] for row in words.tolist()] == [u.text for u in utterances]
    assert torch.isfinite(voice.ctc_loss(logits, words, frames)) and (sounds >= 0).sum(1).min() > 0


def test_the_middle_of_a_word_is_that_of_its_sounds():
    """Labels 0 and 1 are a word, 2 is another; a frame is 40 ms."""
    path = torch.tensor([-1, 0, -1, -1, 1, -1, 2, 2, -1])
    assert voice.middles(path, [2, 1]) == pytest.approx([2.5 * 0.04, 6.5 * 0.04])
    assert voice.middles(path, [1, 1, 1]) == pytest.approx([0.04, 0.16, 0.26])
