"""Speech to text: a small Whisper with a CTC head on its encoder, on drawn voices or on a user's own recordings.

Both heads learn at once (Watanabe et al. 2017, "Hybrid CTC/Attention Architecture for End-to-End Speech Recognition"):
CTC knows that letters come in the order of the sound, and the decoder's cross-attention reads the encoder that learns
so. What is heard is decoded in four ways: by each head, greedily and by a search.

Shapes: B utterances, M mels, F frames of a window, N = F / 2 states, D width.
"""

import math
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from vqa_scratch.data.recordings import read_recordings
from vqa_scratch.data.spoken import ALPHABET, DRAWN, SpeechBatch, Utterance, Utterances, drawn_split, facts
from vqa_scratch.data.text import Tokenizer
from vqa_scratch.data.tokenizers import Tokenizers
from vqa_scratch.errors import UserError
from vqa_scratch.generate import Conditioning, GenerationOptions, generate
from vqa_scratch.generate.ctc import ctc_beam, ctc_greedy
from vqa_scratch.kernels import ctc_loss
from vqa_scratch.models.vqa import labelled_loss
from vqa_scratch.models.whisper import WhisperConfig, WhisperCTC
from vqa_scratch.nn.memory import Memory
from vqa_scratch.systems.assembly import WithoutNumbers
from vqa_scratch.systems.base import RunData, System, seed_everything
from vqa_scratch.systems.finals import Pace, Pass
from vqa_scratch.systems.splits import TIMED, Key, in_time
from vqa_scratch.systems.voice_export import export_voice
from vqa_scratch.systems.voice_model import FRAMES, MOST, small_model, speech_tokenizer
from vqa_scratch.systems.voice_options import VoiceOptions
from vqa_scratch.systems.voice_report import WAYS, Heard, error_rates, figures_of, lines_of, show
from vqa_scratch.systems.voice_times import time_errors
from vqa_scratch.training.precision import Precision
from vqa_scratch.training.ranks import World
from vqa_scratch.transcription.transcriber import Transcriber, heads_that_follow
from vqa_scratch.transcription.vocabulary import SPECIAL, SpeechVocabulary

QUICK = ("attention greedy", "ctc greedy")  # of WAYS, while training
BEAMS, PREFIXES = 5, 8  # of the searches
AT_ONCE = 32  # utterances that are heard together


