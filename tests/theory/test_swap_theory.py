"""Formulas of several channels against one another, and the quantile that has no formula.

Closed forms themselves are rows of ``simkvm validate theory``.
"""

from __future__ import annotations

import numpy as np
import pytest

from simkvm.validate import queueing
from simkvm.validate.closed_form import CONFIDENCE
from simkvm.validate.theory_swap import _quantile


@pytest.mark.parametrize("load", [0.1, 0.5, 0.8, 0.95])
def test_one_channel_of_crommelins_is_pollaczek_and_khinchines(load: float) -> None:
    expected = queueing.mean_wait(load, 90_000, 0)
    assert queueing.mean_wait_m_d_c(load, 90_000, 1) == pytest.approx(expected)


def test_more_channels_wait_less() -> None:
    waits = [queueing.mean_wait_m_d_c(0.8, 1, channels) for channels in (1, 2, 4, 16)]
    assert waits == sorted(waits, reverse=True)
    assert waits[1] == pytest.approx(0.9056, abs=0.01)  # four million customers, simulated


@pytest.mark.parametrize("customers", [1, 3, 8])
def test_channels_for_some_or_for_all(customers: int) -> None:
    """One channel is mean value analysis; a channel for each is nobody waiting."""
    one = queueing.closed_network(customers, 60.0, 10.0)[0]
    assert queueing.channels_repair(customers, 60.0, 10.0, 1) == pytest.approx(one)
    all_of_them = queueing.channels_repair(customers, 60.0, 10.0, customers)
    assert all_of_them == pytest.approx(customers / 70.0)


def test_the_interval_of_a_quantile_holds_it_as_often_as_it_says() -> None:
    """Of 400 samples with intervals of 99.95 % at most a few may miss; half of them, and no test
    of the interval would have said a thing."""
    rng, number, share = np.random.default_rng(1), 20_000, 0.02
    missed = 0
    for _ in range(400):
        longest = np.sort(rng.exponential(1.0, number))[::-1][:1000]
        found = _quantile(longest, number, share)
        assert found.low < found.value < found.high
        missed += not found.low <= -np.log(share) <= found.high
    assert missed <= 400 * (1 - CONFIDENCE) + 3
    assert found.high - found.low < 0.5
