"""The options of text generation: one dataclass, checked as a whole, so that an option without effect is an error.

It is not in `generate/`, whose modules import torch: `ask --help` shows these options without it.
"""

from dataclasses import MISSING, dataclass

from vqa_scratch.errors import UserError
from vqa_scratch.options import check, option

DECODING, SAMPLING, BEAMS = "Decoding", "Sampling", "Beams"


def _refuse(wrong: bool, line: str) -> None:
    if wrong:
        raise UserError(line)


def end_ids(eos_id: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """The end tokens, each of which ends a text: of one id, of several, or none."""
    return eos_id if isinstance(eos_id, tuple) else () if eos_id is None else (eos_id,)


@dataclass(frozen=True)
class GenerationOptions:
    """Greedy decoding unless `do_sample` or `num_beams` say otherwise.

    None means "not given". `eos_id` is the end token, or a tuple of several, each of which ends a row; with None only
    the limit does. Raises UserError, one line, on values out of range and on contradicting options. Names and meanings
    are those of `transformers.GenerationConfig`.
    """

    max_new_tokens: int = option(MISSING, "Tokens at most; without it, as many as in training.", DECODING, minimum=1)
    eos_id: int | tuple[int, ...] | None = None  # no flag: the model knows it
    min_new_tokens: int = option(0, "The end token is barred before this many tokens.", DECODING, minimum=0)
    do_sample: bool = option(False, "Draw tokens at random instead of the likeliest.", SAMPLING)
    temperature: float | None = option(
        None, "Divides the scores: below 1 the likely becomes likelier.", SAMPLING, above=0
    )
    top_k: int | None = option(None, "Draw from this many of the likeliest tokens.", SAMPLING, minimum=1)
    top_p: float | None = option(
        None, "Draw from the fewest tokens that have this much probability together.", SAMPLING, above=0, maximum=1
    )
    seed: int | None = option(None, "Seed of the sampling.", SAMPLING)
    num_beams: int = option(1, "Follow this many beginnings at once and take the best answer.", BEAMS, minimum=1)
    # score of a beam: sum of log-probabilities / length**penalty
    length_penalty: float | None = option(
        None, "Above 1 favours long answers, below 1 short ones; 1 without it.", BEAMS
    )
    # True: stop at num_beams finished; "never" (no flag): go on while any may still win
    early_stopping: bool | str | None = option(None, "Stop as soon as there are as many answers as beams.", BEAMS)
    no_repeat_ngram_size: int = option(
        0, "Bar the repetition of n-grams of this length, prompt included; 0 allows it.", DECODING, minimum=0
    )
    # Keskar et al. 2019 (1909.05858), section 4.1
    repetition_penalty: float = option(
        1.0, "Above 1 makes the tokens of prompt and answer less likely to come again.", DECODING, above=0
    )
    # Without a flag, since the model knows them: ids that never come, and ids that do not come first; and of a Whisper,
    # if times may come, the id before that of the first time, and how late the first one may be (in times, from 0).
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    no_timestamps_token_id: int | None = None
    max_initial_timestamp_index: int | None = None

    def __post_init__(self) -> None:
        check(self, shown=str)
        _refuse(
            self.min_new_tokens > self.max_new_tokens,
            f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}",
        )
        whole = all(isinstance(one, int) for one in end_ids(self.eos_id))
        _refuse(not whole, f"eos_id must be one id or a tuple of ids, not {self.eos_id!r}")
        _refuse(self.min_new_tokens > 0 and not end_ids(self.eos_id), "min_new_tokens bars the end token; give eos_id")
        _refuse(self.do_sample and self.num_beams > 1, "beams and sampling exclude each other; choose one")
        for name in ("temperature", "top_k", "top_p", "seed"):
            given = getattr(self, name) is not None
            _refuse(given and not self.do_sample, f"{name} has an effect on sampling only; sample, or leave it out")
        for name in ("length_penalty", "early_stopping"):
            given = getattr(self, name) is not None
            _refuse(given and self.num_beams == 1, f"{name} has an effect on beams only; give num_beams above 1")
        times = self.no_timestamps_token_id is not None
        _refuse(times and not end_ids(self.eos_id), "the rules of timestamps need an end token; give eos_id")
        late = self.max_initial_timestamp_index is not None
        _refuse(late and not times, "max_initial_timestamp_index is about timestamps; give no_timestamps_token_id")
        _refuse(
            self.early_stopping not in (None, True, False, "never"),
            f"early_stopping must be true, false or 'never', not {self.early_stopping!r}",
        )

    def check_vocabulary(self, size: int) -> None:
        """Raises UserError if `top_k`, the end token or a barred one does not fit a vocabulary of `size` tokens.

        (Beams are checked before their cache is made, in `start.begin`.)
        """
        _refuse((self.top_k or 0) > size, f"top_k {self.top_k}, but the vocabulary has {size} tokens")
        for kind, ids in (
            ("the end token", end_ids(self.eos_id)),
            ("a barred token", self.suppress_tokens),
            ("a barred token", self.begin_suppress_tokens),
            ("the token before all times", end_ids(self.no_timestamps_token_id)),
        ):
            for one in ids:
                _refuse(one >= size, f"{kind} is {one}, but the vocabulary has {size} tokens")
