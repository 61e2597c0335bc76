"""The end of a run: its final figures within the time, whether they beat a blind guess, and what to do next.

How long the figures will take is measured, and a pass over a split stops where its time ends.
"""

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from vqa_scratch.data.vqa_v2 import VQASample

MARGIN = 1.1  # the machine may be busier at the end than when it was measured; passes end in time in any case


class Pass(NamedTuple):
    """Answers to the questions, or captions of the images, of one split."""

    label: str  # of its bar, and its name in summary.json; "" for one that is no part of the final figures
    split: str
    samples: int
    ranked: bool = False

    @property
    def kind(self) -> tuple[str, bool]:
        """Passes of one kind take equally long a sample: captions and questions differ, and so does ranking."""
        return self.split.partition(" ")[2], self.ranked


@dataclass
class Pace:
    """How fast a system answers, and the time that is left for its final figures."""

    ends: float | None = None  # when they must be done, by `time.perf_counter`; None: they take the time they need
    seconds: dict[tuple[str, bool], float] = field(default_factory=dict)  # a sample, by kind of pass
    left: list[Pass] = field(default_factory=list)  # final passes to come
    done: dict[str, tuple[int, int]] = field(default_factory=dict)  # by label: samples answered, of how many

    def needed(self, passes: Sequence[Pass]) -> float:
        """Seconds that these passes will take; one of an unknown kind counts nothing."""
        return MARGIN * sum(one.samples * self.seconds.get(one.kind, 0.0) for one in passes)

    def begin(self, label: str) -> float | None:
        """When the final pass `label` must stop so that those after it have their share of the time; None: never."""
        later = [one for one in self.left if one.label != label]
        now, all_of_them = time.perf_counter(), self.needed(self.left)
        mine = 1 - self.needed(later) / all_of_them if all_of_them else 1 / max(1, len(self.left))
        self.left = later
        return None if self.ends is None else now + mine * (self.ends - now)

    def fitting(self, one: Pass, until: float | None, most: int) -> int:
        """How many samples to answer at once, at `most`, so that a batch is done `until` then."""
        seconds = self.seconds.get(one.kind)
        if until is None or not seconds:
            return most
        return max(1, min(most, int((until - time.perf_counter()) / (MARGIN * seconds))))

    def end(self, one: Pass, began: float, answered: int) -> None:
        """Note how long a pass took that began at `began`, and how many samples it answered."""
        self.seconds[one.kind] = (time.perf_counter() - began) / max(1, answered)
        if one.label:
            self.done[one.label] = (answered, one.samples)

    @property
    def cut(self) -> dict[str, str]:
        """The final passes that the time cut short: "1024 of 10000" by label."""
        return {label: f"{some} of {all_}" for label, (some, all_) in self.done.items() if some < all_}


def cut_short(summary: dict) -> list[str]:
    """A line on the final passes that had no time for all samples, if there are any."""
    cut = ", ".join(f"{label} {share}" for label, share in summary["cut_short"].items())
    return [f"no time for all:     {cut}; more --minutes, or fewer --test-images, score them all"] if cut else []


def against_blind(what: str, share: float, baselines: Mapping[str, float], samples: int) -> list[str]:
    """A line on a share of right answers that is not above every blind baseline by two standard errors; else none.

    Both shares are of the same samples, and both errors count; each is taken with one more right and one more wrong
    (Agresti and Caffo 2000), for of a few samples all may be right, or none, by chance.
    """
    name, best = max(baselines.items(), key=lambda item: item[1])
    seeing, blind = ((x * samples + 1) / (samples + 2) for x in (share, best))
    error = 2 * math.sqrt((seeing * (1 - seeing) + blind * (1 - blind)) / (samples + 2))
    if seeing - blind > error:
        return []
    found = f"{what} {share:.3f}, without seeing the image {best:.3f} ({name.replace('_', ' ')})"
    if share > best:
        return [f"too few to say whether better than blind: {found}; of {samples} scored, chance makes {error:.3f}"]
    why = "either it saw too few questions or minutes, or the answers do not need the image, as samples.html may show"
    return [f"no better than blind: {found}; {why}"]


def what_next(folder: Path, sample: VQASample) -> list[str]:
    """The commands, ready for a shell, that ask a finished run about a sample and look inside while it answers."""
    about = ["--image", str(sample.image_path), *(["--question", sample.question] if sample.question else [])]
    return [
        "next:",
        *(
            "  " + shlex.join(["python", "-m", "vqa_scratch", name, str(folder), *about, *more])
            for name, more in {"ask": [], "study": ["--out", str(folder / "study")]}.items()
        ),
    ]
