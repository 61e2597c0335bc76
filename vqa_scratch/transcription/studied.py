"""The study of what a Whisper hears: its subject, and what the page draws along the time of the sound.

Shapes: M mels, F frames of 10 ms, N states of 20 ms, P symbols of CTC.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqa_scratch.audio.features import HOP, RATE
from vqa_scratch.audio.reading import read_audio
from vqa_scratch.errors import UserError
from vqa_scratch.models.whisper import Whisper
from vqa_scratch.nn.connecting import Conditioning
from vqa_scratch.nn.memory import Memory
from vqa_scratch.study.base import Source, block_attentions
from vqa_scratch.study.opened import Opened, run_name, written
from vqa_scratch.study.packing import packed
from vqa_scratch.study.subject import WritingSubject
from vqa_scratch.transcription.transcriber import Transcriber
from vqa_scratch.transcription.window import Window
from vqa_scratch.transcription.words import STATE_SECONDS

LIKELY = 0.1  # a symbol that is never so probable is not drawn


class HeardSubject(WritingSubject):
    """A Whisper with the features (1, M, F) of a window, whose first `heard` states hold sound; the rest are sinks."""

    model: Whisper

    def __init__(self, model: Whisper, features: Tensor, heard: int, prompt: list[int], max_new_tokens: int) -> None:
        super().__init__(model, model.decoder, prompt, max_new_tokens)
        self.decoder, self.features = model.decoder, features.to(self.device)
        states = model.config.source_positions
        labels, silence = tuple(f"{i * STATE_SECONDS:.2f} s" for i in range(states)), tuple(range(heard, states))
        self.sources = (Source("audio", labels, silence, attentions=block_attentions("audio", model.encoder)),)
        self.mixing = torch.eye(states)

    def conditioning(self, tokens: int) -> Conditioning:
        return Conditioning([Memory(self.model.encode(self.features))])


def heard_in(opened: Transcriber, path: Path) -> Opened:
    """`heard` of a sound file. Raises UserError as that and as `read_audio`."""
    return replace(heard(opened, read_audio(path), str(path)), text=path.name)


def heard(opened: Transcriber, wave: Tensor, name: str) -> Opened:
    """Samples (n,) at 16 kHz, one window at most, as they are written down without times; errors call them `name`.

    Raises UserError for more, and for samples that are all silent.
    """
    sizes, vocabulary = opened.model.config, opened.vocabulary
    if len(wave) > (most := sizes.frames * HOP):
        raise UserError(f"{name} is {len(wave) / RATE:.1f} s long; a study is of one window, {most / RATE:g} s: cut it")
    if not wave.any():
        raise UserError(f"{name} is silent from beginning to end: there is nothing to study")
    frames = -(-len(wave) // HOP)
    features, language = opened.features(wave), None
    with torch.inference_mode():
        states = opened.model.encode(features)
        if vocabulary.multilingual:
            language = Window(opened.model.decoder, vocabulary, states, [vocabulary.start]).language()
    prompt = [*vocabulary.prompt(language, "transcribe"), vocabulary.no_times]
    options = opened.options(sizes.max_positions - len(prompt), times=False)
    subject = HeardSubject(opened.model, features, -(-frames // 2), prompt, options.max_new_tokens)
    barred = {"suppress_tokens": options.suppress_tokens, "begin_suppress_tokens": options.begin_suppress_tokens}
    subject.decide_by({"eos_id": vocabulary.end, **barred})
    shown = features[0, :, :frames].float()

    @torch.no_grad()
    def along(ids: list[int]) -> dict[str, Any]:
        said = [index for index in ids if index < vocabulary.end]
        timed = opened.times_of(states, language, "transcribe", said, frames) if said else []
        words = [(w.text.strip(), w.start, w.end, w.probability) for w, _ in timed]
        sound = {"source": "audio", "step": STATE_SECONDS, "seconds": frames * HOP / RATE, "words": words}
        sound["mel"] = packed(shown - shown.min(), "u8")
        if opened.spelled is not None:
            head, symbols = opened.spelled
            sound |= posteriors(head(states[0, : -(-frames // 2)]), symbols)
        return {"sound": sound}

    answer = written(vocabulary.tokenizer, prompt) | {"decode": lambda ids: vocabulary.text(ids).strip()}
    return Opened(run_name(Path(opened.source)), subject, name, None, **answer, more=along)


def posteriors(logits: Tensor, symbols: str) -> dict[str, Any]:
    """What the page shows of logits (N, 1 + P): the symbols that are ever likely, and their chances at each state."""
    chances = logits.detach().float().softmax(-1).T.cpu()
    kept = [place for place, row in enumerate(chances) if row.max() >= LIKELY]
    named = ["blank" if place == 0 else symbols[place - 1] for place in kept]
    return {"symbols": named, "posteriors": packed(chances[kept], "u8")}
