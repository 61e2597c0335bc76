"""Goes through a recording of any length, window by window, and says what was spoken when (OpenAI's `transcribe.py`).

A window of 30 s is heard on its own. Where its text ends in the middle of a segment, the next window begins with that
segment; otherwise with the sound after it. Features are made a window at a time, so hours take no more memory than
their samples.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqa_scratch.audio.features import HOP, RATE, log_mel
from vqa_scratch.data.text import Tokenizer
from vqa_scratch.errors import UserError, some
from vqa_scratch.generation_options import GenerationOptions
from vqa_scratch.models.whisper import Whisper, WhisperConfig
from vqa_scratch.storage import read_object, typed, write_json
from vqa_scratch.training.precision import DTYPES, formats
from vqa_scratch.transcription.vocabulary import SpeechVocabulary
from vqa_scratch.transcription.window import Try, Window
from vqa_scratch.transcription.words import STATE_SECONDS, Word, by_letters, word_times
from vqa_scratch.weights.files import CONFIG, GENERATION
from vqa_scratch.weights.hub import locate
from vqa_scratch.weights.whisper_files import FIRST_MULTILINGUAL

FIRST_TIME = 50  # the latest first time, 1 s; released files that say less are wrong (transformers issue 27658)
LEAST_STEP = 25  # states, half a second: a window of which less was heard would be heard again and again
FORGET_ABOVE = 0.5  # temperature from which on a text is no good prompt for the next window


@dataclass(frozen=True)
class Segment:
    """What was said between two times, in seconds."""

    start: float
    end: float
    text: str
    temperature: float
    average_log_prob: float
    compression_ratio: float
    no_speech_prob: float
    words: list[Word] | None = None


@dataclass
class Transcriber:
    """A released Whisper, or one of a run, ready to listen: in eval mode on `device`."""

    source: str
    model: Whisper
    vocabulary: SpeechVocabulary
    device: torch.device
    barred: tuple[int, ...]  # tokens that never come
    barred_first: tuple[int, ...]  # and that do not come first
    heads: list[tuple[int, int]]  # (layer, head) of the attention that follows the sound
    spelled: tuple[nn.Module, str] | None = None  # a head of CTC on the states, and its symbols after the blank

    @property
    def knows_times(self) -> bool:
        """Whether it has tokens of times."""
        return self.model.config.vocab_size > self.vocabulary.first_time

    def options(
        self, room: int, *, times: bool = True, max_new_tokens: int | None = None, **decoding: Any
    ) -> GenerationOptions:
        """How a window is heard, in at most `room` tokens; with `times` by the rules of timestamps."""
        return GenerationOptions(
            min(room, max_new_tokens or self.model.config.max_positions // 2),
            self.vocabulary.end,
            suppress_tokens=self.barred,
            begin_suppress_tokens=self.barred_first,
            no_timestamps_token_id=self.vocabulary.no_times if times else None,
            max_initial_timestamp_index=FIRST_TIME if times else None,
            **decoding,
        )

    def check(self, language: str | None, task: str, max_new_tokens: int | None = None) -> None:
        """Raise UserError for a language or a task that the model does not know, and for more tokens than have room."""
        known = self.vocabulary.languages
        if not self.vocabulary.multilingual:
            if language is not None or task != "transcribe":
                what = f"--language {language}" if language is not None else f"--task {task}"
                raise UserError(f"{self.source} knows English alone, and writes it: leave out {what}")
        elif language is not None and language not in known:
            raise UserError(f"{self.source} knows no language {language!r}; it knows {some(known, 12)}")
        room = self.model.config.max_positions - len(self.vocabulary.prompt(language, task))
        if (max_new_tokens or 0) > room:
            raise UserError(f"max_new_tokens {max_new_tokens}: a window of {self.source} has room for {room}")

    def features(self, wave: Tensor) -> Tensor:
        """Samples (n,) of a window at most -> the log-mel (1, M, F) of the window."""
        config = self.model.config
        return log_mel(wave.to(self.device), config.mels, seconds=config.frames * HOP / RATE)[None]

    @torch.inference_mode()
    def states(self, wave: Tensor) -> Tensor:
        """Samples (n,) of a window at most -> states (1, N, D)."""
        return self.model.encode(self.features(wave))

    def transcribe(
        self,
        wave: Tensor,
        *,
        language: str | None = None,
        task: str = "transcribe",
        words: bool = False,
        times: bool | None = None,
        previous_text: bool = False,
        **decoding: Any,
    ) -> Iterator[Segment]:
        """The segments of samples (n,) at 16 kHz, as they are heard. Raises UserError as `check` does.

        Without a language a model of several finds it out in the first window that holds sound. `words` gives each its
        times; with `previous_text` a window is heard as the continuation of what was said before. Without `times` (the
        only way of a model that has no tokens of them) a recording of one window is one segment, and its words are a
        little surer.
        """
        self.check(language, task, decoding.get("max_new_tokens"))
        if times and not self.knows_times:
            raise UserError(f"{self.source} has no tokens of times: leave out --times")
        times = self.knows_times if times is None else times
        vocabulary, frames = self.vocabulary, self.model.config.frames
        said: list[int] = []  # in the windows before this one
        seek, total = 0, -(-len(wave) // HOP)
        if not times and total > frames:
            most, there = frames * HOP / RATE, len(wave) / RATE
            raise UserError(
                f"{there:.1f} s are heard by times: only a recording of at most {most:g} s can do without"
                if self.knows_times
                else f"{there:.1f} s are too long for {self.source}: it hears {most:g} s, and knows no times"
            )
        while seek < total:
            piece, length = wave[seek * HOP : (seek + frames) * HOP], min(frames, total - seek)
            if not piece.any():
                seek += length
                continue
            states = self.states(piece)
            if vocabulary.multilingual and language is None:
                language = Window(self.model.decoder, vocabulary, states, [vocabulary.start]).language()
            prompt = vocabulary.prompt(language, task) + [vocabulary.no_times] * (not times)
            if previous_text and said:
                prompt = [vocabulary.previous, *said[1 - self.model.config.max_positions // 2 :], *prompt]
            room = self.model.config.max_positions - len(prompt)
            heard = Window(self.model.decoder, vocabulary, states, prompt).hear(
                self.options(room, times=times, **decoding)
            )
            pieces, step = cut(heard.ids, vocabulary.first_time, -(-length // 2))
            if not heard.holds_speech:
                pieces, step = [], -(-length // 2)
            timed = [[index for index in ids if index < vocabulary.end] for _, _, ids in pieces]
            spans = None
            if words and any(timed):
                whole = [index for ids in timed for index in ids]
                spans = iter(self.times_of(states, language, task, whole, length))
            for (first, last, _), ids in zip(pieces, timed, strict=True):
                own = None if spans is None else spoken(spans, len(ids), seek)
                text = vocabulary.text(ids)
                if last > first and any(letter.isalnum() for letter in text):
                    yield self._segment(seek, first, last, text, heard, own)
            said += [index for _, _, ids in pieces for index in ids]
            if heard.temperature >= FORGET_ABOVE or heard.repetitive:
                said = []
            seek += max(2 * step, min(2 * LEAST_STEP, length))

    def words(self, wave: Tensor) -> str:
        """All words of samples (n,) at 16 kHz in a line. Raises UserError if there are none."""
        said = " ".join(segment.text.strip() for segment in self.transcribe(wave))
        if not said:
            raise UserError("no words are heard in the recording: ask again, nearer to the microphone")
        return said

    @torch.no_grad()
    def times_of(
        self, states: Tensor, language: str | None, task: str, ids: list[int], frames: int
    ) -> list[tuple[Word, int]]:
        """The words of text ids as in `word_times`; with a head of CTC each is timed by where that spells it."""
        words = word_times(self.model, self.vocabulary, states, language, task, ids, self.heads, frames)
        return words if self.spelled is None else by_letters(words, self.spelled[0](states[:, : -(-frames // 2)]))

    def save(self, folder: Path) -> None:
        """Write it as `transformers` reads it: weights, tokenizer, how to generate, how to make features."""
        words, sizes = self.vocabulary, self.model.config
        self.model.save_pretrained(folder)
        words.tokenizer.save(folder)
        said: dict[str, Any] = {f"{role}_token_id": words.end for role in ("bos", "eos", "pad")}
        said |= {"decoder_start_token_id": words.start, "max_length": sizes.max_positions}
        said |= {"suppress_tokens": self.barred, "begin_suppress_tokens": self.barred_first}
        said |= {"no_timestamps_token_id": words.no_times, "max_initial_timestamp_index": FIRST_TIME}
        said |= {"prev_sot_token_id": words.previous, "alignment_heads": self.heads}
        said |= {"is_multilingual": words.multilingual, "return_timestamps": False}
        if words.multilingual:
            said["lang_to_id"] = {f"<|{name}|>": index for name, index in words.languages.items()}
            said["task_to_id"] = {"transcribe": words.transcribe, "translate": words.translate}
        write_json(folder / GENERATION, said)
        features = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": sizes.mels}
        features |= {"sampling_rate": RATE, "hop_length": HOP, "chunk_length": sizes.frames * HOP // RATE, "n_fft": 400}
        write_json(folder / "preprocessor_config.json", features)

    def _segment(self, seek: int, first: int, last: int, text: str, heard: Try, words: list[Word] | None) -> Segment:
        start = seek * HOP / RATE
        start, end = (round(start + position * STATE_SECONDS, 2) for position in (first, last))
        return Segment(start, end, text, heard.temperature, heard.average, heard.ratio, heard.silence, words)


def cut(ids: list[int], first_time: int, length: int) -> tuple[list[tuple[int, int, list[int]]], int]:
    """What was heard in a window of `length` states -> its segments (first state, last state, their ids), and how many
    states further on the next window begins.

    Two times in a row end a segment and begin the next. If the last segment has no end, it is left to the next window;
    if nothing follows the last time, no more is said in this one.
    """
    time = [index >= first_time for index in ids]
    ends = [place for place in range(1, len(ids)) if time[place - 1] and time[place]]
    closed = time[-2:] == [False, True]
    if not ends:
        last = max((index - first_time for index in ids if index >= first_time), default=0)
        first = ids[0] - first_time if time[:1] == [True] else 0
        return [(first, last if last > first else length, ids)] if ids else [], length
    ends += [len(ids)] * closed
    pieces = [ids[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    segments = [(piece[0] - first_time, piece[-1] - first_time, piece) for piece in pieces]
    return segments, length if closed else segments[-1][1]


def spoken(times: Iterator[tuple[Word, int]], count: int, seek: int) -> list[Word]:
    """The next words, of `count` tokens together, with times of the recording; `seek` is the window's first frame."""
    words, start = [], seek * HOP / RATE
    while count > 0 and (found := next(times, None)) is not None:
        word, tokens = found
        words.append(replace(word, start=round(start + word.start, 2), end=round(start + word.end, 2)))
        count -= tokens
    return words


