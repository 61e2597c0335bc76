"""Which of several ways to compute the same is fastest here and now, by timing them in turn."""

import math
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

W = TypeVar("W")
TURNS = 3  # of each way, at most
HOPELESS = 1.5  # a way that took so many times as long as the best is not timed again
BRIEF = 0.25  # seconds: but then it is, since it costs little, and once it may have been held up
CLEARLY = 1.1  # so many times as fast is faster; less may be chance


def timed(work: Callable[..., object], *args: object) -> float:
    """The seconds of `work(*args)`."""
    began = time.perf_counter()
    work(*args)
    return time.perf_counter() - began


def fastest(ways: Sequence[W], seconds_of: Callable[[W], float]) -> tuple[W, dict[W, float]]:
    """(the first of the ways that none is clearly faster than, the least seconds that each took).

    They take turns, so that a neighbour who comes or goes meets all of them; with one way nothing is timed.
    """
    seconds = dict.fromkeys(ways, math.inf)
    for turn in range(TURNS if len(ways) > 1 else 0):
        for way in ways:
            if turn == 0 or seconds[way] <= max(BRIEF, HOPELESS * min(seconds.values())):
                seconds[way] = min(seconds[way], seconds_of(way))
    least = min(seconds.values())
    return next(way for way in ways if seconds[way] <= CLEARLY * least), seconds
