"""A released SpeechT5 with its tokenizer: a voice that says a text, or a writer of what it hears.

Shapes: N samples at 16 kHz, S size of a speaker embedding.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from vqa_scratch.audio.griffin_lim import griffin_lim
from vqa_scratch.data.letters import WORD
from vqa_scratch.data.spelled import spell_numbers
from vqa_scratch.data.text import Tokenizer, check_text
from vqa_scratch.errors import UserError, note, some
from vqa_scratch.generate import Conditioning, GenerationOptions, generate
from vqa_scratch.models import HifiGAN, HifiGANConfig, SpeechT5, SpeechT5Recognizer
from vqa_scratch.storage import read_object
from vqa_scratch.weights.files import CONFIG, check_finite, read_safetensors, resolve_folder

RATE = 16_000  # samples a second
MELS = 80  # that Griffin-Lim can read


def read_speaker(path: Path, size: int) -> Tensor:
    """(1, S): the speaker embedding in a .npy or .safetensors file of one array, (S,) or (1, S).

    A note says if its length is not 1, as that of x-vectors is; the model makes it so. Raises UserError for any other.
    """
    try:
        found = [*read_safetensors(path).values()] if path.suffix == ".safetensors" else [np.load(path)]
        (vector,) = (torch.as_tensor(array).float() for array in found)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except UserError:
        raise
    except (ValueError, TypeError, EOFError):  # no array, or objects in it; several tensors
        raise UserError(f"{path} must be a .npy or .safetensors file of one array of numbers") from None
    if tuple(vector.shape) not in ((size,), (1, size)):
        raise UserError(f"the speaker embedding in {path} is {tuple(vector.shape)}; this model takes {size} numbers")
    check_finite("the speaker embedding", vector, path)
    if abs((length := float(vector.norm())) - 1) > 1e-3:
        note(f"the speaker embedding in {path} has length {length:.3g}, not 1: is it an x-vector? the model makes it 1")
    return vector.reshape(1, size)


def vocoder_near(folder: Path) -> Path | None:
    """The folder of a HiFi-GAN in or beside that of a model, or None. Raises UserError if there are several."""
    found = []
    for path in sorted([*folder.glob(f"*/{CONFIG}"), *folder.absolute().parent.glob(f"*/{CONFIG}")]):
        with suppress(UserError, TypeError):  # what else lies there need not be a checkpoint
            found += [path.parent] * (read_object(path).get("model_type") in HifiGANConfig.LAYOUTS)
    if len(found) > 1:
        raise UserError(f"there are several vocoders near {folder}: {some(map(str, found))}; give one by --vocoder")
    return found[0] if found else None


@dataclass
class Voice:
    """A SpeechT5 that speaks, in eval mode on `device`."""

    source: str
    model: SpeechT5
    tokenizer: Tokenizer
    vocoder: HifiGAN | None  # None: Griffin-Lim
    device: torch.device

    @classmethod
    def open(cls, source: str | Path, vocoder: str | Path | None, device: torch.device) -> Self:
        """From a checkpoint folder or Hub id, with the given vocoder, or one near the folder, or Griffin-Lim, which a
        note says. Raises UserError if something is absent or does not fit."""
        model, tokenizer = SpeechT5.from_pretrained(source), Tokenizer.from_pretrained(source)
        tokenizer.check_fits(model.config.vocab_size, source)
        place, mels = vocoder_near(resolve_folder(source)) if vocoder is None else vocoder, model.config.mels
        if place is None:
            if mels != MELS:
                raise UserError(f"{source} gives {mels} mels, Griffin-Lim reads {MELS}: give a --vocoder")
            note(f"no vocoder in or beside {source}: Griffin-Lim guesses the phases, which sounds hollow")
            return cls(str(source), model.to(device), tokenizer, None, device)
        opened = HifiGAN.from_pretrained(place)
        if (opened.config.mels, opened.config.rate) != (mels, RATE):
            own = f"{opened.config.mels} mels at {opened.config.rate:,} Hz"
            raise UserError(f"the vocoder {place} is for {own}; {source} gives {mels} at {RATE:,} Hz")
        return cls(str(source), model.to(device), tokenizer, opened.to(device), device)

    def ids(self, text: str) -> Tensor:
        """(1, T): the tokens of a text, its numbers in words. Notes say how numbers are read, and which letters are
        unknown. Raises UserError if nothing is to be said, or too much."""
        text = " ".join(check_text(text, "the text is empty: give what to say").split())
        if (spelled := spell_numbers(text)) != text:
            note(f"numbers are read as words: {spelled}")
        if unknown := dict.fromkeys(letter for part in self.tokenizer.unknown(spelled) for letter in part):
            note(f"the voice does not know {some(map(repr, unknown))}: it may leave out what it cannot read")
        ids, backend = self.tokenizer.encode(spelled), self.tokenizer.backend
        if {self.tokenizer.unk_id, backend.token_to_id(WORD), *self.tokenizer.encode("")}.issuperset(ids):
            raise UserError(f"{text!r} holds no letter that this voice knows")
        if len(ids) > (most := self.model.config.max_text):
            raise UserError(f"the text is {len(ids):,} letters long, the model reads {most:,}: give it in sentences")
        return torch.tensor([ids], device=self.device)

    def speak(
        self, text: str, speaker: Tensor, seed: int = 0, progress: Callable[[int], object] = lambda frames: None
    ) -> Tensor:
        """(N,): the text in the voice of a speaker (1, S). A note says if it was stopped. Raises UserError as `ids`."""
        draw, ids = torch.Generator().manual_seed(seed), self.ids(text)
        (spoken,) = self.model.speak(
            ids, speaker.to(self.device), vocoder=self.vocoder, generator=draw, progress=progress
        )
        if not spoken.stopped:
            note(f"the voice found no end: it was stopped after {len(spoken.mel):,} frames")
        return griffin_lim(spoken.mel, draw) if spoken.wave is None else spoken.wave


@dataclass
class SpeechWriter:
    """A SpeechT5 that writes what it hears, in eval mode on `device`."""

    source: str
    model: SpeechT5Recognizer
    tokenizer: Tokenizer
    device: torch.device

    @classmethod
    def open(cls, source: str | Path, device: torch.device) -> Self:
        """From a checkpoint folder or Hub id. Raises UserError if something is absent or does not fit."""
        model, tokenizer = SpeechT5Recognizer.from_pretrained(source), Tokenizer.from_pretrained(source)
        tokenizer.check_fits(model.config.vocab_size, source)
        return cls(str(source), model.to(device), tokenizer, device)

    @torch.inference_mode()
    def transcribe(self, wave: Tensor, num_beams: int = 1) -> str:
        """The text of samples (N,). Raises UserError if they are too few for a state, or more than the positions."""
        config = self.model.config
        try:
            given = Conditioning(self.model.encode(wave.to(self.device)[None]))
        except ValueError as error:
            raise UserError(f"{self.source} cannot hear {len(wave) / RATE:.2f} s of sound: {error}") from None
        options = GenerationOptions(config.max_text - 1, config.eos_id, num_beams=num_beams)
        start = torch.full((1, 1), config.start_id, device=self.device)
        made = generate(self.model.decoder, start, None, given, options=options, fill=config.pad_id)
        return self.tokenizer.decode(made.ids[0, : made.lengths[0]]).strip()
