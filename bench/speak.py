"""Speaking as drawn voices do: a small SpeechT5 learns letters to frames, and says sentences that it never heard.

It learns from the speakers of `python -m bench voice`, each with an embedding of the numbers that he is drawn from, and
pink noise 40 dB below each utterance, as in a quiet room: a digital silence is a cliff that no mean frame goes over.
Griffin-Lim makes the sound, so its row says what is lost there. MCD is mel-cepstral distortion along the best path
(`audio/distortion.py`), always against the drawn voice's own frames of that sentence. Recognisers read the sound back:
the network of `python -m bench voice`, trained here on drawn voices alone, and with `--whisper` a Whisper, which knows
neither. The attention is checked against the truth, which drawn voices know: the share of steps whose peak is on a
letter of the word that is said then, and within one letter of the sound.

Shapes: B utterances, N letters, F frames, M mels, r frames a step, T steps of the decoder, S numbers of a speaker.
"""

import math
import random
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import normalizers
from torch import Tensor, nn

from bench import results, timing, voice
from vqa_scratch.audio import log_mel, speecht5_mel, write_wav
from vqa_scratch.audio.distortion import mel_cepstral_distortion
from vqa_scratch.audio.griffin_lim import HOP, griffin_lim
from vqa_scratch.commands.line import FOLDER, check_no_run
from vqa_scratch.data.letters import WORD, of_letters
from vqa_scratch.data.text import Tokenizer
from vqa_scratch.data.voices import PITCH, RATE, TRACT, Span, Speaker, sentences, with_noise
from vqa_scratch.data.voices import speak as drawn_speech
from vqa_scratch.generate.ctc import ctc_greedy
from vqa_scratch.models import SpeechT5, SpeechT5Config
from vqa_scratch.models.speecht5 import PADDING
from vqa_scratch.nn import taps
from vqa_scratch.training.spectrogram import CrossWeights, spectrogram_loss

NOISE = 40  # dB below the voice
TESTED = 48
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # in SpeechT5's order
SIZES = {
    "dim": 128, "encoder_layers": 2, "encoder_heads": 4, "encoder_hidden": 384, "decoder_layers": 2,
    "decoder_heads": 4, "decoder_hidden": 384, "dropout": 0.05, "attention_dropout": 0.0, "position_dropout": 0.0,
    "init_std": 0.08, "max_distance": 16, "max_text": 200, "max_speech": 400, "reduction": 4, "prenet_units": 128,
    "speaker_dim": 6, "postnet_layers": 3, "postnet_units": 128, "postnet_dropout": 0.1, "guided_heads": 2,
    "guided_sigma": 0.1,
}  # fmt: skip


