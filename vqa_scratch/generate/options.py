"""What to ask of a decoder: one dataclass, checked as a whole, so that an option without effect is an error."""

from dataclasses import dataclass

from vqa_scratch.errors import UserError


def _refuse(wrong: bool, line: str) -> None:
    if wrong:
        raise UserError(line)


@dataclass(frozen=True)
class GenerationOptions:
    """Greedy decoding unless `do_sample` or `num_beams` say otherwise.

    None means "not asked for". Raises UserError, one line, on values out of range and on options that contradict each
    other. Names and meanings are those of `transformers.GenerationConfig`.
    """

    max_new_tokens: int
    eos_id: int | None = None  # None: nothing ends a row but the limit
    min_new_tokens: int = 0  # the end token is barred before so many tokens
    do_sample: bool = False
    temperature: float | None = None  # divides the scores; sampling only
    top_k: int | None = None  # sample from the k most likely tokens
    top_p: float | None = None  # sample from the fewest tokens that have this much probability together
    seed: int | None = None  # of the sampling; None: torch's global generator
    num_beams: int = 1
    length_penalty: float | None = None  # score of a beam: sum of log-probabilities / length**penalty; None: 1
    early_stopping: bool | str | None = None  # True: stop at num_beams finished; "never": while any may still win
    no_repeat_ngram_size: int = 0  # no n-gram twice, prompt included; 0 allows all
    repetition_penalty: float = 1.0  # Keskar et al. 2019 (1909.05858), section 4.1; prompt included

    def __post_init__(self) -> None:
        _refuse(self.max_new_tokens < 1, f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        _refuse(self.min_new_tokens < 0, f"min_new_tokens must not be negative, not {self.min_new_tokens}")
        _refuse(
            self.min_new_tokens > self.max_new_tokens,
            f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}",
        )
        _refuse(self.min_new_tokens > 0 and self.eos_id is None, "min_new_tokens bars the end token; give eos_id")
        _refuse(self.num_beams < 1, f"num_beams must be at least 1, not {self.num_beams}")
        _refuse(self.do_sample and self.num_beams > 1, "beams and sampling exclude each other; choose one")
        for name in ("temperature", "top_k", "top_p", "seed"):
            given = getattr(self, name) is not None
            _refuse(given and not self.do_sample, f"{name} has an effect on sampling only; sample, or leave it out")
        for name in ("length_penalty", "early_stopping"):
            given = getattr(self, name) is not None
            _refuse(given and self.num_beams == 1, f"{name} has an effect on beams only; give num_beams above 1")
        warmth, share, penalty = self.temperature, self.top_p, self.repetition_penalty
        _refuse(
            warmth is not None and not 0 < warmth < float("inf"),
            f"temperature must be above 0, not {warmth}; greedy decoding is what sampling tends to at 0",
        )
        _refuse(self.top_k is not None and self.top_k < 1, f"top_k must be at least 1, not {self.top_k}")
        _refuse(share is not None and not 0 < share <= 1, f"top_p must be above 0 and at most 1, not {share}")
        _refuse(
            not 0 < penalty < float("inf"), f"repetition_penalty must be above 0, not {penalty}; 1 penalises nothing"
        )
        _refuse(
            self.no_repeat_ngram_size < 0, f"no_repeat_ngram_size must not be negative, not {self.no_repeat_ngram_size}"
        )
        _refuse(
            self.early_stopping not in (None, True, False, "never"),
            f"early_stopping must be true, false or 'never', not {self.early_stopping!r}",
        )

    def check_vocabulary(self, size: int) -> None:
        """Raises UserError where what is chosen from, or the end token, does not fit a vocabulary of `size` tokens.

        (Beams are checked before their cache is made, in `start.begin`.)
        """
        _refuse((self.top_k or 0) > size, f"top_k {self.top_k}, but the vocabulary has {size} tokens")
        _refuse(
            self.eos_id is not None and self.eos_id >= size,
            f"the end token is {self.eos_id}, but the vocabulary has {size} tokens",
        )