# ------------------------------------------------------------------------------------------------ opening


def open_transcriber(source: str, device: torch.device, precision: str = "fp32") -> Transcriber:
    """A Whisper with its tokenizer: a folder, one of OpenAI's .pt files beside a tokenizer.json, or a Hub id.

    `precision` of the weights is fp32, bf16, fp16 or auto. Raises UserError, one line, if the checkpoint is incomplete,
    of another kind, or if its parts do not fit each other.
    """
    model = Whisper.from_pretrained(source)
    place = Path(source).parent if Path(source).is_file() else source
    tokenizer = Tokenizer.from_pretrained(place)
    sizes = model.config
    tokenizer.check_fits(sizes.vocab_size, source)
    folder = locate(place, [CONFIG, GENERATION], CONFIG)
    said: dict[str, Any] = {}
    for path in (folder / CONFIG, folder / GENERATION):  # the second counts
        if path.is_file():
            said |= {name: value for name, value in read_object(path).items() if value is not None}
    several = typed(source, said, {"is_multilingual": bool | None})[0]
    multilingual = sizes.vocab_size >= FIRST_MULTILINGUAL if several is None else several
    vocabulary = SpeechVocabulary(tokenizer, multilingual, source)
    start, end = vocabulary.start, vocabulary.end  # not all layouts say so
    model.config = replace(sizes, start_id=start, bos_id=end, eos_id=end, pad_id=end)
    barred = _ids(said, ("suppress_tokens", "suppress_ids"), source)
    first = _ids(said, ("begin_suppress_tokens", "suppress_ids_begin"), source)
    kind = formats(precision, device)[-1]
    return Transcriber(
        source,
        model.to(device, DTYPES[kind]),
        vocabulary,
        device,
        vocabulary.no_speech() if barred is None else barred,
        (vocabulary.encode(" ")[0], vocabulary.end) if first is None else first,
        heads_that_follow(said, sizes, source),
    )


def _ids(said: Mapping[str, Any], names: tuple[str, str], source: str) -> tuple[int, ...] | None:
    """A list of tokens, by the name that `transformers` or that CTranslate2 gives it; None if there is none."""
    for name in names:
        (ids,) = typed(source, said, {name: list | None})
        if ids is not None:
            if not all(isinstance(index, int) and index >= 0 for index in ids):
                raise UserError(f"{name} of {source} must hold ids of tokens, not {some(map(str, ids))}")
            return tuple(ids)
    return None


def heads_that_follow(said: Mapping[str, Any], sizes: WhisperConfig, source: str) -> list[tuple[int, int]]:
    """The heads that follow the sound; of files that do not name them all heads of the second half of the layers."""
    (found,) = typed(source, said, {"alignment_heads": list | None})
    layers, heads = sizes.decoder_layers, sizes.decoder_heads
    there = [(layer, head) for layer in range(layers) for head in range(heads)]
    if found is None:
        return [pair for pair in there if pair[0] >= layers // 2]
    if not found or any(not isinstance(pair, list) or tuple(pair) not in there for pair in found):
        raise UserError(f"alignment_heads of {source} must be pairs (layer, head) of {layers} layers of {heads} heads")
    return [(layer, head) for layer, head in found]
