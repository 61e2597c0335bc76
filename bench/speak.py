"""Speaking as drawn voices do: a small SpeechT5 learns letters to frames, and says sentences that it never heard.

It learns from the speakers of `python -m bench voice`, each with an embedding of the numbers that he is drawn from, and
pink noise 40 dB below each utterance, as in a quiet room: a digital silence is a cliff that no mean frame goes over.
Griffin-Lim makes the sound, so its row says what is lost there. MCD is mel-cepstral distortion along the best path
(`audio/distortion.py`), always against the drawn voice's own frames of that sentence. Recognisers read the sound back:
the network of `python -m bench voice`, trained here on drawn voices alone, and with `--judge` a run of preset voice, or
a Whisper, which knows neither. Drawn voices know when each word is said, so the attention is held against the truth:
the share of steps whose peak is on a letter of the word that is said then, and at most one letter from the sound.

Shapes: B utterances, N letters, F frames, M mels, r frames a step, T steps of the decoder, S numbers of a speaker.
"""

import math
import random
import string
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
from vqa_scratch.audio import speecht5_mel
from vqa_scratch.audio.distortion import mel_cepstral_distortion
from vqa_scratch.audio.griffin_lim import HOP, griffin_lim
from vqa_scratch.commands.line import FOLDER, check_no_run, open_ears
from vqa_scratch.commands.speak import OWN
from vqa_scratch.data.letters import WORD, of_letters
from vqa_scratch.data.spoken import CLEAN, Utterance, mel_of, mixed, plain
from vqa_scratch.data.text import Tokenizer
from vqa_scratch.data.voices import PITCH, RATE, TRACT, Span, Speaker, sentences, with_noise
from vqa_scratch.data.voices import speak as drawn_speech
from vqa_scratch.generate.ctc import ctc_greedy
from vqa_scratch.metrics import word_error_rate
from vqa_scratch.models import SpeechT5, SpeechT5Config
from vqa_scratch.models.speecht5 import PADDING
from vqa_scratch.nn import taps
from vqa_scratch.storage import read_object, write_json
from vqa_scratch.training.spectrogram import CrossWeights, spectrogram_loss

NOISE = 40  # dB below the voice
TESTED, FEW = 48, 16  # sentences of a row; of which judges that take their time hear some
ABOUT = "training.json"
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

    def loss_of(part: list[int], step: int) -> Tensor:
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
def heard_by(judge: voice.Hearer, waves: list[np.ndarray]) -> list[str]:
    mel, _, _, frames = voice.batch_of([Utterance(0, "", mel_of(wave), CLEAN) for wave in waves])
    return [" ".join(voice.VOCABULARY[label - 1] for label in row) for row in ctc_greedy(judge(mel)[0], frames)]


def heard_through(folder: str, waves: list[np.ndarray]) -> list[str]:
    ears = open_ears(folder)
    return [plain("".join(s.text for s in ears.transcribe(torch.from_numpy(w), times=False))) for w in waves]


def judged(model: SpeechT5, judge: voice.Hearer, folders: Sequence[str], tested: int, seed: int) -> list[list[str]]:
    """The rows of the table."""
    rows, named = [], "SpeechT5, unseen sentences, {}"

    def row(name: str, waves: list[np.ndarray], lines: list[Line], goal: str = "") -> None:
        said, some = [plain(line.text) for line in lines], slice(0, FEW)
        errors = [f"{word_error_rate(said, heard_by(judge, waves)):.3f}{goal}"]
        errors += [f"{word_error_rate(said[some], heard_through(folder, waves[some])):.3f}" for folder in folders]
        rows.append([name, f"{distortion(waves, lines):.2f}", *errors])

    for unseen, who in ((False, "speakers as in training"), (True, "unseen speakers")):
        rng = np.random.default_rng(seed + 2)
        lines = draw(tested, seed + 1 + unseen, speakers=unseen, texts=True)
        if not unseen:
            again = [Line.draw(line.text, line.speaker, rng) for line in lines]
            row("the drawn voices themselves, a second time", [line.wave for line in again], lines)
            row("their frames through Griffin-Lim", sounded([line.mel for line in lines], seed), lines)
        mels, stopped = said_by(model, lines, seed)
        waves = sounded(mels, seed)
        row(f"{named.format(who)}; {stopped:.0%} found their end", waves, lines, " (goal at most 0.3)")
        others = [Line.draw(lines[i - 1].text, line.speaker, rng) for i, line in enumerate(lines)]
        shuffled = f"{distortion(waves, others):.2f}"
        rows.append(
            [f"{named.format(who)}, against the drawn voice with another", shuffled, *["-"] * (1 + len(folders))]
        )
    return rows


