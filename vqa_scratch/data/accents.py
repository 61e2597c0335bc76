"""Accents of drawn voices: what people say differently though they say the same words.

A drawn voice without one differs from the next in pitch, tract, speed and breath only, so who learns from such voices
knows each sound by its one place among the formants and its one length. An accent moves both sound by sound, swaps some
pronunciations, and draws the melody, the loudness of each sound, and what a microphone does to all of them anew.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

# Other ways to say a word, in the notation of CMUdict: without R after a vowel, another vowel, an end left out.
SAID = {
    "what": ("W AO1 T", "W AX T", "W AH1"), "color": ("K AH1 L AX", "K AO1 L ER"), "the": ("DH IY", "DH AH"),
    "where": ("W EH1", "W EY1", "W AE1 R"), "there": ("DH EH", "DH EY R"), "a": ("EY1", "AH"),
    "many": ("M EH1 N IH", "M IH1 N IY"), "are": ("AA", "ER", "AX R"), "more": ("M AO1", "M OW1 R"),
    "than": ("DH AX N", "DH EH N"), "closest": ("K L OW1 S IH S T", "K L AO1 S AX S", "K L AX W S IH S T"),
    "to": ("T AX", "T UH"), "left": ("L AE1 F T", "L EH1 F"), "right": ("R AA1 T", "R EY1 T", "R AY1"),
    "of": ("AH V", "AO V", "AA V"), "above": ("AX B AO1 V",), "below": ("B AX L OW1", "B IY L AO1"),
    "small": ("S M AA1 L", "S M OW1 L"), "large": ("L AA1 D ZH", "L AE1 R D ZH"), "red": ("R AE1 D", "R EY1 D"),
    "green": ("G R IH1 N",), "blue": ("B L UH1",), "yellow": ("Y EH1 L AX", "Y AE1 L OW"),
    "purple": ("P AX1 P AX L", "P ER1 P L", "P EH1 R P AX L"), "gray": ("G R EH1", "G R AY1"),
    "circle": ("S AX1 K AX L", "S ER1 K L", "S EH1 R K AX L"), "square": ("S K W EH1", "S K W AE1 R", "S K W EY1 AX"),
    "triangle": ("T R AY1 AE NG G L", "T R AA1 Y AE NG G AX L"), "shape": ("SH EH1 P", "SH AY1 P"),
    "object": ("AA1 B D ZH IH K T", "AO1 B D ZH EH K", "AO1 B ZH EH K T"), "how": ("HH AE1 W", "HH AO1 W"),
    "is": ("IY Z", "IH S"),
}  # fmt: skip


@dataclass(frozen=True)
class Accent:
    """Factors of what a voice does, by sound; what is not in them is as without an accent."""

    words: Mapping[str, str] = field(default_factory=dict)  # how a word is said
    formants: Mapping[str, np.ndarray] = field(default_factory=dict)  # (3,)
    lengths: Mapping[str, float] = field(default_factory=dict)
    levels: Mapping[str, float] = field(default_factory=dict)  # of its voice and its noise
    noise: tuple[float, float] = (1.0, 1.0)  # centre and width
    bands: float = 1.0  # factor of the width of all resonances
    lead: float = 1.0  # factor of the silence before the first word
    melody: tuple[float, float] = (1.12, 0.82)  # pitch in the beginning and at the end
    colour: tuple[float, ...] = ()  # strength of each wave that the spectrum is bent by, as logarithm

    @classmethod
    def draw(cls, rng: np.random.Generator, sounds: Sequence[str]) -> Self:
        """One of any strength: none at all, or formants that differ by a tenth and lengths by a third."""
        strength = rng.random()

        def factors(spread: float, *shape: int) -> dict[str, np.ndarray]:
            return {name: np.exp(strength * spread * rng.standard_normal(shape)) for name in sounds}

        pace = np.exp(strength * rng.uniform(-0.35, 0.15))
        every = {word: rng.choice(ways) for word, ways in SAID.items() if rng.random() < 0.5 * strength}
        start, fall = np.array([1.12, 0.3]) + strength * rng.uniform((-0.15, -0.5), (0.15, 0.2))
        return cls(
            words={**every, **{f"{word}s": f"{said} Z" for word, said in every.items()}},
            formants=factors(0.1, 3),
            lengths={name: float(pace * value) for name, value in factors(0.3).items()},
            levels={name: float(value) for name, value in factors(0.3).items()},
            noise=tuple(np.exp(strength * rng.normal(0, (0.15, 0.3)))),
            bands=float(np.exp(strength * rng.normal(0, 0.35))),
            lead=1 - strength * rng.random(),
            melody=(start, start - fall),
            colour=tuple(strength * rng.normal(0, 0.4, 4)),
        )
