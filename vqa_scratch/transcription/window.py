"""What a Whisper hears in one window: a greedy try or beams, and if that failed, tries at rising temperatures.

Radford et al. 2022 (2212.04356), section 4.5, as in OpenAI's `transcribe.py`: a try failed if its text is so repetitive
that zlib makes it 2.4 times shorter, or if its tokens are unlikely on average, unless the window holds no speech.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vqa_scratch.generate import Conditioning, Generated, GenerationOptions, State, begin, decode
from vqa_scratch.generate.beam import beam_search
from vqa_scratch.generate.choose import chooser
from vqa_scratch.generate.start import without_gradients
from vqa_scratch.models.gpt2 import GPT2
from vqa_scratch.nn.attention import masked_safely
from vqa_scratch.nn.memory import Memory
from vqa_scratch.transcription.vocabulary import SpeechVocabulary

TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0)
SAMPLES = 5  # at each of them; the likeliest counts
REPETITIVE, UNLIKELY, SILENT = 2.4, -1.0, 0.6
SURE = -0.5  # on average, to be believed although the window seems silent; OpenAI's -1 lets " you" and "..." pass
NO_REPEATS = 4  # tokens: at last, none of so many comes twice


@dataclass(frozen=True)
class Try:
    """What was heard, and how far to trust it."""

    ids: list[int]  # words and times, without the end token
    text: str
    temperature: float
    average: float  # log-probability of a token, the end token included
    silence: float  # probability that the window holds no speech

    @property
    def ratio(self) -> float:
        """How many times shorter zlib makes the text."""
        said = self.text.strip().encode()
        return len(said) / len(zlib.compress(said)) if said else 0.0

    @property
    def repetitive(self) -> bool:
        return self.ratio > REPETITIVE

    @property
    def holds_speech(self) -> bool:
        return self.silence <= SILENT or self.average > SURE

    @property
    def failed(self) -> bool:
        # A loop of repetitions is none of silence, whatever the model thinks of the window.
        return self.repetitive or (self.average < UNLIKELY and self.silence <= SILENT)


class Window:
    """The states of a window, and a prompt to continue."""

    def __init__(self, decoder: GPT2, vocabulary: SpeechVocabulary, states: Tensor, prompt: list[int]) -> None:
        """states (1, N, D)."""
        self.decoder, self.vocabulary, self.states, self.prompt = decoder, vocabulary, states, prompt

    def after_start(self, steps: int, rows: int = 1, beams: int = 1) -> tuple[Tensor, State, Tensor]:
        """The scores (rows, V) after the start token, which say whether there is speech and in which language; a state
        that goes on for `steps` steps; and the prompt up to there."""
        until = self.prompt.index(self.vocabulary.start) + 1
        ids = torch.tensor([self.prompt[:until]] * rows, device=self.states.device)
        given = Conditioning([Memory(self.states, repeat=rows)])
        scores, state = begin(self.decoder, ids, None, given, steps=steps, members=beams)
        return scores, state, ids

    def language(self) -> str:
        """The language that the decoder finds likeliest."""
        with without_gradients(), masked_safely(self.states.device):
            scores, _, _ = self.after_start(0)
        return max(self.vocabulary.languages, key=lambda name: float(scores[0, self.vocabulary.languages[name]]))

    def attempt(self, options: GenerationOptions, seed: int = 0) -> Try:
        """One try: greedy, by beams, or, with a temperature, the likeliest of some samples."""
        beams, heat = options.num_beams, options.temperature
        rows = 1 if heat is None else SAMPLES
        with without_gradients(), masked_safely(self.states.device):
            rest = self.prompt[self.prompt.index(self.vocabulary.start) + 1 :]
            scores, state, ids = self.after_start(len(rest) + options.max_new_tokens - 1, rows, beams)
            options.check_vocabulary(scores.shape[-1])
            silence = float(scores[0].float().softmax(-1)[self.vocabulary.silence])
            for token in rest:
                scores = state.step(torch.full((rows * beams,), token, device=ids.device))[::beams]
            made = self._finish(scores, state, ids, options, seed)
        assert made.log_probs is not None, "all ways to choose give scores"
        averages = made.log_probs.sum(1) / (made.lengths + (made.ids != self.vocabulary.end).all(1))
        best = int(averages.argmax())
        tokens = made.ids[best, : int(made.lengths[best])].tolist()
        tokens = tokens[:-1] if tokens[-1] == self.vocabulary.end else tokens
        return Try(tokens, self.vocabulary.text(tokens), heat or 0.0, float(averages[best]), silence)

    def _finish(self, scores: Tensor, state: State, ids: Tensor, options: GenerationOptions, seed: int) -> Generated:
        if options.num_beams > 1:
            return beam_search(scores, state, options, ids, None, self.vocabulary.end)
        generator = torch.Generator(ids.device).manual_seed(seed)
        choose, heat = chooser(options, ids, None, generator), options.temperature

        def untempered(scores: Tensor, live: Tensor, made: int) -> tuple[Tensor, Tensor | None]:
            token, after = choose(scores, live, made)
            return token, after if after is None or heat is None else after * heat

        most, end = options.max_new_tokens, self.vocabulary.end
        return decode(scores, state, untempered, max_new_tokens=most, eos_id=end, fill=end)

    def _tries(self, options: GenerationOptions) -> Iterator[Try]:
        yield self.attempt(options)
        drawn = replace(options, num_beams=1, length_penalty=None, early_stopping=None, do_sample=True)
        for number, heat in enumerate(TEMPERATURES):
            yield self.attempt(replace(drawn, temperature=heat), seed=number)
        yield self.attempt(replace(options, no_repeat_ngram_size=NO_REPEATS))

    def hear(self, options: GenerationOptions) -> Try:
        """The first try that did not fail; if all did, the likeliest that is not repetitive, else the last."""
        tries = []
        for tried in self._tries(options):
            if not tried.failed:
                return tried
            tries.append(tried)
        return max((tried for tried in tries if not tried.repetitive), key=lambda one: one.average, default=tries[-1])