@cache
def letters() -> Tokenizer:
    backend = of_letters([*SPECIAL, WORD, *string.ascii_lowercase, *"?.,'"], SPECIAL, 3)
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), backend.normalizer])
    return Tokenizer(backend, {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"})


def embedding(speaker: Speaker) -> Tensor:
    """(S,): the numbers of a speaker, each from about -1 to 1, and a one, brought to length 1."""
    low, high = map(math.log, PITCH)
    numbers = [
        2 * (math.log(speaker.pitch) - low) / (high - low) - 1,
        2 * (speaker.tract - TRACT[0]) / (TRACT[1] - TRACT[0]) - 1,
        (speaker.speed - 1.05) / 0.2,
        (speaker.breath - 0.07) / 0.05,
        (speaker.tilt - 425) / 175,
    ]
    return F.normalize(torch.tensor([*numbers, 1.0], dtype=torch.float32), dim=0)


@dataclass
class Line:
    """What a drawn voice said."""

    text: str
    speaker: Speaker
    mel: Tensor  # (F, M)
    wave: np.ndarray
    words: tuple[Span, ...]
    sounds: tuple[Span, ...]

    @classmethod
    def draw(cls, text: str, speaker: Speaker, rng: np.random.Generator) -> "Line":
        speech = drawn_speech(text, speaker, rng)
        wave = with_noise(speech.wave, NOISE, rng)
        return cls(text, speaker, speecht5_mel(torch.from_numpy(wave)), wave, speech.words, speech.sounds)


def draw(number: int, seed: int, *, speakers: bool, texts: bool) -> list[Line]:
    """Lines of `speakers` that training never hears (True) or may hear, saying such `texts`."""
    rng, asked = np.random.default_rng(seed), sentences(random.Random(seed), unseen=texts)
    return [Line.draw(next(asked), Speaker.draw(rng, unseen=speakers), rng) for _ in range(number)]


def batch_of(lines: Sequence[Line], reduction: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids (B, N), their mask, frames (B, F, M) in whole steps, -100 behind a row's end, speakers (B, S))."""
    ids, mask = letters().encode_batch([line.text for line in lines])
    frames = nn.utils.rnn.pad_sequence([line.mel for line in lines], True, PADDING)
    frames = F.pad(frames, (0, 0, 0, -frames.shape[1] % reduction), value=PADDING)
    return ids, mask, frames, torch.stack([embedding(line.speaker) for line in lines])


# ------------------------------------------------------------------------------------------------ training


def train(lines: list[Line], seconds: float, seed: int) -> tuple[SpeechT5, int]:
    """(the trained voice, how many utterances it learned from)."""
    torch.manual_seed(seed)
    model = SpeechT5(SpeechT5Config(vocab_size=len(letters()), **SIZES))
    with torch.no_grad():  # silence of the usual loudness is where learning begins
        model.to_frames.bias.copy_(torch.cat([line.mel for line in lines]).mean(0).repeat(model.config.reduction))
    lengths = [len(line.mel) for line in lines]

    def loss_of(part: np.ndarray) -> Tensor:
        return sum(spectrogram_loss(model, *batch_of([lines[i] for i in part], model.config.reduction)))

    return model, voice.learn(model, lengths, loss_of, seconds, seed)


# ------------------------------------------------------------------------------------------------ attention


def letters_said(line: Line, steps: int, reduction: int) -> tuple[Tensor, Tensor, Tensor]:
    """(word of each letter (N,), word of each step (T,), letter of each step (T,)): -1 for no word.

    A step's word and sound are what is said in the middle of its frames. A word's letters share its sounds evenly.
    """
    ids = torch.tensor(letters().encode(line.text))
    starts = ids == letters().backend.token_to_id(WORD)
    spoken = torch.tensor([letters().backend.id_to_token(i) in {WORD, *string.ascii_lowercase} for i in ids.tolist()])
    word_of = torch.where(spoken, starts.cumsum(0) - 1, -1)
    words, places = torch.full((steps,), -1), torch.full((steps,), -1)
    times = (torch.arange(steps) + 0.5) * reduction * HOP / RATE
    for number, (_, begins, ends) in enumerate(line.words):
        of_word = [sound for sound in line.sounds if begins - 1e-9 <= sound[1] and sound[2] <= ends + 1e-9]
        at = (word_of == number).nonzero()[1:, 0]  # without the mark before it
        for place, (_, start, end) in enumerate(of_word):
            said = (start <= times) & (times < end)
            words[said], places[said] = number, at[int((place + 0.5) / len(of_word) * len(at))]
    return word_of, words, places


@torch.no_grad()
def attention_found(model: SpeechT5, lines: list[Line]) -> dict[str, float]:
    """Of the steps in which something is said, the share whose attention (the mean of the guided heads of all layers)
    is highest on a letter of that word, and at most one letter from that of the sound."""
    config, right = model.config, {"word": [], "letter": []}
    for line in lines:
        ids, mask, frames, speaker = batch_of([line], config.reduction)
        with taps.activate(weights := CrossWeights()):
            model(ids, mask, frames, speaker)
        peak = torch.stack([layer[0, : config.guided_heads] for layer in weights]).mean((0, 1)).argmax(-1)
        word_of, words, places = letters_said(line, len(peak), config.reduction)
        said = words >= 0
        right["word"] += (word_of[peak] == words)[said].tolist()
        right["letter"] += ((peak - places).abs() <= 1)[said].tolist()
    return {name: float(np.mean(values)) for name, values in right.items()}


# ------------------------------------------------------------------------------------------------ judging


@torch.no_grad()
def said_by(model: SpeechT5, lines: list[Line], seed: int) -> tuple[list[Tensor], float]:
    """(the frames of each line as the model says it, the share that found their end)."""
    ids, mask, _, speakers = batch_of(lines, model.config.reduction)
    draw = torch.Generator().manual_seed(seed)
    spoken = model.speak(ids, speakers, mask, most=8.0, generator=draw)
    return [one.mel for one in spoken], float(np.mean([one.stopped for one in spoken]))


def sounded(mels: list[Tensor], seed: int) -> list[np.ndarray]:
    draw = torch.Generator().manual_seed(seed)
    return [griffin_lim(mel, draw).numpy() for mel in mels]


def distortion(waves: list[np.ndarray], lines: list[Line]) -> float:
    pairs = zip(waves, lines, strict=True)
    return float(np.mean([mel_cepstral_distortion(speecht5_mel(torch.from_numpy(w)), x.mel) for w, x in pairs]))


@torch.no_grad()
def heard_by(model: voice.Hearer, waves: list[np.ndarray]) -> list[list[str]]:
    mels = [log_mel(torch.from_numpy(wave), seconds=None).half() for wave in waves]
    mel, _, _, frames = voice.batch_of([voice.Utterance(mel, (), ()) for mel in mels])
    return [[voice.VOCABULARY[label - 1] for label in row] for row in ctc_greedy(model(mel)[0], frames)]


def heard_by_whisper(folder: str, waves: list[np.ndarray]) -> list[list[str]]:
    from vqa_scratch.transcription import open_transcriber

    opened = open_transcriber(folder, torch.device("cpu"))
    texts = ["".join(s.text for s in opened.transcribe(torch.from_numpy(wave), times=False)) for wave in waves]
    return [text.lower().translate(str.maketrans("", "", string.punctuation)).split() for text in texts]


def judged(model: SpeechT5, judge: voice.Hearer, whisper: str | None, tested: int, seed: int) -> list[list[str]]:
    """The rows of the table."""
    rows = []

    def row(name: str, waves: list[np.ndarray], lines: list[Line], mcd: float | None, goal: str = "") -> None:
        said = [[word for word, _, _ in line.words] for line in lines]
        errors = f"{voice.word_errors(said, heard_by(judge, waves)):.3f}{goal}"
        few = slice(0, len(lines) // 2)  # a Whisper takes its time
        other = "" if whisper is None else f"{voice.word_errors(said[few], heard_by_whisper(whisper, waves[few])):.3f}"
        rows.append([name, "" if mcd is None else f"{mcd:.2f}", errors, other])

    for unseen, who in ((False, "speakers as in training"), (True, "unseen speakers")):
        rng = np.random.default_rng(seed + 2)
        lines = draw(tested, seed + 1 + unseen, speakers=unseen, texts=True)
        again = [Line.draw(line.text, line.speaker, rng) for line in lines]
        if not unseen:
            row("the drawn voices themselves, a second time", [x.wave for x in again], lines,
                distortion([x.wave for x in again], lines))  # fmt: skip
            through = sounded([line.mel for line in lines], seed)
            row("their frames through Griffin-Lim", through, lines, distortion(through, lines))
        mels, stopped = said_by(model, lines, seed)
        waves = sounded(mels, seed)
        row(f"SpeechT5, unseen sentences, {who}; {stopped:.0%} found their end", waves, lines,
            distortion(waves, lines), " (goal at most 0.3)")  # fmt: skip
        others = [Line.draw(lines[i - 1].text, line.speaker, rng) for i, line in enumerate(lines)]
        rows.append([f"the same against another sentence, {who}", f"{distortion(waves, others):.2f}", "", ""])
    return rows


def run(
    minutes: float, number: int, judge_minutes: float, tested: int, seed: int, whisper: str | None, out: Path | None,
    command: str,
) -> str:  # fmt: skip
    """Draw, train the voice and its judge, save, score; returns the section of the results file."""
    began = time.perf_counter()
    lines = draw(number, seed, speakers=False, texts=False)
    drawing = time.perf_counter() - began
    model, trained = train(lines, 60 * minutes, seed)
    if out is not None:
        model.save_pretrained(out)
        letters().save(out)
        speaker = lines[0].speaker
        np.save(out / "speaker.npy", embedding(speaker).numpy())
        write_wav(out / "drawn.wav", torch.from_numpy(lines[0].wave))
    judge, _ = voice.train(
        voice.draw(number // 2, seed + 9, voice.mixed, speakers=False, texts=False), 60 * judge_minutes, seed
    )
    test = draw(tested, seed + 1, speakers=False, texts=True)
    found = attention_found(model, test)
    size = sum(p.numel() for p in model.parameters())
    head = ["what is heard", "MCD, dB", "word errors, bench voice's recogniser", "word errors, Whisper"]
    section = [
        "## Speaking as drawn voices do",
        "",
        " ".join(__doc__.split("\n\n")[1].split()),
        "",
        results.table(head, judged(model, judge, whisper, tested, seed)),
        "",
        f"- Attention on unseen sentences: the peak is on the word that is said in {found['word']:.1%} of the steps, "
        f"within one letter of the sound in {found['letter']:.1%}.",
        f"- {size:,} parameters, {number:,} utterances (drawn in {drawing:.0f} s),"
        f" {trained:,} heard in {minutes:g} minutes; the recogniser learned for {judge_minutes:g}; {tested} tested a "
        f"row, of which a Whisper hears half.",
        f"- {timing.machine('cpu')}. torch {torch.__version__}. Commit {timing.commit(Path(__file__).parent)}. "
        f"`{command}`",
    ]
    return "\n".join(section)


# ------------------------------------------------------------------------------------------------ command


@click.command("speak")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=9.0, show_default=True, help="Of training.")
@click.option("--judge-minutes", type=click.FloatRange(0, min_open=True), default=3.0, show_default=True,
              help="Of training the recogniser.")  # fmt: skip
@click.option("--utterances", type=click.IntRange(64), default=4_000, show_default=True, help="To train on.")
@click.option("--tested", type=click.IntRange(2), default=TESTED, show_default=True, help="Utterances of a row.")
@click.option("--whisper", help="A folder of a Whisper, to hear what was said.")
@click.option("--out", type=FOLDER, help="Folder for the trained voice, which `speak --model` speaks with.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of voices, weights and order.")
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md.")
def command(
    minutes: float, judge_minutes: float, utterances: int, tested: int, whisper: str | None, out: Path | None,
    seed: int, write: bool,
) -> None:  # fmt: skip
    """A small SpeechT5 learns to speak as drawn voices do; sentences and speakers that it never heard."""
    if out is not None:
        check_no_run(out, "--out")
    text = run(minutes, utterances, judge_minutes, tested, seed, whisper, out, results.command_given())
    results.present("speak", text, write)
