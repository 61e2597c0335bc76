"""`python -m bench speak`: its letters, what attention is held to, and that a trained voice speaks from its folder."""

import numpy as np
import pytest
import torch
from run_helpers import command

from bench import speak, voice
from vqa_scratch.data.voices import Speaker
from vqa_scratch.nn import taps
from vqa_scratch.training.spectrogram import CrossWeights

SMALL = {"dim": 16, "encoder_hidden": 16, "decoder_hidden": 16, "prenet_units": 8, "postnet_units": 8}


@pytest.fixture
def line() -> speak.Line:
    rng = np.random.default_rng(0)
    return speak.Line.draw("Where is the red circle?", Speaker.draw(rng), rng)


def test_letters():
    ids = speak.letters().encode("Is it RED?")
    assert [speak.letters().backend.id_to_token(i) for i in ids] == [*"▁is▁it▁red?", "</s>"]
    assert ids == speak.letters().encode("is it red?") and speak.letters().pad_id == 1


def test_a_batch_is_in_whole_steps(line):
    short = speak.Line.draw("what?", line.speaker, np.random.default_rng(1))
    ids, mask, frames, speakers = speak.batch_of([line, short], 4)
    assert mask.sum(1).tolist() == [len("▁where▁is▁the▁red▁circle?") + 1, len("▁what?") + 1]
    assert frames.shape[1] % 4 == 0 and torch.equal(frames[1, : len(short.mel)], short.mel)
    assert (frames[1, len(short.mel) :] == -100).all() and torch.allclose(speakers.norm(dim=1), torch.ones(2))


def test_the_letters_that_are_said_follow_the_voice(line):
    """Word by word and in order; "circle" has six letters for five sounds."""
    word_of, words, letters = speak.letters_said(line, 200, 1)
    said = letters[words >= 0]
    assert torch.equal(word_of[said], words[words >= 0]) and (said.diff() >= 0).all()
    assert word_of.tolist() == [0] * 6 + [1] * 3 + [2] * 4 + [3] * 4 + [4] * 7 + [-1, -1]
    frame = speak.HOP / speak.RATE
    for number, (_, begins, ends) in enumerate(line.words):
        at = (words == number).nonzero()[:, 0]
        assert abs(int(at[0]) * frame - begins) <= frame and abs(int(at[-1] + 1) * frame - ends) <= frame


def test_attention_on_the_truth_is_right_and_reversed_is_not(line, monkeypatch):
    """Weights that stand on the letter of each step's sound."""
    model = speak.SpeechT5(speak.SpeechT5Config(vocab_size=len(speak.letters()), **speak.SIZES | SMALL)).eval()
    steps = -(-len(line.mel) // 4)
    _, _, letters = speak.letters_said(line, steps, 4)
    shown = torch.nn.functional.one_hot(letters.clamp(min=0), len(speak.letters().encode(line.text))).float()

    def found(weights: torch.Tensor) -> dict[str, float]:
        monkeypatch.setattr(CrossWeights, "__call__", lambda self, name, x: self.append(weights.expand_as(x)) or x)
        return speak.attention_found(model, [line])

    assert found(shown) == {"word": 1.0, "letter": 1.0}
    assert max(found(shown.flip(0)).values()) < 0.5
    assert not taps.active()


def test_a_trained_voice_speaks_from_its_folder(tmp_path, monkeypatch, capsys):
    """A few steps, and all that the table needs; the folder is what `speak --model` reads."""
    monkeypatch.setattr(speak, "SIZES", speak.SIZES | SMALL)
    monkeypatch.setattr(voice, "BATCH", 2)
    monkeypatch.setattr(speak, "griffin_lim", lambda mel, draw: torch.randn(256 * len(mel), generator=draw))
    text = speak.run(tmp_path / "voice", 1e-3, 4, 1e-3, (), 2, 0, "command")
    monkeypatch.delattr(speak, "train")  # a voice that is there is not trained again
    assert not speak.trained(tmp_path / "voice", 1e-3, 4, 0).training
    assert "found their end" in text and "Griffin-Lim" in text and text.count("(goal at most 0.3)") == 2
    command("speak", "Where is 1 circle?", "--model", tmp_path / "voice", "--out", tmp_path / "a.wav")
    assert "s of speech written to" in capsys.readouterr().out
