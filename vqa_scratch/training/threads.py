"""The number format and the number of threads of a run: what is faster on this machine, beside what else runs on it.

The threads of a product wait for each other. On two cores beside one busy process a step of two threads took ten times
as long as alone, one of a single thread hardly longer. So a run on a CPU chooses by timing parts of its own steps, and
looks again when its pace changes. The format stays: numbers depend on it. They depend on the number of threads too, in
the order of sums; one that is given, by --threads or OMP_NUM_THREADS, is kept.
"""

import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm

from vqa_scratch.fastest import CLEARLY, fastest, timed
from vqa_scratch.training.precision import Precision
from vqa_scratch.training.ranks import World

LOOK = 2.0  # seconds, at least, from one step that is looked at to the next
LOOKS = 3  # whose median is the pace
FALLEN = 1.4  # so many times as long as before is a pace that has fallen
SHARE = 0.05  # of the time: what is lost by steps that only try whether more threads are faster now
PATIENCE = 10.0  # seconds before more threads are tried again, at least


def thread_counts(asked: int | None, device: torch.device, fixed: bool) -> list[int]:
    """The numbers of threads to choose from, the largest first: torch's own, and powers of two below it.

    Only one if it is `asked` for, or by OMP_NUM_THREADS, if a GPU computes, or if it is `fixed` by something else.
    """
    most = asked or torch.get_num_threads()
    if asked or "OMP_NUM_THREADS" in os.environ or device.type != "cpu" or fixed:
        return [most]
    return [most, *(2**n for n in range(most.bit_length() - 1, -1, -1) if 2**n < most)]


def keep_up(threads: int) -> bool:
    """Whether so many threads make a hundred small products in the time of one; by neighbours they are held up at each.

    This takes a tenth of a second where a step of theirs may take minutes.
    """
    x = torch.ones(256, 256)

    def products(seconds: float) -> int:
        began, made = time.perf_counter(), 0
        while made < 100 and time.perf_counter() - began < seconds:
            torch.mm(x, x)
            made += 1
        return made

    now = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = timed(products, math.inf)
    torch.set_num_threads(threads)
    made = products(seconds)
    torch.set_num_threads(now)
    return made == 100


class Threads:
    """The number of threads of a run, changed between its steps: `look` at one that ends when it is `due`, or later.

    When the pace falls, a step is tried with each smaller number until one is faster; every now and then, one with the
    next larger, if its threads `keep_up`. What is clearly faster is kept, and the next one in the same direction tried.
    Tries upward come so rarely that they lose a `SHARE` of the time at most. `say` gets a line on every change.
    """

    def __init__(
        self,
        counts: Sequence[int],
        unit: str,
        say: Callable[[str], None] = tqdm.write,
        use: Callable[[int], None] = torch.set_num_threads,
        keep_up: Callable[[int], bool] = keep_up,
    ) -> None:
        self.counts, self.unit, self.say, self.use, self.keep_up = sorted(counts), unit, say, use, keep_up
        self.at = len(counts) - 1
        self.due = 0.0  # by `time.perf_counter`; a try is judged by the next step
        self.recent: deque[float] = deque(maxlen=LOOKS)  # seconds a sample
        self.usual = math.inf
        self.rest = PATIENCE  # seconds until more threads are tried
        self.way = 0  # -1 or 1 while a smaller or larger number is tried
        self.stays = self.at  # where it goes back to then

    def take(self, at: int) -> None:
        """Compute with the number at this place."""
        self.at, self.due = at, 0.0
        self.use(self.counts[at])

    def look(self, samples: int, began: float, ended: float) -> None:
        """A step of so many samples began and ended then."""
        self.due = ended + LOOK if len(self.counts) > 1 else math.inf
        if len(self.counts) == 1 or not samples:
            return
        took = (ended - began) / samples
        if self.way:
            self._judge(took, samples)
            return
        self.recent.append(took)
        self.rest -= max(LOOK, ended - began)
        if len(self.recent) < LOOKS:
            return
        pace = statistics.median(self.recent)
        self.usual = min(self.usual, pace)
        if pace > FALLEN * self.usual and self.at > 0:
            self._try(-1)
        elif self.rest <= 0 and self.at + 1 < len(self.counts):
            self.rest = PATIENCE
            if self.keep_up(self.counts[self.at + 1]):
                self._try(1)

    def _try(self, way: int) -> None:
        self.way, self.stays = way, self.at
        self.take(self.at + way)

    def _judge(self, took: float, samples: int) -> None:
        """Keep the number that was tried and try the next one; or go on with a still smaller one, or go back."""
        before, way = statistics.median(self.recent), self.way
        if took * CLEARLY <= before:
            old, new = self.counts[self.stays], self.counts[self.at]
            self.say(f"{named(new)} instead of {old}: {1 / took:.0f} {self.unit}/s instead of {1 / before:.0f}")
            self.way, self.usual = 0, took
            self.recent.clear()
            self.recent.append(took)
            self.rest = PATIENCE
            if 0 <= self.at + way < len(self.counts):
                self._try(way)
        elif way < 0 < self.at:
            self.take(self.at - 1)
        else:
            self.take(self.stays)
            self.way, self.usual = 0, before
            self.recent.clear()
            if way > 0:
                self.rest = max(PATIENCE, samples * (took - before) / SHARE)


def named(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


class Way(NamedTuple):
    """How a run computes."""

    kind: str  # the number format
    threads: int

    def __str__(self) -> str:
        return f"{self.kind} on {named(self.threads)}"


Work = Callable[[Precision], None]  # a part of a step in a number format, which changes nothing


def choose_way(
    kinds: Sequence[str], threads: Threads, device: torch.device, trial: Callable[[], Work], world: World
) -> tuple[Precision, str]:
    """(the format that is fastest, a line that says why); sets the number of threads.

    `trial` prepares what is timed. The first of `kinds`, and the largest number of threads, are left only for what is
    clearly faster. The main rank's measurement decides on the format.
    """
    counts = [count for count in reversed(threads.counts) if count == threads.counts[0] or threads.keep_up(count)]
    ways = [Way(kind, count) for count in counts for kind in kinds]
    work = trial() if len(ways) > 1 else None

    def seconds_of(way: Way) -> float:
        assert work is not None, "there is a choice"
        threads.use(way.threads)
        return timed(work, Precision(way.kind, device))

    for kind in kinds if work else ():  # the first time takes longer
        seconds_of(Way(kind, threads.counts[0]))
    best, seconds = fastest(ways, seconds_of)
    best = best._replace(kind=world.of_main(best.kind))
    threads.take(threads.counts.index(best.threads))
    others = ", ".join(f"{way} {took:.2f}" for way, took in seconds.items() if way != best)
    why = f": a part of a step takes {seconds[best]:.2f} s, {others}" if others else ""
    return Precision(best.kind, device), f"precision {best}{why}"
