"""The network of `python -m bench voice` has a frame for each that CTC is told of."""

import torch

from bench import voice


def test_a_batch_goes_through_the_network():
    utterances = voice.drawn(3, 0, voice.KINDS, speakers=True, texts=True)
    mel, words, frames = voice.batch_of(utterances, 2)
    logits = voice.Hearer(width=8, layers=1)(mel)
    assert logits.shape == (3, int(frames.max()), len(voice.VOCABULARY) + 1)
    said = [" ".join(voice.VOCABULARY[i - 1] for i in row if i > 0) for row in words.tolist()]
    assert said == [voice.plain(u.text) for u in utterances]
    assert torch.isfinite(voice.ctc_loss(logits, words, frames))
