"""`speak`: a text as sound, by a released SpeechT5."""

from pathlib import Path

import click

from vqa_scratch.command_line import Flag, GroupedCommand
from vqa_scratch.commands.line import DEVICE, FOLDER
from vqa_scratch.errors import UserError
from vqa_scratch.storage import check_writable

OWN = "speaker.npy"


@click.command(
    "speak",
    cls=GroupedCommand,
    params=[
        click.Argument(["text"]),
        Flag(["--model"], required=True, help="A SpeechT5 for text to speech: a folder or Hub id."),
        Flag(["--out"], type=FOLDER, required=True, help="New WAV file, 16 kHz."),
        Flag(
            ["--speaker"],
            type=FOLDER,
            help="Speaker embedding, an x-vector: .npy or .safetensors.",
            shown=f"{OWN} in --model",
        ),
        Flag(["--vocoder"], help="A HiFi-GAN: a folder or Hub id.", shown="one in or beside --model"),
        Flag(["--seed"], type=click.IntRange(0, 2**63 - 1), default=0, help="Of the dropout that is always on."),
        DEVICE,
    ],
)
def speak(text: str, model: str, out: Path, speaker: Path | None, vocoder: str | None, seed: int, device: str) -> None:
    """Say TEXT in the voice of a speaker, into a WAV file.

    \b
    Example:
      python -m vqa_scratch speak --model speecht5_tts "How many circles?" --speaker voice.npy --out a.wav
    """
    check_writable(out.parent)
    if out.exists():
        raise UserError(f"--out {out} {'is a folder' if out.is_dir() else 'exists already'}; give a new file")
    from tqdm import tqdm

    from vqa_scratch.audio import write_wav
    from vqa_scratch.speech import RATE, Voice, read_speaker
    from vqa_scratch.training.precision import pick_device

    voice = Voice.open(model, vocoder, pick_device(device))
    size = voice.model.config.speaker_dim
    if speaker is None and (own := Path(model) / OWN).is_file():
        speaker = own
    if speaker is None:
        raise UserError(f"{model} speaks in the voice of a speaker embedding of {size} numbers: give --speaker FILE")
    vector = read_speaker(speaker, size)
    with tqdm(desc="speaking", unit="frame", leave=False) as bar:
        wave = voice.speak(text, vector, seed, lambda frames: bar.update(frames - bar.n))
    write_wav(out, wave, RATE)
    print(f"{len(wave) / RATE:.2f} s of speech written to {out}")
