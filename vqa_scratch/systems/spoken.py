"""Visual question answering whose questions are heard: no transcript is made, the sound is the model's text side.

It starts from two finished runs: image encoder and decoder of one that answers typed questions, and the encoder of one
that hears (`models/hearing.py`), which stays as it is. What it says of a question is computed once and kept.
"""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import torch
from torch import Tensor

from vqa_scratch.audio.reading import read_audio
from vqa_scratch.connectors import connect
from vqa_scratch.connectors.tokens import TokensConnector
from vqa_scratch.data.answers import Answer, Answers
from vqa_scratch.data.batches import Questions
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.spoken import CLEAN, DRAWN, KINDS, Spoil, draw, mel_of, mixed, sound_of, windows
from vqa_scratch.data.text import Tokenizer
from vqa_scratch.data.tokenizers import Tokenizers
from vqa_scratch.data.voices import WORDS, is_unseen, words_of
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.models.hearing import Hearing
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.nn.states import States
from vqa_scratch.systems import assembly
from vqa_scratch.systems.answering import How
from vqa_scratch.systems.base import RunData, seed_everything
from vqa_scratch.systems.options import SpokenOptions
from vqa_scratch.systems.questions import QuestionSystem
from vqa_scratch.systems.splits import Split
from vqa_scratch.systems.voice import VoiceSystem
from vqa_scratch.systems.vqa import VQASystem
from vqa_scratch.systems.writer import WritingSystem
from vqa_scratch.training.optimizers import Optimizers
from vqa_scratch.training.precision import Precision

AT_ONCE = 64  # questions that are said and encoded together


