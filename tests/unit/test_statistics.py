"""Are the intervals and the batches what statistics says they are?"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from simkvm.study.statistics import batch_means, confidence_interval, t_quantile

CONFIDENCES = (0.5, 0.8, 0.9, 0.95, 0.99, 0.9999)
DEGREES = (1, 2, 3, 4, 5, 9, 10, 29, 100, 1001)


@pytest.mark.parametrize("degrees", DEGREES)
@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_t_quantile_is_scipys(confidence: float, degrees: int) -> None:
    expected = stats.t.ppf((1 + confidence) / 2, degrees)
    assert t_quantile(confidence, degrees) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("confidence", "degrees"), [(0, 5), (1, 5), (-1, 5), (0.9, 0)])
def test_t_quantile_refuses_what_has_none(confidence: float, degrees: int) -> None:
    with pytest.raises(ValueError, match="no t for a confidence"):
        t_quantile(confidence, degrees)


numbers = st.floats(-1e6, 1e6)


@given(st.lists(numbers, min_size=2, max_size=40), st.sampled_from(CONFIDENCES))
def test_interval_is_scipys(values: list[float], confidence: float) -> None:
    interval = confidence_interval(values, confidence)
    half_width = stats.sem(values) * stats.t.ppf((1 + confidence) / 2, len(values) - 1)
    assert interval.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert interval.half_width == pytest.approx(half_width, rel=1e-6, abs=1e-9)


def test_interval_covers_as_often_as_it_says() -> None:
    """2,000 samples of 6 at 90 %: the number of hits is binomial; 4 standard deviations allowed."""
    rng = np.random.default_rng(7)
    tries, confidence = 2000, 0.9
    hits = sum(
        3.0 in confidence_interval(list(rng.normal(3, 2, 6)), confidence) for _ in range(tries)
    )
    slack = 4 * math.sqrt(tries * confidence * (1 - confidence))
    assert abs(hits - tries * confidence) < slack


def test_one_value_has_no_finite_interval() -> None:
    assert confidence_interval([4.0]).half_width == math.inf


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [1.0, math.inf]])
def test_interval_refuses_gaps(values: list[float]) -> None:
    with pytest.raises(ValueError, match="no values, or one that"):
        confidence_interval(values)


def test_batch_means_leave_out_the_oldest() -> None:
    values = [99.0, 1.0, 3.0, 2.0, 6.0, 5.0, 7.0]
    assert batch_means(values, batches=3) == confidence_interval([2.0, 4.0, 6.0])


@pytest.mark.parametrize(("length", "batches"), [(3, 4), (10, 1), (10, 0), (0, 2)])
def test_batch_means_refuse_too_few(length: int, batches: int) -> None:
    with pytest.raises(ValueError, match="do not make"):
        batch_means([1.0] * length, batches)


def test_batch_means_cover_a_correlated_series() -> None:
    """AR(1) with coefficient 0.9: the interval of single values covers far too seldom."""
    rng = np.random.default_rng(11)
    by_batches = by_values = 0
    for _ in range(100):
        noise = rng.normal(0, 1, 4000)
        series = np.empty_like(noise)
        series[0] = noise[0] / math.sqrt(1 - 0.81)
        for i in range(1, len(noise)):
            series[i] = 0.9 * series[i - 1] + noise[i]
        by_batches += 0.0 in batch_means(list(series), 20, 0.9)
        by_values += 0.0 in confidence_interval(list(series), 0.9)
    assert by_batches > 90 - 4 * 3
    assert by_values < 60
