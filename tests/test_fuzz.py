"""No mutated input of any entry point ends in a traceback, a hang, or more than one line of 300 characters."""

import fuzz
import pytest


@pytest.mark.parametrize("inputs", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_input_is_a_fault(inputs, tmp_path):
    tried, faults = fuzz.run(inputs, root=tmp_path)
    assert tried.total() == inputs
    assert not faults, "\n" + fuzz.table(tried, faults)
