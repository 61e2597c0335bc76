"""The arithmetic of docs/scale.md."""

import pytest

from bench import scale
from vqa_scratch.models.t5 import T5


def test_sizes_of_released_models():
    """flan-t5-small has 76,961,152 parameters, flan-t5-base 247,577,856; AdamW keeps two numbers for each."""
    for name, count in (("small", 76_961_152), ("base", 247_577_856)):
        size = scale.Size.of(scale.on_meta(lambda name=name: T5(scale.T5_SIZES[name])), "adamw")
        assert size.parameters == count and size.whole == 16 * count


def test_bytes_sent_by_a_ring():
    """On two ranks each sends its half twice under DDP; FSDP sends three halves."""
    size = scale.Size(1000, 2000)
    assert size.ddp(2) == 4000 and size.fsdp(2) == 6000 and size.ddp(1) == 0
    assert size.ddp(10**9) == pytest.approx(8000)


def test_a_rank_of_ppo_in_parts():
    """1000 parameters on 4 ranks. Update: 4 kB of weights, gradients, two moments and reference each, in 4; rollout:
    2 x 4 kB whole, and a quarter of weights, moments and reference."""
    assert scale.ppo_in_parts(scale.Size(1000, 2000), 7, 4) == (7 + 5000, 7 + 8000 + 4000)
    assert scale.ppo_in_parts(scale.Size(1000, 2000), 0, 10**12) == pytest.approx((0, 8000), abs=1e-3)


def test_amounts_in_words():
    assert [scale.amount(x) for x in (12, 1_234_567, 2.5e9)] == ["12 B", "1.23 MB", "2.5 GB"]
    assert scale.amount(77e6, "") == "77 M" and scale.milliseconds(0.0071) == "7.1 ms"


def test_the_page_holds_what_the_command_gives():
    assert scale.ppo() in scale.PAGE.read_text(encoding="utf-8")
