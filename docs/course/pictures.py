"""Draws the pictures of lesson 6 into docs/images: `python docs/course/pictures.py`, from the top of the repository."""

from pathlib import Path

import matplotlib
import numpy as np
import torch

from vqa_scratch.audio import features
from vqa_scratch.data.voices import Speaker, speak
from vqa_scratch.kernels import ctc_align, ctc_loss, ctc_posteriors

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

IMAGES = Path(__file__).parents[1] / "images"
SENTENCE = ["where", "is", "the", "red", "circle"]


def main() -> None:
    rng = np.random.default_rng(0)
    speech = speak(" ".join(SENTENCE), Speaker.draw(rng), rng)
    wave = torch.from_numpy(speech.wave)
    one_frame(wave, next(span for span in speech.sounds if span[0] == "EH" and span[1] > 0.5))
    whole_sentence(speech, wave)


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


def whole_sentence(speech, wave: torch.Tensor) -> None:
    """A sentence, its spectrum, log-mel and MFCC, and what a network that learned it says at each frame."""
    power = features.power_spectrum(features.frames(features.pre_emphasis(wave)))[0:]
    inputs = features.normalised(features.mfcc(wave))
    labels = torch.arange(1, len(SENTENCE) + 1)[None]
    torch.manual_seed(0)
    net = torch.nn.Conv1d(39, len(SENTENCE) + 1, 25, padding=12)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        loss = ctc_loss(net(inputs.T[None]).mT, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits = net(inputs.T[None]).mT.detach()
    gamma, path = ctc_posteriors(logits, labels)[0], ctc_align(logits, labels)[0]
    seconds = len(wave) / features.RATE
    figure, axes = plt.subplots(5, 1, figsize=(11, 10), sharex=True, layout="constrained")
    axes[0].plot(np.arange(len(wave)) / features.RATE, wave, linewidth=0.4)
    axes[0].set_title("the wave, and when each word is said")
    for word, start, end in speech.words:
        axes[0].axvspan(start, end, color="tab:orange", alpha=0.2)
        axes[0].text((start + end) / 2, 0.42, word, ha="center")
    shown = [
        ("power spectrum of each frame, kHz", 10 * power.clamp(min=1e-9).log10().T, 8),
        ("Whisper's log-mel: 80 filters", features.log_mel(wave, seconds=None), 80),
        ("12 cepstra, normalised", inputs[:, 1:13].T, 12),
    ]
    for axis, (title, picture, top) in zip(axes[1:4], shown, strict=True):
        axis.imshow(picture, origin="lower", aspect="auto", extent=(0, seconds, 0, top))
        axis.set_title(title)
    time = np.linspace(0, seconds, len(gamma))
    for place, word in enumerate(SENTENCE):
        axes[4].plot(time, gamma[:, 2 * place + 1], label=word)
    axes[4].plot(time, gamma[:, ::2].sum(1), color="0.8", label="blank", zorder=0)
    for frame in (path >= 0).nonzero()[:, 0]:
        axes[4].plot(time[frame], -0.06, "|", color=f"C{int(path[frame])}", markersize=8)
    axes[4].set(title="CTC posteriors of the words; below them the likeliest path", xlabel="seconds")
    axes[4].legend(loc="upper right", fontsize=8)
    figure.savefig(IMAGES / "sentence.png", dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    main()
