"""How far off a voice run is about when each word was said: of drawn voices that is known."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vqa_scratch.data.spoken import CLEAN, Utterance, Utterances
from vqa_scratch.kernels import ctc_align
from vqa_scratch.transcription.transcriber import heads_that_follow
from vqa_scratch.transcription.words import spans_of, word_times

TIMED = 32  # utterances


def _errors(utterance: Utterance, spans: Sequence[tuple[float, float]]) -> list[float]:
    """ms between the middle of each word and that of when it was said."""
    known = [(begins + ends) / 2 for _, begins, ends in utterance.words]
    return [1000 * abs(sum(span) / 2 - middle) for span, middle in zip(spans, known, strict=True)]


def time_errors(system: Any, spoken: Utterances) -> dict[str, float] | None:
    """The median error in ms of the middle of a word, on clean utterances whose words have times; None without any.

    By CTC's alignment of the true letters, as `transcribe` does, and by the decoder's cross-attention while it writes
    the true text, as a Whisper without CTC does: all heads of the later layers together, and each alone.
    """
    rows = [row for row, one in enumerate(spoken.samples) if one.words and one.kind == CLEAN][:TIMED]
    if not rows:
        return None
    whisper, words = system.model.whisper, system.vocabulary
    batch = spoken.batch(np.array(rows)).to(system.precision.device)
    states = whisper.encode(batch.features)
    paths = ctc_align(system.model.ctc(states), batch.letters, batch.states).tolist()
    together = heads_that_follow({}, whisper.config, "the run")
    sets = {"attention": together} | {f"head {layer}.{head}": [(layer, head)] for layer, head in together}
    found: dict[str, list[float]] = {name: [] for name in ("ctc", *sets)}
    for place, row in enumerate(rows):
        one = spoken.samples[row]
        letters = batch.letters[place][batch.letters[place] >= 0].tolist()
        found["ctc"] += _errors(one, spans_of(letters, paths[place]))
        ids = words.encode(f" {one.text}")
        for name, heads in sets.items():
            timed = word_times(whisper, words, states[place][None], None, "transcribe", ids, heads, len(one.mel))
            found[name] += _errors(one, [(word.start, word.end) for word, _ in timed])
    return {name: float(np.median(off)) for name, off in found.items()}
