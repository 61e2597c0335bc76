"""The options of the system that hears."""

from dataclasses import dataclass
from pathlib import Path

from vqa_scratch.options import option
from vqa_scratch.systems.run_options import (
    AUGMENTATION,
    DATA,
    LIMITS,
    LOGGING,
    MODEL,
    PRESET_HELP,
    RUN,
    TRAINING,
    RunOptions,
)

DRAWN = {"data": None}


@dataclass(frozen=True)
class VoiceOptions(RunOptions):
    """A small Whisper, whose encoder has a head for CTC too."""

    preset: str = option("voice", PRESET_HELP, RUN, ("voice",))
    out: Path = option(Path("runs/voice"), "Folder of the run.", RUN, may_change=True)
    data: Path | None = option(
        None,
        "Table or folder of recordings with transcripts (docs/speech.md); without it, drawn voices.",
        DATA,
        may_change=True,
    )
    utterances: int = option(5_000, "Drawn utterances to train on.", DATA, minimum=2, only=DRAWN)
    test_utterances: int = option(
        400, "Drawn utterances of val, and of test: half of them clean.", DATA, minimum=2, only=DRAWN
    )

    window: int = option(
        4, "Seconds that are heard at once; longer recordings are left out.", MODEL, minimum=1, maximum=30
    )
    width: int = option(128, "Width of encoder and decoder.", MODEL, minimum=4)
    heads: int = option(4, "Attention heads.", MODEL, minimum=1)
    encoder_layers: int = option(4, "Layers of the encoder.", MODEL, minimum=1, maximum=1_000)
    decoder_layers: int = option(2, "Layers of the decoder.", MODEL, minimum=1, maximum=1_000)
    vocabulary: int = option(512, "Largest vocabulary to learn for the decoder, in tokens.", MODEL, minimum=259)

    ctc_share: float = option(
        0.3, "Weight of CTC's loss; that of the decoder is one less this.", TRAINING, above=0, below=1
    )
    masks: int = option(
        2,
        "Bands of mels, and as many stretches of time, taken out of each training utterance.",
        AUGMENTATION,
        minimum=0,
        maximum=8,
    )
    utterances_per_step: int = option(16, "Utterances in one optimizer step.", LIMITS, minimum=1)
    eval_utterances: int = option(
        200, "Utterances of the val split heard at each evaluation while training.", LOGGING, minimum=1
    )
