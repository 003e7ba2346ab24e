"""Hosts that run out of memory: no page, slot or write is lost, and every run comes to its end."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from worlds import run

from invariants.pressed import pressed, run_watched


@settings(max_examples=20, phases=[Phase.generate])
@given(st.integers(0, 2**32))
def test_pages_slots_and_contents_are_conserved(number: int) -> None:
    run_watched(pressed(Random(number)))


@pytest.mark.parametrize("number", [0, 5, 7, 9, 10])
def test_worlds_that_showed_mistakes(number: int) -> None:
    """Put back one by one, mistakes in faults and in eviction show in one of these."""
    run_watched(pressed(Random(number)))


@settings(max_examples=4, phases=[Phase.generate])
@given(st.integers(0, 2**32))
def test_a_second_run_is_the_same(number: int) -> None:
    spec = pressed(Random(number))
    assert run(spec).fingerprint == run(spec).fingerprint
