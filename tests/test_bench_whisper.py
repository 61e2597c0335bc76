"""The benchmark of Whisper: what it says of the features of both sides. The rest needs real weights and clips
(tests/test_whisper_released.py)."""

import pytest
import torch

from bench.whisper import EQUAL, mel_line
from vqa_scratch.errors import UserError


def sides(apart: float, seconds: dict[str, float]):
    """Both sides' answers by their names; the peer's features are so far from ours."""
    ours = torch.linspace(-1, 1.5, 240).view(80, 3)
    found = {"ours": [ours, ours], "peer": [ours, ours + apart]}
    return {
        side: lambda name, *work, side=side: (None, seconds[side] if work == ("log_mels",) else found[side])
        for side in ("ours", "peer")
    }


def test_features_are_held_to_each_other_and_timed():
    line = mel_line(sides(EQUAL / 2, {"ours": 0.02, "peer": 0.09}), rounds=3)
    assert "20 ms" in line and "90 ms" in line and "**4.5x** (goal 1x)" in line and "5e-05" in line


def test_features_that_differ_are_not_timed():
    with pytest.raises(UserError, match=r"log-mels of both sides are 2\.0e-04 apart"):
        mel_line(sides(2 * EQUAL, {}), rounds=1)
