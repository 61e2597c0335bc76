"""Draws the pictures of lesson 6 into docs/images: `python docs/course/pictures.py`, from the top of the repository."""

import random
from itertools import islice
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from vqa_scratch.audio import features
from vqa_scratch.data.voices import Speaker, Speech, sentences, speak
from vqa_scratch.kernels import ctc_loss, ctc_posteriors

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

IMAGES = Path(__file__).parents[1] / "images"


def main() -> None:
    rng = np.random.default_rng(0)
    speaker = Speaker.draw(rng)
    texts = ["where is the red circle?", *islice(sentences(random.Random(0)), 20)]
    heard, *known = [speak(text, speaker, rng) for text in texts]
    one_frame(torch.from_numpy(heard.wave), next(span for span in heard.sounds if span[0] == "EH" and span[1] > 0.5))
    whole_sentence(heard, known)


def one_frame(wave: torch.Tensor, span: tuple[str, float, float]) -> None:
    """The five steps on 25 ms in the middle of a vowel."""
    middle = round((span[1] + span[2]) / 2 * features.RATE)
    raw = wave[middle - features.FRAME // 2 :][: features.FRAME]
    emphasised = features.pre_emphasis(raw)
    piece = features.frames(emphasised)
    power = features.power_spectrum(piece)
    logs = features.log_energies(power)
    cepstra = features.cepstra(logs)[0]
    figure, axes = plt.subplots(1, 5, figsize=(15, 2.8), layout="constrained")
    ms, hertz = np.arange(features.FRAME) / 16, np.linspace(0, 8, features.FFT // 2 + 1)
    axes[0].plot(ms, raw, color="0.7")
    axes[0].plot(ms, emphasised)
    axes[0].set(title="1. pre-emphasis", xlabel="ms")
    axes[1].plot(ms, piece[0])
    axes[1].set(title="2. a frame, windowed", xlabel="ms")
    axes[2].plot(hertz, 10 * power[0].log10())
    axes[2].set(title="3. power spectrum, dB", xlabel="kHz")
    axes[3].plot(hertz, features.htk_filters(), color="0.8", linewidth=0.7)
    axes[3].twinx().plot(np.linspace(0, 8, features.FILTERS), logs[0], "o-", markersize=3)
    axes[3].set(title="4. log of 26 mel energies", xlabel="kHz (filters, grey)", yticks=[])
    axes[4].bar(np.arange(1, features.CEPSTRA), cepstra[1:])
    axes[4].set(title="5. cosine transform: 12 cepstra", xlabel="number")
    figure.savefig(IMAGES / "one-frame.png", dpi=80)
    plt.close(figure)


def learned(known: list[Speech], sounds: list[str]) -> torch.nn.Conv1d:
    """The map of the lesson, from MFCC to the logits of sounds at every other frame."""
    inputs = [features.normalised(features.mfcc(torch.from_numpy(speech.wave))) for speech in known]
    labels = pad_sequence([torch.tensor([sounds.index(s) for s, _, _ in speech.sounds]) for speech in known], True, -1)
    lengths = torch.tensor([-(-len(x) // 2) for x in inputs])
    torch.manual_seed(0)
    net = torch.nn.Conv1d(39, len(sounds), 9, padding=4, stride=2)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    for _ in range(30):
        loss = ctc_loss(net(pad_sequence(inputs, True).mT).mT, labels, lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def whole_sentence(speech: Speech, known: list[Speech]) -> None:
    """A sentence, its spectrum, log-mel and MFCC, and where the map hears each sound."""
    wave, sounds = torch.from_numpy(speech.wave), ["", *sorted({s for one in known for s, _, _ in one.sounds})]
    power = features.power_spectrum(features.frames(features.pre_emphasis(wave)))
    inputs, said = features.normalised(features.mfcc(wave)), [sound for sound, _, _ in speech.sounds]
    logits = learned(known, sounds)(inputs.T[None]).mT.detach()
    gamma = ctc_posteriors(logits, torch.tensor([[sounds.index(sound) for sound in said]]))[0]
    seconds = len(wave) / features.RATE
    figure, axes = plt.subplots(
        5, 1, figsize=(11, 11), sharex=True, layout="constrained", height_ratios=[2, 2, 2, 2, 4]
    )
    axes[0].plot(np.arange(len(wave)) / features.RATE, wave, linewidth=0.4)
    axes[0].set_title("the wave, and when each word is said")
    for word, start, end in speech.words:
        axes[0].axvspan(start, end, color="tab:orange", alpha=0.2)
        axes[0].text((start + end) / 2, 0.42, word, ha="center")
    shown = [
        ("power spectrum of each frame, kHz", 10 * power.clamp(min=1e-9).log10().T, 8),
        ("Whisper's log-mel: 80 filters", features.log_mel(wave, seconds=None), 80),
        ("12 cepstra, normalised", inputs[:, 1:13].T, 12),
        ("CTC posteriors of the sounds; lines: when they were said", gamma[:, 1::2].T.flip(0), len(said)),
    ]
    for axis, (title, picture, top) in zip(axes[1:], shown, strict=True):
        axis.imshow(picture, origin="lower", aspect="auto", extent=(0, seconds, 0, top))
        axis.set_title(title)
    for row, (_, start, end) in enumerate(speech.sounds):
        axes[4].plot([start, end], [len(said) - row - 0.5] * 2, color="tab:orange", linewidth=1)
    axes[4].set(yticks=np.arange(len(said)) + 0.5, yticklabels=said[::-1], xlabel="seconds")
    figure.savefig(IMAGES / "sentence.png", dpi=70)
    plt.close(figure)


if __name__ == "__main__":
    main()
