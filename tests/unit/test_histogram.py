"""The log-linear histogram: exact counts, sums and largest; quantiles within a bucket."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from simkvm.observe.histogram import SUB_BITS, Histogram, bucket_of, low_of

EDGES = [0, 1, 31, 32, 63, 64, 65, 66, 127, 128, 1000, 4095, 4096, 2**31, 2**40 - 1, 2**40, 2**52]


def values(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


def filled(*numbers: int) -> Histogram:
    made = Histogram()
    made.add(values(*numbers))
    return made


@pytest.mark.parametrize("value", EDGES)
def test_a_value_lies_in_its_bucket(value: int) -> None:
    bucket = bucket_of(values(value))
    low, high = int(low_of(bucket)[0]), int(low_of(bucket + 1)[0])
    assert low <= value < high
    assert high - low <= max(1, value / 2**SUB_BITS), "a 32nd of the value at most"


def test_small_values_have_buckets_of_their_own() -> None:
    assert bucket_of(np.arange(64)).tolist() == list(range(64))


def test_buckets_follow_one_another_without_gap_or_overlap() -> None:
    lows = low_of(np.arange(1500))
    assert (np.diff(lows) > 0).all()
    np.testing.assert_array_equal(bucket_of(lows), np.arange(1500))
    np.testing.assert_array_equal(bucket_of(lows[1:] - 1), np.arange(1499))


def test_number_sum_and_largest_are_exact() -> None:
    made = filled(3, 1_000_003, 77)
    made.add(values(12))
    made.add(values())
    assert (made.number, made.total, made.largest) == (4, 1_000_095, 1_000_003)
    assert made.mean == 1_000_095 / 4


def test_an_empty_one() -> None:
    made = Histogram()
    assert (made.mean, made.quantile(0.5), made.largest, made.rows()) == (0.0, 0, 0, [])


@pytest.mark.parametrize("q", [0.001, 0.25, 0.5, 0.9, 0.99, 1.0])
def test_a_quantile_is_the_top_of_the_bucket_of_that_rank(q: float) -> None:
    rng = np.random.default_rng(3)
    data = np.sort((10 ** rng.uniform(0, 7, 5000)).astype(np.int64))
    made = Histogram()
    made.add(data)
    exact = int(data[max(0, int(np.ceil(q * len(data))) - 1)])
    assert exact <= made.quantile(q) <= exact * (1 + 2.0**-SUB_BITS)


def test_quantiles_of_few() -> None:
    made = filled(10, 20, 30, 40)
    assert [made.quantile(q) for q in (0.0, 0.25, 0.26, 0.5, 0.75, 1.0)] == [10, 10, 20, 20, 30, 40]
    assert filled(1_000_001).quantile(0.5) == 1_000_001, "never above the largest"


def test_rows_hold_every_value_once() -> None:
    made = filled(5, 5, 64, 65, 66, 1000)
    assert made.rows() == [(5, 6, 2), (64, 66, 2), (66, 68, 1), (992, 1008, 1)]
    assert sum(count for _, _, count in made.rows()) == made.number


@pytest.mark.parametrize(("a", "b"), [([3, 700], [5, 10**9]), ([10**9], [1]), ([], [7]), ([7], [])])
def test_merging_is_adding(a: list[int], b: list[int]) -> None:
    merged, whole = filled(*a), filled(*a, *b)
    merged.merge(filled(*b))
    assert merged.rows() == whole.rows()
    assert (merged.number, merged.total, merged.largest) == (
        *(whole.number, whole.total, whole.largest),
    )


def test_merging_leaves_the_other_as_it_was() -> None:
    one, other = filled(1), filled(2, 5000)
    one.merge(other)
    one.add(values(5000))
    assert other.rows() == filled(2, 5000).rows()