def trained(out: Path, minutes: float, number: int, seed: int) -> SpeechT5:
    """The voice in a folder; if there is none yet, train it, and write it there with a speaker's embedding."""
    if (out / ABOUT).is_file():
        return SpeechT5.from_pretrained(out)
    lines = draw(number, seed, speakers=False, texts=False)
    model, heard = train(lines, 60 * minutes, seed)
    model.save_pretrained(out)
    letters().save(out)
    np.save(out / OWN, embedding(lines[0].speaker).numpy())
    write_json(out / ABOUT, {"utterances": number, "minutes": minutes, "heard": heard, "seed": seed})
    return model


def run(
    out: Path, minutes: float, number: int, judge_minutes: float, folders: Sequence[str], tested: int, seed: int,
    command: str,
) -> str:  # fmt: skip
    """Train the voice, unless `out` has it, and its judge; score; returns the section of the results file."""
    model = trained(out, minutes, number, seed)
    about, size = read_object(out / ABOUT), sum(p.numel() for p in model.parameters())
    judge, _ = voice.train(
        voice.drawn(number // 2, seed + 9, {"mixed": mixed}, speakers=False, texts=False), 60 * judge_minutes, seed
    )
    found = attention_found(model, draw(tested, seed + 1, speakers=False, texts=True))
    head = ["what is heard", "MCD, dB", "word errors, bench voice's network"]
    head += [f"word errors, {Path(folder).name}" for folder in folders]
    section = [
        "## Speaking as drawn voices do",
        "",
        " ".join(__doc__.split("\n\n")[1].split()),
        "",
        results.table(head, judged(model, judge, folders, tested, seed)),
        "",
        f"- Attention on unseen sentences: its peak is on the word that is said in {found['word']:.1%} of the steps, "
        f"within one letter of the sound in {found['letter']:.1%}.",
        f"- {size:,} parameters, {about['utterances']:,} utterances, {about['heard']:,} heard in {about['minutes']:g} "
        f"minutes of a core; the network that judges learned for {judge_minutes:g}. {tested} sentences a row, of which "
        f"the other judges hear {min(FEW, tested)}.",
        f"- {timing.machine('cpu')}. torch {torch.__version__}. Commit {timing.commit(Path(__file__).parent)}. "
        f"`{command}`",
    ]
    return "\n".join(section)


# ------------------------------------------------------------------------------------------------ command


@click.command("speak")
@click.option("--out", type=FOLDER, required=True, help="Folder of the voice; one that is there is judged as it is.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=8.0, show_default=True, help="Of a core.")
@click.option("--judge-minutes", type=click.FloatRange(0, min_open=True), default=3.0, show_default=True,
              help="Of a core, for the network that judges.")  # fmt: skip
@click.option("--utterances", type=click.IntRange(64), default=2_500, show_default=True, help="To train on.")
@click.option("--tested", type=click.IntRange(2), default=TESTED, show_default=True, help="Sentences of a row.")
@click.option("--judge", "judges", multiple=True, help="Another judge: a run of preset voice, or a Whisper; repeat it.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of voices, weights and order.")
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md.")
def command(
    out: Path, minutes: float, judge_minutes: float, utterances: int, tested: int, judges: tuple[str, ...], seed: int,
    write: bool,
) -> None:  # fmt: skip
    """A small SpeechT5 learns to speak as drawn voices do; sentences and speakers that it never heard."""
    check_no_run(out, "--out")
    text = run(out, minutes, utterances, judge_minutes, judges, tested, seed, results.command_given())
    results.present("speak", text, write)