class SpokenSystem(WritingSystem[SpokenOptions], QuestionSystem[SpokenOptions, VQAModel, Questions]):
    """Questions about images, asked aloud.

    Drawn voices ask the questions of training that no measuring sentence is among; those of the other splits are unseen
    sentences by unseen speakers.
    """

    example = ""

    def __init__(self, options: SpokenOptions, model: VQAModel, tokenizers: Tokenizers, *more: Any) -> None:
        super().__init__(options, model, tokenizers, *more)
        assert isinstance(model.text, Hearing)
        self.ears = model.text.requires_grad_(False)

    # ------------------------------------------------------------------------------------------- build, save, open

    @classmethod
    def check(cls, options: SpokenOptions) -> None:
        if options.start_from is None or options.voice_model is None:
            raise UserError("--preset spoken needs --start-from, a run of shapes, and --voice-model, one of voice")
        if options.parallel == "fsdp":
            raise UserError("--parallel fsdp does not go with --preset spoken: what hears is needed whole")

    @classmethod
    def read(cls, options: SpokenOptions) -> RunData:
        data, samples = super().read(options), {}
        for name, some in data.samples.items():
            limit = options.spoken_texts // (1 if name == "train" else 4)
            samples[name] = sayable(some, name != "train", limit, name)
        return replace(data, samples=samples)

    @classmethod
    def build(cls, options: SpokenOptions, data: RunData, precision: Precision) -> Self:
        from vqa_scratch import systems  # it imports this module when it is asked for

        assert options.start_from and options.voice_model
        seed_everything(options.seed)
        typed: Any = systems.load(options.start_from)
        voice: Any = systems.load(options.voice_model)
        fits = isinstance(typed, VQASystem) and typed.options.experts is None
        if not fits or not isinstance(typed.model.connector, TokensConnector):
            raise UserError(f"--start-from {options.start_from} should be a run of --preset shapes --connector tokens")
        if not isinstance(voice, VoiceSystem):
            raise UserError(f"--voice-model {options.voice_model} should be a run of --preset voice")
        old, ears = typed.model, Hearing(voice.model.whisper.config)
        ears.encoder.load_state_dict(voice.model.whisper.encoder.state_dict())
        sizes = old.connector.sizes | {"kind": "heard", "pieces": ears.longest}
        connector = connect(sizes, old.image, ears, old.decoder)
        begun = {name: value for name, value in old.connector.state_dict().items() if not name.startswith("text_")}
        marks = begun.pop("modality", torch.zeros(2, 1))
        begun["places"] = begun["places"] + marks[0]  # every image token is marked so
        connector.load_state_dict(begun, strict=False)
        model = VQAModel(old.image, ears, connector, old.decoder)
        return cls(options, model, _tokenizers(options, typed.tokenizers.decoder), typed.processor, precision)

    @classmethod
    def open(cls, folder: Path, sizes: dict[str, Any], options: SpokenOptions, precision: Precision) -> Self:
        words = Tokenizer.from_pretrained(folder / "decoder_tokenizer")
        processor = ImageProcessor.from_pretrained(folder)
        return cls(options, assembly.assemble(sizes), _tokenizers(options, words), processor, precision, folder)

    def trained_by(self, optimizers: Optimizers) -> None:
        """Nothing more happens after a step."""

    # ---------------------------------------------------------------------------------------------------- hearing

    @torch.no_grad()
    def heard(self, mels: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Log-mels (T, M) -> the states (B, K, D) of what is heard in them, on the CPU, and their mask (B, K)."""
        ears, device = self.ears.to(self.precision.device), self.precision.device
        some = [mel[: ears.config.frames] for mel in mels]
        sounds, real = windows(some, ears.config.frames), sound_of(some, ears.config.frames)
        states = ears.states(sounds.to(device), real.to(device))
        assert states.mask is not None
        return states.tokens.cpu(), states.mask.cpu()

    def split(self, samples: Sequence[VQASample]) -> Split[Questions]:
        split = super().split(samples)
        split.questions.cached = Voices(self, samples)
        return split

    def precompute(self) -> None:
        for split in self.splits.values() if self.folder else ():  # a resumed run, which had no weights until now
            assert isinstance(split.questions.cached, Voices)
            split.questions.cached.made.clear()

    def encode_text(self, question: Tensor | None, attention_mask: Tensor | None) -> States | None:
        """What was heard, already as states."""
        assert question is not None
        return States(question, attention_mask)

    # ---------------------------------------------------------------------------------------------------- asking

    def ask_aloud(
        self, image: str | Path, recording: str | Path, decoding: dict[str, Any] | None = None
    ) -> list[Answer]:
        wave, most = read_audio(recording), self.ears.config.frames / 100
        if len(wave) > 16_000 * most:
            raise UserError(f"{recording} has {len(wave) / 16_000:.1f} s; {self.folder} hears {most:g} s at once")
        split = super().split([VQASample(0, Path(image), 0, "", "", "", (), "")])
        states = self.heard([mel_of(wave)])
        split.questions.cached = lambda rows: states
        return self.answers(split, [np.array([0])], How(decoding=decoding))[0]

    def answer(
        self, samples: Sequence[VQASample], limit: int | None = None, *, ranked: bool = False, **shown: Any
    ) -> Answers:
        """As in every system; it has no list to choose from."""
        return {} if ranked else super().answer(samples, limit, **shown)

    def ask(self, *asked: Any, **more: Any) -> NoReturn:
        self.lacks("hears its questions: give it --voice, a sound file")

    def subject(self, *asked: Any) -> NoReturn:
        self.lacks("hears its questions: there is nothing to study yet")

    def policy(self, *asked: Any) -> NoReturn:
        self.lacks("hears its questions, and cannot be tuned by feedback")

    def export(self, folder: Path) -> NoReturn:
        self.lacks("has no layout of `transformers` to be exported in")

    def what_next(self, folder: Path) -> list[str]:
        image = shlex.quote(str(self.splits["test"].questions.samples[0].image_path))
        return ["next:", f"  python -m vqa_scratch ask {shlex.quote(str(folder))} --image {image} --voice QUESTION.wav"]


class Voices:
    """What is heard of the questions of a split: each different one is said by a speaker of its own when it is needed.

    So many at once, always the same ones, so that what is heard does not depend on what else was needed before.
    """

    def __init__(self, system: SpokenSystem, samples: Sequence[VQASample]) -> None:
        texts = list(dict.fromkeys(sample.question for sample in samples))
        places = {text: place for place, text in enumerate(texts)}
        self.system, self.place = system, np.array([places[sample.question] for sample in samples])
        self.blocks = [texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE)]
        self.made: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """States (B, K, D) and mask (B, K) of the questions of these rows."""
        places = [divmod(int(place), AT_ONCE) for place in self.place[rows]]
        for block in {block for block, _ in places} - self.made.keys():
            texts, unseen = self.blocks[block], is_unseen(self.blocks[0][0])
            kinds: dict[str, Spoil] = {CLEAN: KINDS[CLEAN]} if unseen else {"mixed": mixed}
            said = draw(texts, (self.system.options.seed, len(DRAWN), block), kinds, unseen=unseen)
            self.made[block] = self.system.heard([one.mel for one in said])
        states, masks = ([self.made[block][part][place] for block, place in places] for part in (0, 1))
        return torch.stack(states), torch.stack(masks)


def sayable(samples: Sequence[VQASample], unseen: bool, limit: int, split: str) -> list[VQASample]:
    """The samples whose questions drawn voices can ask: of sentences kept for measuring or of the others, of so many
    different ones. Raises UserError if none is left."""

    def known(text: str) -> bool:
        try:
            words_of(text)
        except UserError:
            return False
        return is_unseen(text) == unseen

    texts = [text for text in dict.fromkeys(sample.question for sample in samples) if known(text)]
    chosen = set(texts[:limit])
    kept = [sample for sample in samples if sample.question in chosen]
    if not kept:
        raise UserError(f"no question of split {split} can be asked aloud: drawn voices know {len(WORDS)} words")
    print(f"{split}: {len(kept):,} of {len(samples):,} questions are asked aloud, {len(chosen):,} different ones")
    return kept


def _tokenizers(options: SpokenOptions, words: Tokenizer) -> Tokenizers:
    return Tokenizers(None, words, max_question_tokens=1, max_answer_tokens=options.max_answer_tokens)