class VoiceSystem(System[VoiceOptions, WhisperCTC]):
    """Recordings of speech, and the words that are heard in them."""

    example = ""
    unit = "utterances"
    hears = True
    published_as = ("automatic-speech-recognition", "wer")
    spoken: dict[str, Utterances]  # the splits, while it trains

    def __init__(
        self,
        options: VoiceOptions,
        model: WhisperCTC,
        tokenizers: Tokenizers,
        precision: Precision,
        folder: Path | None = None,
    ) -> None:
        super().__init__(options, model, tokenizers, precision, folder)
        tokenizers.decoder.check_fits(model.whisper.config.vocab_size, "the decoder")
        self.vocabulary = words = SpeechVocabulary(tokenizers.decoder, False, str(folder or options.out))
        self.prompt = [*words.prompt(None, "transcribe"), words.no_times]
        self.barred = tuple(getattr(words, role) for role in SPECIAL if role != "end")
        self.pace = Pace()
        self.seconds: dict[str, float] = {}  # that each way of decoding took

    # ------------------------------------------------------------------------------------------- build, save, open

    @classmethod
    def check(cls, options: VoiceOptions) -> None:
        with WithoutNumbers():
            small_model(options, speech_tokenizer(["a"], options.vocabulary))

    @classmethod
    def read(cls, options: VoiceOptions) -> RunData:
        splits = read_splits(options, options.splits)
        return RunData(dict(zip(("train", "val", "test"), splits, strict=True)), lambda one: one.kind, facts=facts)

    @classmethod
    def build(cls, options: VoiceOptions, data: RunData, precision: Precision) -> Self:
        seed_everything(options.seed)
        tokenizer = speech_tokenizer([one.text for one in data.samples["train"]], options.vocabulary)
        return cls(options, small_model(options, tokenizer), _tokenizers(options, tokenizer), precision)

    @classmethod
    def open(cls, folder: Path, sizes: dict[str, Any], options: VoiceOptions, precision: Precision) -> Self:
        tokenizer = Tokenizer.from_pretrained(folder / "decoder_tokenizer")
        model = WhisperCTC(WhisperConfig.from_hf(sizes), 1 + len(ALPHABET))
        return cls(options, model, _tokenizers(options, tokenizer), precision, folder)

    @property
    def sizes(self) -> dict[str, Any]:
        return self.model.whisper.config.to_hf()

    # --------------------------------------------------------------------------------------------------- training

    def listed(self, utterances: Sequence[Utterance]) -> Utterances:
        """Utterances with their ids, in windows of the model."""
        return Utterances(utterances, self.tokenizers, self.prompt, self.model.whisper.config.frames)

    def train_on(self, data: RunData) -> None:
        self.spoken = {name: self.listed(some) for name, some in data.samples.items()}

    def about(self) -> list[str]:
        train, parameters = self.spoken["train"].samples, sum(p.numel() for p in self.model.parameters())
        seconds = sum(len(one.mel) for one in train) / FRAMES
        return [
            f"trainable: {parameters:,} parameters",
            f"training on {len(train):,} utterances, {seconds:,.0f} s of sound",
            f"cut to the token limit: {self.tokenizers.cut['answers']} transcripts",
        ]

    def epoch(self, number: int) -> list[Key]:
        options = self.options
        batches = self.spoken["train"].epoch(options.seed, number, options.utterances_per_step)
        return [Key(rows, (options.seed, number)) for rows in batches]

    def share(self, key: Key, world: World) -> tuple[Key, bool]:
        mine = world.share(range(len(key.rows)))
        return key._replace(rows=key.rows[list(mine or range(1))]), bool(mine)

    def batch(self, key: Key) -> SpeechBatch:
        return self.spoken["train"].batch(key.rows, self.options.masks, key.seed)

    def loss(self, batch: SpeechBatch) -> tuple[Tensor, Tensor]:
        """(sum over the utterances of what the two heads pay for them, how many tokens the decoder has right)."""
        whisper, share = self.model.whisper, self.options.ctc_share
        states = whisper.encode(batch.features)
        decoder = whisper.decoder
        hidden = decoder.hidden(decoder.embed(batch.decoder_input_ids), memory=[Memory(states)])
        written, right = labelled_loss(hidden, decoder.head, batch.labels)
        spelled = ctc_loss(self.model.ctc(states), batch.letters, batch.states, reduction="none")
        spelled = spelled * (batch.letters[:, 0] >= 0)  # else nothing is said of it: a silent batch
        return (1 - share) * written + share * spelled.sum(), right

    def ids(self, rows: list[int]) -> list[int | str]:
        return [self.spoken["train"].samples[row].name for row in rows]

    # ----------------------------------------------------------------------------------------------- hearing

    def decoded(self, way: str, states: Tensor, batch: SpeechBatch) -> list[str]:
        """What one of the `WAYS` makes of states (B, N, D)."""
        if way.startswith("ctc"):
            logits = self.model.ctc(states)
            if way == "ctc greedy":
                found = ctc_greedy(logits, batch.states)
            else:
                found = [best[0][0] for best in ctc_beam(logits, batch.states, width=PREFIXES)]
            return ["".join(ALPHABET[label - 1] for label in labels) for labels in found]
        end, beams = self.vocabulary.end, BEAMS if way == "attention beam" else 1
        options = GenerationOptions(
            self.tokenizers.max_answer_tokens, end, num_beams=beams, suppress_tokens=self.barred
        )
        prompt = torch.tensor([self.prompt] * len(states), device=states.device)
        given = Conditioning([Memory(states)])
        made = generate(self.model.whisper.decoder, prompt, given=given, options=options, fill=end)
        return [self.vocabulary.text(ids).strip() for ids in made.ids.tolist()]

    def hear(self, spoken: Utterances, chosen: Sequence[np.ndarray], ways: Sequence[str], **shown: Any) -> Heard:
        """{way: {row: what is heard}} for the rows of each of `chosen`; `shown` as in `in_time`."""
        heard: Heard = {way: {} for way in ways}
        ready = ((rows, spoken.batch(rows)) for rows in chosen)
        with self.evaluating():
            for rows, batch in in_time(ready, len(chosen), self.precision.device, **shown):
                with self.precision.autocast():
                    states = self.model.whisper.encode(batch.features)
                    for way in ways:
                        began = time.perf_counter()
                        heard[way] |= zip(rows.tolist(), self.decoded(way, states, batch), strict=True)
                        self.seconds[way] = self.seconds.get(way, 0.0) + time.perf_counter() - began
        return heard

    def listen(self, name: str, ways: Sequence[str], limit: int | None = None, label: str | None = None) -> Heard:
        """`hear` a split, or its first `limit` utterances. The ranks take turns at the batches, and all get all texts.

        With a label it is one of the final `passes`, and hears as many as its time allows.
        """
        spoken = self.spoken[name]
        number = min(limit or len(spoken.samples), len(spoken.samples))
        one = Pass(label or "", f"{name} {len(ways)}", number)
        began, until = time.perf_counter(), self.pace.begin(label) if label else None
        batches = in_batches(number, self.pace.fitting(one, until, AT_ONCE))
        found = self.world.gather(
            self.hear(spoken, batches[self.world.rank :: self.world.size], ways, progress=label, until=until)
        )
        heard = {way: {row: text for part in found for row, text in part[way].items()} for way in ways}
        self.pace.end(one, began, len(heard[ways[0]]))
        return heard

    def evaluate(self) -> dict[str, float]:
        heard = self.listen("val", QUICK, self.options.eval_utterances)
        errors = error_rates(self.spoken["val"].samples, heard)
        named = {f"word errors/{way}": rate for way, rate in errors.items()}
        return {"accuracy": max(0.0, 1 - errors[WAYS[0]]), **named}

    def scored(self, figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The word error rates of two ways."""
        lines = {way: [row[f"word errors/{way}"] for row in figures] for way in QUICK}
        return [{"title": "word errors, unseen speakers and sentences", "ylabel": "share of the words", "lines": lines}]

    def passes(self) -> list[Pass]:
        size = {name: len(spoken.samples) for name, spoken in self.spoken.items()}
        return [
            Pass("", f"val {len(QUICK)}", min(size["val"], self.options.eval_utterances)),
            Pass("recognition", f"test {len(WAYS)}", size["test"]),
        ]

    def try_out(self, one: Pass) -> None:
        self.listen(one.split.split()[0], WAYS if one.label else QUICK, TIMED)

    def finish(self, folder: Path) -> dict[str, Any]:
        """The errors of the four ways on the test split, of clean speech and of speech in noise, beside those of
        shuffled audio; how far off the times of words are, where they are known; samples.html."""
        self.seconds = {}
        heard, samples = self.listen("test", WAYS, label="recognition"), self.spoken["test"].samples
        figures = figures_of(samples, heard)
        figures["seconds_an_utterance"] = {way: took / len(heard[way]) for way, took in self.seconds.items()}
        with self.evaluating():
            figures["word_times_ms"] = time_errors(self, self.spoken["test"])
        if self.world.main:
            show(folder, figures, samples, heard, self.options.samples)
        return figures | {"cut_short": self.pace.cut}

    def lines(self, summary: dict[str, Any]) -> list[str]:
        return lines_of(summary)

    def what_next(self, folder: Path) -> list[str]:
        return ["next:", f"  python -m vqa_scratch transcribe {shlex.quote(str(folder))} FILE.wav --words"]

    # ---------------------------------------------------------------------------------------------------- asking

    def recognise(self, data: Path | None, split: str, limit: int | None) -> dict[str, Any]:
        (samples,) = read_splits(self.options, [split], data)
        spoken = self.listed(samples[:limit])
        batches = in_batches(len(spoken.samples), AT_ONCE)
        heard = self.hear(spoken, batches, WAYS, progress="listening")
        return {"data": str(data) if data else "drawn voices", "split": split, **figures_of(spoken.samples, heard)}

    def transcriber(self) -> Transcriber:
        whisper, words = self.model.whisper.to(dtype=self.precision.dtype), self.vocabulary
        heads = heads_that_follow({}, whisper.config, str(self.folder))
        spelled = self.model.ctc.to(dtype=self.precision.dtype), ALPHABET
        return Transcriber(
            str(self.folder), whisper, words, self.precision.device, self.barred, (words.end,), heads, spelled
        )

    def export(self, folder: Path) -> list[str]:
        return export_voice(self, folder)


def read_splits(options: VoiceOptions, names: Sequence[str], data: Path | None = None) -> list[list[Utterance]]:
    """The utterances of these splits: recordings of `data` or of the options, else those that the program draws."""
    frames, source = FRAMES * options.window, data or options.data
    if source is not None:
        found = {name: read_recordings(source, name, frames) for name in dict.fromkeys(names)}
        return [found[name] for name in names]
    if strange := [name for name in names if name not in DRAWN]:
        raise UserError(f"drawn voices have no split {', '.join(strange)}; give --data, the recordings that have it")
    size = {"train": options.utterances}
    drawn = {name: drawn_split(name, size.get(name, options.test_utterances), options.seed) for name in names}
    kept = {name: [one for one in some if len(one.mel) <= frames] for name, some in drawn.items()}
    for name in names:
        if not kept[name]:
            raise UserError(f"--window {options.window} is too short: no drawn utterance of {name} is so short")
        if left := len(drawn[name]) - len(kept[name]):
            print(f"{name}: left out {left:,} utterances that are longer than --window {options.window} s")
    return [kept[name] for name in names]


def in_batches(number: int, at_once: int) -> list[np.ndarray]:
    """The rows 0 to `number`, so many at once."""
    return np.array_split(np.arange(number), max(1, math.ceil(number / at_once)))


def _tokenizers(options: VoiceOptions, tokenizer: Tokenizer) -> Tokenizers:
    return Tokenizers(None, tokenizer, max_question_tokens=0, max_answer_tokens=MOST * options.window)
